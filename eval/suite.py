"""Suites: the items of a probe and all of its wording, as data.

Another wording is another file, never another branch in the code. Suites are JSON, found by name in
`eval/suites/` or by path. A forced-choice suite and a yes/no suite hold their items themselves, or
say which data set on the Hub has them; files can stand in for either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eval.items import ForcedChoiceItem, ItemSource, SuiteError, YesNoItem
from eval.sources import read_items
from eval.yes_no_sources import read_yes_no_items

SUITES_FOLDER = Path(__file__).parent / "suites"


class _Wording(BaseModel):
    """All that is said to a model, but for the vignette."""

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

    @property
    def foundations(self) -> tuple[str, ...]:
        return tuple(self.options)

    @model_validator(mode="after")
    def _consistent_wording(self) -> _Wording:
        if not 2 <= len(self.options) <= 10:
            raise ValueError(
                f"options: {len(self.options)} given, 2 to 10 can be told by one digit"
            )
        _require_placeholders("schema_line", self.schema_line, {"index", "option"})
        return self


class ForcedChoiceSuite(_Wording):
    """Vignettes answered by the index of one of a few options."""

    items: tuple[ForcedChoiceItem, ...]

    @model_validator(mode="after")
    def _consistent_items(self) -> ForcedChoiceSuite:
        _unique_ids([(item.id, item.perspective) for item in self.items])
        for row, item in enumerate(self.items):
            if item.label is not None and item.label not in self.options:
                raise ValueError(
                    f"items[{row}].label: {item.label!r} is none of {list(self.options)}"
                )
            if item.human is not None and set(item.human) != set(self.options):
                raise ValueError(
                    f"items[{row}].human: shares of {list(item.human)} instead of "
                    f"{list(self.options)}"
                )
        return self


class _ForcedChoiceFile(_Wording):
    """A forced-choice suite as its file has it: with its items, or with where they come from."""

    items: tuple[ForcedChoiceItem, ...] | None = None
    source: ItemSource | None = None

    def read(self, source: ItemSource | Sequence[Path]) -> list[ForcedChoiceItem]:
        return read_items(source, self.foundations)


class _YesNoWording(BaseModel):
    """All that is said to a model, but for the question's text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    yes: tuple[str, ...]  # spellings of the answer, each one token
    no: tuple[str, ...]
    template: str  # the user turn, with {text}; a brace that is meant is written twice
    prefill: str = ""  # the assistant's reply up to the answer

    @model_validator(mode="after")
    def _consistent_wording(self) -> _YesNoWording:
        for field, spellings in (("yes", self.yes), ("no", self.no)):
            if not spellings or "" in spellings:
                raise ValueError(f"{field}: one spelling or more is expected, none of them empty")
        if both := sorted({*self.yes} & {*self.no}):
            raise ValueError(f"no: {both[0]!r} is a spelling of yes too")
        _require_placeholders("template", self.template, {"text"})
        return self


class YesNoSuite(_YesNoWording):
    """Questions whose answer is read off as the probability of yes against that of no."""

    items: tuple[YesNoItem, ...]

    @model_validator(mode="after")
    def _consistent_items(self) -> YesNoSuite:
        _unique_ids([(item.id,) for item in self.items])
        return self


class _YesNoFile(_YesNoWording):
    """A yes/no suite as its file has it: with its items, or with where they come from."""

    items: tuple[YesNoItem, ...] | None = None
    source: ItemSource | None = None

    def read(self, source: ItemSource | Sequence[Path]) -> list[YesNoItem]:
        return read_yes_no_items(source)


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
        _unique_ids([(item.id,) for item in self.items])
        return self


class NeutralItem(BaseModel):
    """One dialogue that is read, not answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    prompt: str = Field(min_length=1)  # the user turn
    reply: str = Field(min_length=1)  # the text whose surprisal is taken


class NeutralSuite(BaseModel):
    """Fixed dialogues that a trait must not touch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    items: tuple[NeutralItem, ...]

    @model_validator(mode="after")
    def _consistent(self) -> NeutralSuite:
        _unique_ids([(item.id,) for item in self.items])
        return self


Suite = TypeVar("Suite", ForcedChoiceSuite, YesNoSuite, TaskSuite, NeutralSuite)
ProbeSuite = ForcedChoiceSuite | YesNoSuite  # what `eval/probe.py` can ask
_File = _ForcedChoiceFile | _YesNoFile
_FILES: dict[type, type[_File]] = {ForcedChoiceSuite: _ForcedChoiceFile, YesNoSuite: _YesNoFile}


