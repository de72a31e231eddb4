"""A trait: two opposite personas, and the prompts that bring it out. One TOML file each."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from eval.errors import UserError

TRAITS_FOLDER = Path(__file__).parent / "traits"


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


def load_trait(name_or_path: str, pos: str | None = None, neg: str | None = None) -> Trait:
    """Reads a trait by name or path; `pos` and `neg` replace its personas.

    With personas of the user's own, nothing is known of how the trait is narrated or acted, or
    which foundations it moves: the file's prompts are kept, those fields are emptied.

    Raises:
        UserError: no such trait, not TOML, or a field that is missing or wrong.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = TRAITS_FOLDER / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TRAITS_FOLDER.glob("*.toml")))
        raise UserError(f"no trait {name_or_path!r}: give a .toml file or one of: {known}")
    try:
        trait = Trait.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}") from error
    if pos is None or neg is None:
        return trait
    unknown: dict[str, object] = {
        "engineered": None,
        "narration": (),
        "acts": (),
        "acts_opposite": (),
        "intended": {},
    }
    return trait.model_copy(update={"name": "own", "positive": pos, "negative": neg, **unknown})
