"""Suites: the items of a probe and all of its wording, as data.

Another wording is another file, never another branch in the code. Suites are JSON, found by name in
`eval/suites/` or by path.
"""

from __future__ import annotations

import json
from pathlib import Path
from string import Formatter
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from eval.errors import EvalError

SUITES_FOLDER = Path(__file__).parent / "suites"


class SuiteError(EvalError):
    """A suite that cannot be used: the message names the file, the row and the field."""


class ForcedChoiceItem(BaseModel):
    """One vignette."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    text: str  # the scenario, as the user tells it
    label: str | None = None  # the intended option; None where two are defensible
    conflict: bool = False  # two foundations pull apart on purpose


class ForcedChoiceSuite(BaseModel):
    """Vignettes answered by the index of one of a few options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    options: dict[str, str]  # foundation -> how the option is worded; the order is the index
    question: str
    schema_head: str
    schema_line: str  # one line an option, with {index} and {option}; a brace is written twice
    schema_tail: str
    nudge: str  # the second user turn, after the think
    think_open: str
    think_close: str
    prefill: str  # the assistant's answer up to the opening quote of the index
    items: tuple[ForcedChoiceItem, ...]

    @property
    def foundations(self) -> tuple[str, ...]:
        return tuple(self.options)

    @model_validator(mode="after")
    def _consistent(self) -> ForcedChoiceSuite:
        if not 2 <= len(self.options) <= 10:
            raise ValueError(
                f"options: {len(self.options)} given, 2 to 10 can be told by one digit"
            )
        _require_placeholders("schema_line", self.schema_line, {"index", "option"})
        _unique_ids([item.id for item in self.items])
        for row, item in enumerate(self.items):
            if item.label is not None and item.label not in self.options:
                raise ValueError(
                    f"items[{row}].label: {item.label!r} is none of {list(self.options)}"
                )
        return self


class TaskItem(BaseModel):
    """One task with one right answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: str  # sum, colour, repeat, count ...
    prompt: str
    answer: str  # right if the reply contains it as whole words, whatever the case


class TaskSuite(BaseModel):
    """Mundane tasks that a trait must not touch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    items: tuple[TaskItem, ...]

    @model_validator(mode="after")
    def _consistent(self) -> TaskSuite:
        _unique_ids([item.id for item in self.items])
        return self


Suite = TypeVar("Suite", ForcedChoiceSuite, TaskSuite)


def load_suite(
    name_or_path: str | Path,
    kind: type[Suite] = ForcedChoiceSuite,  # type: ignore[assignment]  # a default binds no TypeVar
) -> Suite:
    """Reads a suite by the name of a file in `eval/suites/` or by path.

    Raises:
        SuiteError: no such suite, not JSON, or a field that is missing or wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = SUITES_FOLDER / f"{name_or_path}.json"
    if not path.is_file():
        known = sorted(file.stem for file in SUITES_FOLDER.glob("*.json"))
        raise SuiteError(f"no suite {str(name_or_path)!r}: give a .json file or one of {known}")
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not JSON ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")  # ours name the row and field
        raise SuiteError(f"{path}: {_where(first['loc'])}{message}") from error


def _where(location: tuple[int | str, ...]) -> str:
    """A place in the file, as `items[3].text: `; nothing for the file as a whole."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".") + ": " if parts else ""


def _require_placeholders(field: str, text: str, names: set[str]) -> None:
    try:
        found = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except ValueError as error:  # a brace without its partner
        raise ValueError(f"{field}: {error}; a brace that is meant is written twice") from error
    if found != names:
        raise ValueError(f"{field}: placeholders {sorted(found)} instead of {sorted(names)}")


def _unique_ids(ids: list[str]) -> None:
    if not ids:
        raise ValueError("items: empty")
    seen: set[str] = set()
    for row, item_id in enumerate(ids):
        if item_id in seen:
            raise ValueError(f"items[{row}].id: {item_id!r} is there twice")
        seen.add(item_id)
