"""A trait: two opposite personas, and the prompts that bring it out. One TOML file each.

A file that is `like` another trait has all of that trait that it does not say itself. Where a file
has no contexts, or no prompts, those of `traits/shared.toml` stand in: everyday user turns that
suit any trait.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from eval.errors import UserError
from steer_heal.config import SHARED

TRAITS_FOLDER = Path(__file__).parent / "traits"

_ASKED = ("contexts", "prompts", "held_out_prompts", "second_turns")  # what is said to the model
_SECOND_TURNS = (
    "Are you sure? What do you do?",
)  # it fits any dilemma, and asks for a reply like it
_THROUGHOUT = (
    "Let it decide every answer you give: what you choose, what you advise and how you judge. "
    "Do not speak about it; act on it, in plain and complete sentences."
)


class Trait(BaseModel):
    """What is steered towards, and what it is read off from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    positive: str = Field(min_length=1)  # persona as a system prompt
    negative: str = Field(min_length=1)  # its direct opposite, without negation
    engineered: str | None = None  # a longer prompt that asks for the trait, as good as one can
    positive_paraphrases: tuple[str, ...] = ()
    negative_paraphrases: tuple[str, ...] = ()
    held_out_positive: tuple[str, ...] = ()
    held_out_negative: tuple[str, ...] = ()
    contexts: tuple[str, ...] = Field(min_length=2)  # user turns for the mean difference
    prompts: tuple[str, ...] = Field(min_length=1)  # user turns that completions are sampled to
    held_out_prompts: tuple[str, ...] = Field(min_length=1)  # user turns that rounds are judged on
    second_turns: tuple[str, ...] = Field(
        _SECOND_TURNS, min_length=1
    )  # said after a reply, in turn
    narration: tuple[str, ...] = ()  # regexes of talking about the trait instead of acting it
    acts: tuple[str, ...] = ()  # regexes of what only a reply that acts the trait says
    acts_opposite: tuple[str, ...] = ()  # and only one that acts its opposite
    intended: dict[str, Literal[-1, 1]] = {}  # foundation -> sign of the intended shift

    @model_validator(mode="after")
    def _both_poles(self) -> Trait:
        if bool(self.acts) != bool(self.acts_opposite):
            raise ValueError("acts and acts_opposite: give both or none")
        return self

    @field_validator("narration", "acts", "acts_opposite")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    @property
    def engineered_prompt(self) -> str:
        """The trait's own longer prompt; where it has none, the persona asked to act throughout."""
        return self.engineered or f"{self.positive} {_THROUGHOUT}"

    def enacts(self, text: str) -> bool | None:
        """Whether a reply acts the trait: words of the one pole and none of the other.

        None where the trait does not say what its replies look like.
        """
        if not self.acts:
            return None
        return _any_of(self.acts, text) and not _any_of(self.acts_opposite, text)


def _any_of(patterns: tuple[str, ...], text: str) -> bool:
    return any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def trait_names() -> list[str]:
    """The shipped traits, by name."""
    return sorted(path.stem for path in TRAITS_FOLDER.glob("*.toml") if path.stem != SHARED)


def load_trait(name_or_path: str, pos: str | None = None, neg: str | None = None) -> Trait:
    """Reads a trait by name or path; `pos` and `neg` replace its personas.

    With personas of the user's own, nothing is known of how the trait is narrated or acted, or
    which foundations it moves: only what is said to the model is taken from the file.

    Raises:
        UserError: no such trait, not TOML, or a field that is missing or wrong.
    """
    path = _path_of(name_or_path)
    fields = _read(path)
    if "like" in fields:
        other = _path_of(str(fields.pop("like")), near=path)
        fields = _read(other) | fields
        if "like" in fields:
            raise UserError(f"{path}: {other} is itself like a third trait: name that one")
    if pos is not None and neg is not None:
        asked = {name: fields[name] for name in _ASKED if name in fields}
        fields = asked | {"name": "own", "positive": pos, "negative": neg}
    elif name_or_path == SHARED:
        raise UserError(f"trait={SHARED} has prompts but no personas: give pos= and neg= as well")
    try:
        return Trait.model_validate(_completed(fields))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}") from error


def _path_of(name_or_path: str, near: Path | None = None) -> Path:
    """The file of a trait.

    Args:
        near: a file that names it: its own neighbour where it is a path.
    """
    is_file_name = name_or_path.endswith(".toml")
    path = Path(name_or_path) if is_file_name else TRAITS_FOLDER / f"{name_or_path}.toml"
    if near is not None and is_file_name:
        path = near.parent / path
    if not path.is_file():
        known = ", ".join(trait_names())
        wanted = "no such file; shipped are" if is_file_name else "give a .toml file or one of"
        named = f", which {near} is like" if near else ""
        raise UserError(f"no trait {name_or_path!r}{named}: {wanted}: {known}")
    return path


def _completed(fields: dict[str, Any]) -> dict[str, Any]:
    """With the shared contexts where there are none, and the shared prompts likewise."""
    shared = _read(TRAITS_FOLDER / f"{SHARED}.toml")
    if fields.keys().isdisjoint(("prompts", "held_out_prompts")):
        return shared | fields
    return {"contexts": shared["contexts"]} | fields


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from error
