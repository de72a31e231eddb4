"""The studies that can be asked for by name, as studies.toml says them."""

from __future__ import annotations

import textwrap
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from eval.errors import UserError
from eval.settings import nearest

STUDIES_FILE = Path(__file__).parent / "studies.toml"


class Study(BaseModel):
    """An experiment: one question, and variants of a run that answer it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    question: str  # one sentence
    variants: dict[str, tuple[str, ...]]  # label -> KEY=VALUE; the first is compared with

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))


def load_studies() -> dict[str, Study]:
    """Every study by its name."""
    tables = tomllib.loads(STUDIES_FILE.read_text(encoding="utf-8"))
    return {name: Study(name=name, **table) for name, table in tables.items()}


def load_study(name: str) -> Study:
    """A study by its name.

    Raises:
        UserError: there is none; the nearest names are said.
    """
    studies = load_studies()
    if name not in studies:
        near = nearest(name, list(studies))
        known = (
            f"the nearest are: {', '.join(near)}" if near else f"there are: {', '.join(studies)}"
        )
        raise UserError(f"unknown study {name!r}; {known}")
    return studies[name]


def describe_studies() -> str:
    """Every study with its question and its variants."""
    lines = ["The studies, each with its question and its variants: steer-heal study NAME"]
    for study in load_studies().values():
        lines += ["", study.name]
        text = f"{study.question} [{', '.join(study.variants)}]"
        lines += textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
