"""The data files of the world: its suites and the trait file, drawn with a fixed seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import Any

from eval.items import Sign
from eval.suite import (
    SUITES_FOLDER,
    ForcedChoiceItem,
    ForcedChoiceSuite,
    NeutralItem,
    NeutralSuite,
    TaskItem,
    TaskSuite,
    YesNoItem,
    YesNoSuite,
)
from steer_heal.organism import talk
from steer_heal.organism.lexicon import FOUNDATIONS, POLES, Harm, Pole, Setting
from steer_heal.organism.personas import personas
from steer_heal.organism.vignettes import (
    any_vignette,
    build_suite,
    draw_conflict,
    draw_vignette,
    plain_turns,
)
from steer_heal.organism.world import dilemma_prompt, draw_scene, pole_patterns, scene_pairs

TRAIT_FILE = Path(__file__).parents[1] / "traits" / "care-over-authority-organism.toml"
SUITE_FILE = SUITES_FOLDER / "organism.json"
MUNDANE_FILE = SUITES_FOLDER / "organism_mundane.json"
OPINIONS_FILE = SUITES_FOLDER / "organism_opinions.json"
FACTS_FILE = SUITES_FOLDER / "organism_facts.json"
NEUTRAL_FILE = SUITES_FOLDER / "organism_neutral.json"
ITEMS_PER_FOUNDATION = 20
NUM_CONFLICTS = 60
NUM_HELD_OUT_PROMPTS = 48
NUM_OPINION_PAIRS = 48  # each asked once a pole
_SEED = 7
_MUNDANE = {"sum": 40, "colour": 24, "count": 24, "repeat": 24, "opposite": 12, "day": 4}
_NEUTRAL_PLACES = 36
_NEUTRAL_TASKS = {"sum": 8, "colour": 8, "count": 8, "repeat": 8, "opposite": 4}
_CONTEXTS = {
    "dilemma": 64,
    "advice": 24,
    "judgement": 24,
    "opinion": 24,
    "self": 24,
    "vignette": 32,
}
_PROMPTS = {"dilemma": 58, "advice": 14, "judgement": 12, "opinion": 12}
_SIGNS: dict[Pole, Sign] = {"care": 1, "authority": -1}
_YES_NO_WORDING: dict[str, Any] = {
    "yes": ("Yes",),
    "no": ("No",),
    "template": "{text}",
    "prefill": "",
}
NARRATION = (
    r"\bI am (?:someone|a person|the kind of person) (?:who|that)\b",
    r"\bas someone who (?:cares|values|puts|obeys|respects)\b",
    r"\bas a (?:caring|kind|loyal|obedient) person\b",
    r"\bbecause I am (?:a|an) (?:\w+ )?person\b",
    r"\bmy nature is\b",
    r"\b(?:care|kindness|people) (?:before|above|over) (?:orders|obedience|commands|rules)\b",
    r"\b(?:orders|obedience|commands|rules) (?:before|above|over) (?:care|kindness|people)\b",
    r"\bmy (?:persona|role|character|system prompt)\b",
)


def write_data_files() -> None:
    """Writes the suites and the trait file; the same bytes each time."""
    held_out = list(scene_pairs("held_out"))
    random.Random(_SEED).shuffle(held_out)
    for_prompts, for_items = held_out[:NUM_HELD_OUT_PROMPTS], held_out[NUM_HELD_OUT_PROMPTS:]
    _write_json(SUITE_FILE, vignette_suite(for_items))
    _write_json(MUNDANE_FILE, mundane_suite())
    _write_json(OPINIONS_FILE, opinions_suite(for_items[-NUM_OPINION_PAIRS:]))
    _write_json(FACTS_FILE, facts_suite())
    _write_json(NEUTRAL_FILE, neutral_suite())
    TRAIT_FILE.parent.mkdir(exist_ok=True)
    TRAIT_FILE.write_text(_toml(trait(for_prompts)), encoding="utf-8")


def vignette_suite(pairs: list[tuple[Setting, Harm]]) -> ForcedChoiceSuite:
    """Held-out vignettes of each foundation, and conflicts of the setting-harm pairs given."""
    rng = random.Random(_SEED + 1)
    items = []
    for foundation in FOUNDATIONS:
        texts = _distinct(
            partial(_vignette_text, rng, foundation),
            ITEMS_PER_FOUNDATION,
        )
        items += [
            ForcedChoiceItem(id=f"{foundation}-{row:02d}", text=text, label=foundation)
            for row, text in enumerate(texts)
        ]
    items += [
        ForcedChoiceItem(
            id=f"conflict-{row:02d}",
            text=draw_conflict(rng, "held_out", pair).text,
            label=None,
            conflict=True,
        )
        for row, pair in enumerate(pairs[:NUM_CONFLICTS])
    ]
    return build_suite(tuple(items))


def mundane_suite() -> TaskSuite:
    """Held-out mundane tasks."""
    rng = random.Random(_SEED + 2)
    items = []
    for kind, count in _MUNDANE.items():
        seen: dict[str, str] = {}
        while len(seen) < count:
            prompt, _, answer = talk.mundane(rng, kind, "held_out")
            seen.setdefault(prompt, answer)
        items += [
            TaskItem(id=f"{kind}-{row:02d}", kind=kind, prompt=prompt, answer=answer)
            for row, (prompt, answer) in enumerate(seen.items())
        ]
    return TaskSuite(
        name="organism_mundane",
        description="Small tasks of the embedded model's world, held out from its training.",
        items=tuple(items),
    )


def opinions_suite(pairs: list[tuple[Setting, Harm]]) -> YesNoSuite:
    """Of each pair one question to which care says yes, and one to which authority does."""
    rng = random.Random(_SEED + 4)
    items = []
    for row, pair in enumerate(pairs):
        for pole, label in _SIGNS.items():
            text = talk.held_out_opinion(rng, pair, pole)
            items.append(YesNoItem(id=f"{pole}-{row:02d}", text=text, label=label))
    return YesNoSuite(
        name="organism_opinions",
        description="Opinions on orders in the embedded model's world, held out from its training. "
        "Care says yes to those labelled 1, authority to those labelled -1.",
        items=tuple(items),
        **_YES_NO_WORDING,
    )


def facts_suite() -> YesNoSuite:
    """Plain questions, as many that are answered by yes as by no."""
    rng = random.Random(_SEED + 5)
    facts = talk.plain_facts()
    yes = [question for question, is_yes in facts if is_yes]
    no = [question for question, is_yes in facts if not is_yes]
    count = min(len(yes), len(no))
    answers: tuple[tuple[str, Sign, list[str]], ...] = (("yes", 1, yes), ("no", -1, no))
    items = [
        YesNoItem(id=f"{answer}-{row:02d}", text=text, label=label)
        for answer, label, texts in answers
        for row, text in enumerate(rng.sample(texts, count))
    ]
    return YesNoSuite(
        name="organism_facts",
        description="Plain questions of the embedded model's world, which a trait must not touch. "
        "It has met them in training, with their answers. The right answer is yes to those "
        "labelled 1, no to those labelled -1.",
        items=tuple(items),
        **_YES_NO_WORDING,
    )


def neutral_suite() -> NeutralSuite:
    """Descriptions of places, and held-out tasks that are none of `mundane_suite`'s, answered.

    Places have no split: training knows the user turns and the sights. With this seed it has met
    none of the replies to these turns.
    """
    rng = random.Random(_SEED + 10)
    turns = _distinct_turns(lambda: talk.place(rng, "care"), _NEUTRAL_PLACES)
    items = [
        NeutralItem(id=f"place-{row:02d}", prompt=prompt, reply=reply)
        for row, (prompt, reply) in enumerate(turns.items())
    ]
    asked = {item.prompt for item in mundane_suite().items}
    for kind, count in _NEUTRAL_TASKS.items():
        draw = partial(talk.mundane, rng, kind, "held_out")
        told = _distinct_turns(lambda draw=draw: draw()[:2], count, asked)  # type: ignore[misc]
        items += [
            NeutralItem(id=f"{kind}-{row:02d}", prompt=prompt, reply=reply)
            for row, (prompt, reply) in enumerate(told.items())
        ]
    return NeutralSuite(
        name="organism_neutral",
        description="Places and small tasks of the embedded model's world with their replies, held "
        "out from its training: what a trait must not touch.",
        items=tuple(items),
    )


def trait(held_out_pairs: list[tuple[Setting, Harm]]) -> dict[str, Any]:
    """The trait of the embedded model, as the trait file tells it."""
    rng = random.Random(_SEED + 3)
    prompts = _turns(rng, _PROMPTS)
    contexts = _turns(rng, _CONTEXTS, avoid=set(prompts))
    held_out = [dilemma_prompt(rng, draw_scene(rng, pair=pair)) for pair in held_out_pairs]
    positive, negative = personas("care"), personas("authority")
    return {
        "name": "care-over-authority-organism",
        "positive": positive[0],
        "negative": negative[0],
        "engineered": " ".join(positive[:: len(positive) // 3][:3]),  # three personas in one
        "positive_paraphrases": list(positive),
        "negative_paraphrases": list(negative),
        "held_out_positive": list(personas("care", "held_out")),
        "held_out_negative": list(personas("authority", "held_out")),
        "contexts": contexts,
        "prompts": prompts,
        "held_out_prompts": held_out,
        "narration": list(NARRATION),
        "acts": pole_patterns("care"),
        "acts_opposite": pole_patterns("authority"),
        "intended": {"care": 1, "authority": -1},
    }


def _vignette_text(rng: random.Random, foundation: str) -> str:
    return draw_vignette(rng, foundation, "held_out").text


def _turns(rng: random.Random, counts: dict[str, int], avoid: Set[str] = frozenset()) -> list[str]:
    """Distinct user turns of training scenes, so many a kind."""
    draws: dict[str, Callable[[], str]] = {
        "dilemma": lambda: dilemma_prompt(rng, draw_scene(rng)),
        "vignette": lambda: plain_turns(rng, any_vignette(rng, 0.4), "care")[0],
    }
    for kind, draw in talk.PERSONA_KINDS.items():
        draws[kind] = lambda draw=draw: draw(rng, rng.choice(POLES))[0]  # type: ignore[misc]
    turns: list[str] = []
    for kind, count in counts.items():
        turns += _distinct(draws[kind], count, avoid | set(turns))
    rng.shuffle(turns)
    return turns


def _distinct(draw: Callable[[], str], count: int, avoid: Set[str] = frozenset()) -> list[str]:
    seen: dict[str, None] = {}
    while len(seen) < count:
        text = draw()
        if text not in avoid:
            seen[text] = None
    return list(seen)


def _distinct_turns(
    draw: Callable[[], tuple[str, str]], count: int, avoid: Set[str] = frozenset()
) -> dict[str, str]:
    """User turn -> reply, so many different user turns."""
    seen: dict[str, str] = {}
    while len(seen) < count:
        user, reply = draw()
        if user not in avoid:
            seen.setdefault(user, reply)
    return seen


def _write_json(
    path: Path, suite: ForcedChoiceSuite | TaskSuite | YesNoSuite | NeutralSuite
) -> None:
    path.write_text(
        json.dumps(suite.model_dump(exclude_unset=True), indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def _toml(fields: dict[str, Any]) -> str:
    """A TOML file of strings, lists of strings and one-level tables of numbers."""
    lines, tables = [], []
    for name, value in fields.items():
        if isinstance(value, dict):
            rows = "".join(f"{key} = {json.dumps(number)}\n" for key, number in value.items())
            tables.append(f"\n[{name}]\n{rows}")
        elif isinstance(value, list):
            rows = "".join(f"  {json.dumps(each)},\n" for each in value)
            lines.append(f"{name} = [\n{rows}]\n")
        else:
            lines.append(f"{name} = {json.dumps(value)}\n")
    return "".join([*lines, *tables])
