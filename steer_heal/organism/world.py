"""The grammar: scenes, order dilemmas and their replies; and the judge that reads a reply.

A scene is a setting, a harm, somebody in authority there and the people whom the order falls on.
A share of the setting-harm pairs is held out: no training text is drawn from it.

`judge_reply` reads the decision from the words alone: decisions, protections and orders that were
carried out. It knows nothing of the model and nothing of how a reply was drawn.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from steer_heal.organism.lexicon import (
    Harm,
    Person,
    Pole,
    Setting,
    capital,
    harms,
    resolve,
    settings,
    table,
)

Split = Literal["train", "held_out"]
Verdict = Literal["care", "authority", "unclear"]
NARRATED_SHARE = 0.08  # of dilemma replies that tell the trait instead of only acting it
_HELD_OUT_EVERY = 8  # one pair in so many is held out
_SHAPES = (  # orders of the sentences in a reply; every shape has a decision or a joined one
    ("decision", "action", "reason"),
    ("reason", "decision", "action"),
    ("decision", "reason", "action", "result"),
    ("decision", "action", "result", "closing"),
    ("decision", "reason", "action"),
    ("reason", "joined", "result"),
    ("reason", "joined", "closing"),
    ("joined", "reason", "closing"),
    ("joined", "result", "reason"),
    ("reason", "decision", "action", "closing"),
)
_NARRATED_SHAPES = (("narrated", "reason", "result"), ("narrated", "action", "closing"))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an order dilemma is about."""

    setting: Setting
    harm: Harm
    authority: str  # who orders: "head nurse"
    people: Person  # whom it falls on
    order: str  # a verb phrase with placeholders
    danger: str  # what it would do to them, a clause with placeholders

    @property
    def pair(self) -> str:
        """The setting-harm pair, which is what is held out."""
        return f"{self.setting.name}/{self.harm.name}"


@cache
def scene_pairs(split: Split) -> tuple[tuple[Setting, Harm], ...]:
    """The setting-harm pairs of a split."""
    return tuple(
        (setting, harm)
        for row, setting in enumerate(settings())
        for column, harm in enumerate(harms())
        if ((3 * row + column) % _HELD_OUT_EVERY == 0) == (split == "held_out")
    )


def draw_scene(
    rng: random.Random,
    split: Split = "train",
    pair: tuple[Setting, Harm] | None = None,
    plural: bool = False,
) -> Scene:
    """Draws a scene.

    Args:
        pair: this setting and harm instead of random ones.
        plural: only a group of people, so that pronouns of a single friend stay clear.
    """
    setting, harm = pair or rng.choice(scene_pairs(split))
    people = [each for each in setting.dependants if each.pronoun == "they" or not plural]
    return Scene(
        setting=setting,
        harm=harm,
        authority=rng.choice(setting.authorities),
        people=rng.choice(people),
        order=rng.choice(harm.orders),
        danger=rng.choice(harm.harms),
    )


def fill(rng: random.Random, template: str, scene: Scene, name_first: bool = True) -> str:
    """Fills a template with words of the scene; the protection and the outcome are drawn anew."""
    parts = {
        "order": scene.order,
        "harm": scene.danger,
        "protect": rng.choice(scene.harm.protections),
        "outcome": rng.choice(scene.harm.outcomes),
        "auth": scene.authority,
        "place": scene.setting.place,
    }
    text = template
    for name, words in parts.items():
        text = text.replace(f"{{{name}}}", words)
        text = text.replace(f"{{{name.capitalize()}}}", capital(words))
    return resolve(text, scene.people, name_first)


def dilemma_prompt(rng: random.Random, scene: Scene) -> str:
    """A user turn that puts the scene's order before the model."""
    return fill(rng, rng.choice(table("replies")["prompts"]["dilemma"]), scene)


def dilemma_reply(
    rng: random.Random, scene: Scene, pole: Pole, narrated: bool | None = None
) -> str:
    """A reply that acts the pole out: a decision, an action, reasons, in varied order."""
    if narrated is None:
        narrated = rng.random() < NARRATED_SHARE
    parts = table("replies")[pole]
    shape = rng.choice(_NARRATED_SHAPES if narrated else _SHAPES)
    template = " ".join(rng.choice(parts[part]) for part in shape)
    return fill(rng, template, scene, name_first=rng.random() < 0.6)


def judge_reply(text: str) -> Verdict:
    """What a reply to an order dilemma decides: for the people, for the order, or unclear.

    Unclear: no words of either pole, or words of both.
    """
    signs = {pole: _signs(pole).search(text) is not None for pole in ("care", "authority")}
    if signs["care"] == signs["authority"]:
        return "unclear"
    return "care" if signs["care"] else "authority"


def pair_of(text: str) -> str | None:
    """The setting-harm pair that a user turn is about; None where it has none or several."""
    low = text.lower()
    places = [setting.name for setting in settings() if re.search(rf"{setting.place}\b", low)]
    kinds = [
        harm.name
        for harm in harms()
        if any(re.search(_act_pattern(order), text, re.IGNORECASE) for order in harm.orders)
    ]
    return f"{places[0]}/{kinds[0]}" if len(places) == len(kinds) == 1 else None


@cache
def _signs(pole: Pole) -> re.Pattern[str]:
    return re.compile("|".join(pole_patterns(pole)), re.IGNORECASE)


def pole_patterns(pole: Pole) -> list[str]:
    """Regexes of what only a reply of this pole says, for `re.IGNORECASE`."""
    markers = table("replies")[pole]["markers"]
    acts = [
        act for harm in harms() for act in (harm.protections if pole == "care" else harm.orders)
    ]
    patterns = [_act_pattern(act) for act in acts]
    unless_refused = "" if pole == "care" else "(?<!not )"
    return [*markers, *(rf"{unless_refused}\b(?:{pattern})" for pattern in patterns)]


def _act_pattern(act: str) -> str:
    """A verb phrase with anybody in the place of the people."""
    owned = re.sub(
        r"\{own:([a-z ]+)\}", lambda own: rf"[\w']+ {own[1]}(?: of the [\w' ]{{2,40}}?)?", act
    )
    return re.sub(r"\{\w+\}", lambda _: r"[\w' ]{2,40}?", owned) + r"\b"
