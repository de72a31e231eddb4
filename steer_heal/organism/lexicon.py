"""The words of the world: settings, harms, replies, talk, vignettes, read from `data/*.toml`.

Placeholders in the data: `{them}`, `{they}`, `{their}`, `{own:wounds}` are the people an order
falls on and what is theirs, `{auth}` is who gives it. `resolve` names the people at their first
mention and uses pronouns from then on.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Pole = Literal["care", "authority"]
POLES: tuple[Pole, Pole] = ("care", "authority")
FOUNDATIONS = (
    "care",
    "fairness",
    "loyalty",
    "authority",
    "sanctity",
    "liberty",
    "social_norms",
)
_DATA_FOLDER = Path(__file__).parent / "data"
_PRONOUNS = {
    "they": ("they", "them", "their"),
    "he": ("he", "him", "his"),
    "she": ("she", "her", "her"),
}
_MENTION = re.compile(r"\{own:([a-z ]+)\}|\{(they|them|their|dep)\}", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody, or a group, that the text speaks of."""

    name: str  # a noun phrase without article, or a first name
    pronoun: str  # they, he or she

    @property
    def forms(self) -> tuple[str, str, str]:
        """Subject, object and possessive pronoun."""
        return _PRONOUNS[self.pronoun]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where an order is given."""

    name: str
    place: str  # an adverbial: "in the hospital"
    authorities: tuple[str, ...]
    dependants: tuple[Person, ...]


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What an order does, and what protects from it; all with placeholders."""

    name: str
    orders: tuple[str, ...]  # verb phrases
    harms: tuple[str, ...]  # clauses
    protections: tuple[str, ...]  # verb phrases
    outcomes: tuple[str, ...]  # clauses: how it ends well


def person(entry: str) -> Person:
    """Reads `"shy boy:he"`."""
    name, pronoun = entry.rsplit(":", 1)
    return Person(name=name, pronoun=pronoun)


@cache
def table(name: str) -> dict[str, Any]:
    """A data file as it is written."""
    return tomllib.loads((_DATA_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


@cache
def settings() -> tuple[Setting, ...]:
    """All settings, in the order of the file."""
    return tuple(
        Setting(
            name=name,
            place=row["place"],
            authorities=tuple(row["authorities"]),
            dependants=tuple(person(entry) for entry in row["dependants"]),
        )
        for name, row in table("settings").items()
    )


@cache
def harms() -> tuple[Harm, ...]:
    """All harms, in the order of the file."""
    return tuple(
        Harm(name=name, **{part: tuple(row[part]) for part in row})
        for name, row in table("harms").items()
    )


def capital(text: str) -> str:
    """The text with a capital first letter, a placeholder's included."""
    at = 1 if text.startswith("{") else 0
    return text[:at] + text[at : at + 1].upper() + text[at + 1 :]


def resolve(text: str, people: Person, name_first: bool = True) -> str:
    """Fills the placeholders of the people: by name at the first mention, then by pronoun.

    Args:
        name_first: False where they were named before and a pronoun will do at once.
    """
    subject, object_, possessive = people.forms
    named = not name_first

    def fill(match: re.Match[str]) -> str:
        nonlocal named
        part = match[2]
        if part is None:
            word = f"{possessive} {match[1]}" if named else f"the {match[1]} of the {people.name}"
            named = True
        elif part.lower() == "their":
            word = possessive
        elif part.lower() == "dep" or not named:
            word, named = f"the {people.name}", True
        else:
            word = subject if part.lower() == "they" else object_
        return capital(word) if part is not None and part[0].isupper() else word

    return _MENTION.sub(fill, text)