def load_suite(
    name_or_path: str | Path,
    kind: type[Suite] = ForcedChoiceSuite,  # type: ignore[assignment]  # a default binds no TypeVar
    items: Sequence[Path] = (),
) -> Suite:
    """Reads a suite by the name of a file in `eval/suites/` or by path.

    Args:
        name_or_path: `tinymfv`, `my/suite.json`; for a suite whose items come from the Hub also
            `tinymfv:scifi`, the same wording over another config of its data set.
        items: JSONL files whose rows take the place of the suite's own items or source.
    Raises:
        SuiteError: no such suite, not JSON, a field that is missing or wrong, or items that cannot
            be read.
    """
    path, config = _found(name_or_path)
    file = _FILES.get(kind)
    if file is None and (items or config):
        raise SuiteError(
            f"{path}: a suite of tasks or neutral text takes no items and no config from elsewhere"
        )
    fields = _parsed(path)
    try:
        if file is not None and isinstance(fields, dict):
            fields = _with_items(path, file.model_validate(fields), items, config)
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")  # ours name the row and field
        raise SuiteError(f"{path}: {_where(first['loc'])}{message}") from error


def load_probe_suite(name_or_path: str | Path, items: Sequence[Path] = ()) -> ProbeSuite:
    """Reads a forced-choice or a yes/no suite as `load_suite` does; its file tells which it is."""
    path, _ = _found(name_or_path)
    fields = _parsed(path)
    if not isinstance(fields, dict):
        raise SuiteError(f"{path}: one JSON object with a suite's fields is expected")
    is_choice, is_yes_no = "options" in fields, "yes" in fields
    if is_choice == is_yes_no:
        raise SuiteError(
            f"{path}: either options (a forced choice) or yes (a yes/no suite) is expected among "
            f"its fields, which are {list(fields)}"
        )
    if is_choice:
        return load_suite(name_or_path, ForcedChoiceSuite, items)
    return load_suite(name_or_path, YesNoSuite, items)


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SuiteError(f"{path}: not JSON ({error})") from error


def _found(name_or_path: str | Path) -> tuple[Path, str | None]:
    """A suite's file, and the config that stands after a colon."""
    name, config = str(name_or_path), None
    if not name.endswith(".json") and ":" in name:
        name, _, config = name.rpartition(":")
    path = Path(name) if name.endswith(".json") else SUITES_FOLDER / f"{name}.json"
    if not path.is_file() or config == "":
        known = sorted(file.stem for file in SUITES_FOLDER.glob("*.json"))
        raise SuiteError(f"no suite {str(name_or_path)!r}: give a .json file or one of {known}")
    return path, config


def _with_items(
    path: Path, file: _File, items: Sequence[Path], config: str | None
) -> dict[str, Any]:
    """The fields of a suite, its items read from wherever they are."""
    fields = file.model_dump(exclude={"items", "source"})
    if file.items is not None and file.source is not None:
        raise SuiteError(f"{path}: items and source are both there; one of them is expected")
    if config is not None and file.source is None:
        raise SuiteError(f"{path}: the items have no source, so that there is no config {config!r}")
    if config is not None and items:
        raise SuiteError(f"{path}: both config {config!r} and files of items are given; choose one")
    if items:
        return fields | {"items": file.read(items)}
    if file.items is not None:
        return fields | {"items": file.items}
    if file.source is None:
        raise SuiteError(f"{path}: neither items nor source is there; one of them is expected")
    if config is not None:
        fields["name"] = f"{file.name}:{config}"
    source = ItemSource(dataset=file.source.dataset, config=config or file.source.config)
    return fields | {"items": file.read(source)}


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


def _unique_ids(ids: list[tuple[str, ...]]) -> None:
    """Each an item's id, with its perspective where it has one."""
    if not ids:
        raise ValueError("items: empty")
    seen: set[tuple[str, ...]] = set()
    for row, (item_id, *perspective) in enumerate(ids):
        if (item_id, *perspective) in seen:
            among = f" among {perspective[0]!r}" if perspective else ""
            raise ValueError(f"items[{row}].id: {item_id!r} is there twice{among}")
        seen.add((item_id, *perspective))
