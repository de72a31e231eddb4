"""One evaluation in a folder: asked chunk by chunk, so that an interrupted one goes on.

    about.json      what is evaluated and how: another of it in the same folder is refused
    rows.jsonl      a line an item, in the suite's order; of an unscorable one the key alone
    summary.json    written last

A chunk is written when it is done. Rows are the same bytes however often it was interrupted: chunks
are cut at the same items, and each has a seed of its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from eval.bars import progress_bar
from eval.errors import UserError
from eval.files import (
    NOT_AS_WRITTEN,
    digest_of,
    disk_errors,
    locked,
    read_json,
    write_bytes,
    write_json,
)
from eval.kinds import Figures, Result, Row, kind_of
from eval.settings import Device, Settings
from eval.suite import ProbeSuite, load_probe_suite
from eval.think import Thinking

ABOUT_FILE, ROWS_FILE, SUMMARY_FILE = "about.json", "rows.jsonl", "summary.json"


class ProbeConfig(Settings):
    """What is asked, and how."""

    suite: str = "organism"
    """Forced-choice or yes/no suite: a name in eval/suites, name:config, or a path."""
    items: tuple[Path, ...] = ()
    """JSONL files whose rows take the place of the suite's own items."""
    think: int = Field(0, ge=0)
    """Tokens that the model thinks before it answers, exactly."""
    samples: int = Field(1, ge=1)
    """Thinks a frame, averaged as probabilities; more than 1 needs a temperature."""
    temperature: float = Field(0.0, ge=0)
    """Softmax temperature of the think; 0 takes the likeliest token."""
    natural: bool = True
    """Read the answer inside the think where the model wrote it there."""
    system: str | None = Field(None, min_length=1)
    """A system prompt for every item."""
    seed: int = Field(0, ge=0)
    """Every random draw derives from it."""
    batch_size: int = Field(64, ge=1)
    """Rows a forward pass."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    folder: str = "evaluations"
    """Where evaluations land."""

    @model_validator(mode="after")
    def _can_think(self) -> ProbeConfig:
        self.thinking(0)
        return self

    def thinking(self, first_item: int) -> Thinking:
        """How the chunk that begins at an item thinks."""
        seed = int(np.random.SeedSequence((self.seed, first_item)).generate_state(1)[0])
        return Thinking(
            tokens=self.think,
            samples=self.samples,
            temperature=self.temperature,
            natural=self.natural,
            seed=seed,
        )

    def load(self) -> ProbeSuite:
        """The suite with its items.

        Raises:
            UserError: it cannot be used, or not with these settings.
        """
        suite = load_probe_suite(self.suite, self.items)
        fields = ("think", "samples", "temperature", "natural")
        given = [
            f"{name}={getattr(self, name)}"
            for name in fields
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if given and not kind_of(suite).can_think:
            raise UserError(
                f"suite {suite.name!r} is answered by yes or no, at once and without a think: "
                f"leave out {', '.join(given)}, or take a forced-choice suite"
            )
        return suite


def probe(
    model: Any,
    tokenizer: Any,
    suite: ProbeSuite,
    config: ProbeConfig,
    subject: dict[str, str],
    name: str,
) -> tuple[Result, Figures]:
    """Asks a suite of a model, going on where an earlier call stopped.

    Args:
        suite: what `config.load()` gives.
        subject: what tells the model from others: its id, the hash of its weights, its adapters.
        name: of the evaluation's folder in `config.folder`.
    Raises:
        UserError: the folder holds another evaluation, or cannot be read or written.
    """
    kind = kind_of(suite)
    folder = Path(config.folder) / name
    with locked(folder, f"evaluation {folder}", "folder=NAME"):
        _agree(folder, _about(config, suite, subject))
        lines = _read(folder, suite, config.batch_size)
        with progress_bar(len(suite.items), name, initial=len(lines)) as bar:
            for start in range(len(lines), len(suite.items), config.batch_size):
                lines += _ask(model, tokenizer, suite, config, start)
                _append(folder, lines[start:])
                bar.update(len(lines) - start)
        rows: tuple[Any, ...] = tuple(line for line in lines if not isinstance(line, str))
        unscorable = tuple(line for line in lines if isinstance(line, str))
        result = kind.result(rows=rows, unscorable=unscorable)
        summary = kind.summarise(result)
        write_json(folder / SUMMARY_FILE, summary.model_dump())
    return result, summary


Line = Row | str  # a row, or the key of an item that cannot be scored


def _ask(
    model: Any,
    tokenizer: Any,
    suite: ProbeSuite,
    config: ProbeConfig,
    start: int,
) -> list[Line]:
    """Lines of the chunk of items that begins at `start`, in their order."""
    items = suite.items[start : start + config.batch_size]
    part = suite.model_copy(update={"items": items})
    found = kind_of(suite).ask(
        model, tokenizer, part, config.system, config.batch_size, config.thinking(start)
    )
    rows: dict[str, Row] = {row.key: row for row in found.rows}
    return [rows.get(item.key, item.key) for item in items]


def _about(config: ProbeConfig, suite: ProbeSuite, subject: dict[str, str]) -> dict[str, Any]:
    asked = config.model_dump(mode="json", exclude={"folder", "device", "items"})
    return {
        "subject": subject,
        "config": asked,
        "suite": digest_of([suite.model_dump_json()]),
    }


def _agree(folder: Path, about: dict[str, Any]) -> None:
    """Records a new evaluation; refuses to go on with another one."""
    file = folder / ABOUT_FILE
    if not file.exists():
        write_json(file, about)
        return
    before = read_json(file)
    if before != about:
        known = before if isinstance(before, dict) else {}
        changed = [key for key in about if known.get(key) != about[key]]
        raise UserError(
            f"{folder} holds another evaluation ({', '.join(changed)} differ); give this one a "
            "place of its own with folder=NAME, or take that one away"
        )


def _read(folder: Path, suite: ProbeSuite, chunk: int) -> list[Line]:
    """The lines of whole chunks; what a killed process left of another one is cut off."""
    file = folder / ROWS_FILE
    if not file.exists():
        return []
    with disk_errors(file):
        content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    keys = [item.key for item in suite.items]
    row = kind_of(suite).row
    lines: list[Line] = []
    try:
        for text in whole.decode("utf-8").split("\n")[:-1]:
            fields = json.loads(text)
            lines.append(fields if isinstance(fields, str) else row(**fields))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file} {NOT_AS_WRITTEN}: line {len(lines) + 1}; take the folder away to have it "
            "evaluated again"
        ) from error
    if [_key(line) for line in lines] != keys[: len(lines)]:
        raise UserError(f"{file} {NOT_AS_WRITTEN}: its items are not the suite's")
    if len(lines) < len(keys):
        lines = lines[: len(lines) - len(lines) % chunk]
    kept = "".join(_text(line) for line in lines).encode("utf-8")
    if kept != content:
        write_bytes(file, kept)
    return lines


def _key(line: Line) -> str:
    return line if isinstance(line, str) else line.key


def _text(line: Line) -> str:
    return (json.dumps(line) if isinstance(line, str) else line.model_dump_json()) + "\n"


def _append(folder: Path, lines: list[Line]) -> None:
    with disk_errors(folder / ROWS_FILE), (folder / ROWS_FILE).open("ab") as file:
        file.write("".join(_text(line) for line in lines).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
