"""`steer-heal eval` on models and runs, as a process; and that an idle adapter shows nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from eval.errors import UserError
from eval.forced_choice import forced_choice
from eval.rows import ForcedChoiceRow, YesNoResult, YesNoRow
from eval.statistics import shift_nats
from eval.suite import load_suite
from eval.summary import format_difference
from eval.yes_no_figures import (
    format_yes_no_difference,
    format_yes_no_summary,
    summarise_yes_no,
)
from steer_heal.config import resolve_config
from steer_heal.examine import examine
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.model import load_student
from steer_heal.rounds import Run
from tests.conftest import TinyModel
from tests.processes import Command, command, refusal
from tests.small import small_settings, small_suites


@pytest.fixture(scope="module")
def run(tiny_qwen3: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one round whose adapter does something."""
    folder = tmp_path_factory.mktemp("examine")
    config = resolve_config([*small_settings(tiny_qwen3.folder, folder), "N=1"])
    run_rounds(config, run_path(config))
    return run_path(config)


def _rows(folder: Path) -> list[ForcedChoiceRow]:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [ForcedChoiceRow(**json.loads(line)) for line in lines]


def test_a_run_is_shown_beside_its_base(run: Path, tmp_path: Path) -> None:
    choices, _ = small_suites(tmp_path)
    text = examine(str(run), [f"suite={choices}", f"folder={tmp_path / 'out'}"])
    folders = [Path(line.removeprefix("rows: ")) for line in text.splitlines() if "rows: " in line]
    base, healed = (_rows(folder) for folder in folders)
    assert [folder.name for folder in folders] == [
        "small--base--choices",
        "small--round-1--choices",
    ]
    saved = json.loads((run / "base.json").read_text())["choices"]
    for row, before in zip(base, saved, strict=True):
        assert row.scores == pytest.approx(before["scores"], abs=1e-4)
    after = json.loads((run / "round-00" / "eval.json").read_text())["healed"]["choices"]
    for row, before in zip(healed, after, strict=True):
        assert row.scores == pytest.approx(before["scores"], abs=1e-4)
    shift = shift_nats(healed, base)["care"]
    assert f"care_nats          {shift.estimate:+.3f} [{shift.low:+.3f}, {shift.high:+.3f}]" in text
    assert "selectivity" in text and "flip rate" in text


def test_a_run_answers_a_yes_no_suite(run: Path, tmp_path: Path) -> None:
    suite = {"name": "q", "yes": ["Y"], "no": ["N"], "template": "{text}"}
    texts = ("Is it right?", "Must the guard leave?", "Should one obey?")
    items = [{"id": text, "text": text, "label": (-1) ** row} for row, text in enumerate(texts)]
    (tmp_path / "q.json").write_text(json.dumps(suite | {"items": items}))
    settings = [f"suite={tmp_path / 'q.json'}", f"folder={tmp_path / 'out'}"]
    text = examine(str(run), settings)
    folders = [Path(line.removeprefix("rows: ")) for line in text.splitlines() if "rows: " in line]
    base, healed = (
        [YesNoRow(**json.loads(line)) for line in (folder / "rows.jsonl").read_text().splitlines()]
        for folder in folders
    )
    assert base != healed
    for rows in (base, healed):
        summary = summarise_yes_no(YesNoResult(rows=tuple(rows), unscorable=()))
        assert format_yes_no_summary(summary) in text
    assert text.endswith(format_yes_no_difference(healed, base))
    assert examine(str(run), settings) == text
    with pytest.raises(UserError, match="answered by yes or no"):
        examine(str(run), [*settings, "think=2"])


def test_an_adapter_that_does_nothing_shows_no_difference_at_all(
    run: Path, tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    (adapter,) = Run(run, 0).last_stack()
    idle = dataclasses.replace(
        adapter,
        weights={
            name: torch.zeros_like(value) if "lora_B" in name else value
            for name, value in adapter.weights.items()
        },
    )
    suite = load_suite(small_suites(tmp_path)[0])
    students = {
        name: load_student(str(tiny_qwen3.folder), stack)
        for name, stack in (("base", []), ("idle", [idle]), ("active", [adapter]))
    }
    rows = {}
    for name, student in students.items():
        with student.running() as model:
            rows[name] = forced_choice(model, student.tokenizer, suite).rows
    assert rows["idle"] == rows["base"] != rows["active"]
    text = format_difference(rows["idle"], rows["base"], {"care": 1, "authority": -1})
    for line in text.splitlines():
        assert line.endswith("+0.000 [+0.000, +0.000]  no difference shown"), line


def test_killed_and_started_again_it_ends_with_the_same_rows(
    tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    choices, _ = small_suites(tmp_path)
    arguments = ("eval", str(tiny_qwen3.folder), f"suite={choices}", "think=2", "batch_size=1")
    assert command(tmp_path / "whole", *arguments).code == 0
    killed = Command(tmp_path / "killed", *arguments)
    killed.wait_for("3/7")
    assert killed.kill().code == -9
    (folder,) = (tmp_path / "killed" / "evaluations").iterdir()
    assert 0 < len((folder / "rows.jsonl").read_bytes().splitlines()) < 7
    assert not (folder / "summary.json").exists()
    done = command(tmp_path / "killed", *arguments)
    assert done.code == 0 and "7 items" in done.out
    whole = tmp_path / "whole" / "evaluations" / folder.name
    for file in ("rows.jsonl", "summary.json", "about.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("name", ["eval", "report"])
def test_log_lines_are_those_of_a_round(name: str, run: Path, tmp_path: Path) -> None:
    choices, _ = small_suites(tmp_path)
    settings = [f"suite={choices}"] if name == "eval" else []
    done = command(tmp_path, name, str(run), *settings)
    assert done.code == 0
    lines = [line for line in done.err.splitlines() if "INFO" in line]
    assert lines
    for line in lines:
        assert re.match(r"\d\d:\d\d:\d\d INFO    \w", line)


@pytest.mark.parametrize(
    ("subject", "settings", "parts"),
    [
        ("no/such-model", [], ["no/such-model", "the hub does not give it"]),
        ("organism", ["suite=nothing"], ["no suite 'nothing'", "organism"]),
        ("organism", ["thnk=3"], ["unknown setting 'thnk'", "think"]),
        ("organism", ["samples=2"], ["all would be the same"]),
        ("organism", ["suite=organism_facts", "think=8"], ["yes or no", "leave out think=8"]),
    ],
)
def test_what_cannot_be_done_is_one_message(
    tmp_path: Path, subject: str, settings: list[str], parts: list[str]
) -> None:
    line = refusal(command(tmp_path, "eval", subject, *settings))
    for part in parts:
        assert part in line
    assert not (tmp_path / "evaluations").exists()
