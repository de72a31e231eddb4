"""`steer-heal lint`: what a trait lacks or gets wrong, and with a model, what is left to teach.

    fault   figures made with the trait would not mean what they say
    hint    it would do more, or hold better, with this

Texts are held against each other by their word 3-grams: overlap = |common| / |either|, 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from eval.settings import Device, Settings, resolve_settings
from eval.suite import ForcedChoiceSuite, load_suite
from steer_heal.config import EvaluateConfig
from steer_heal.headroom import Headroom, measure_headroom
from steer_heal.model import load_student
from steer_heal.trait import Trait, load_trait

_WANTED = {  # field -> how many there should be
    "positive_paraphrases": 8,
    "held_out_positive": 4,
    "contexts": 128,
    "prompts": 96,
    "held_out_prompts": 48,
}
_POLES = (
    ("positive", "negative"),
    ("positive_paraphrases", "negative_paraphrases"),
    ("held_out_positive", "held_out_negative"),
)
_NEGATION = re.compile(
    r"\b(?:not|never|no|none|nobody|nothing|neither|nor|without|cannot|\w+n['’]t)\b", re.IGNORECASE
)
_ASSISTANT = re.compile(r"\b(?:(?i:assistant|chatbot|language model)|AI)\b")
_FIRST_PERSON = (
    (r"\byou are\b", "I am"),
    (r"\byours?\b", "my"),
    (r"\byourself\b", "myself"),
    (r"\byou\b", "I"),
)
_SAME_OVERLAP = 0.8  # the same text but for a word
_ALIKE_OVERLAP = 0.5  # one template, other nouns
_ALIKE_SHARE = 0.1  # of a list may come from such templates
_LENGTH_GAP = 0.2  # of the longer persona's words
_LEAST_SPAN_NATS = 0.02  # personas on unrelated matters come to 0.01 on the embedded model
_SATURATED_SHARE = 0.9


class LintConfig(Settings):
    """What a trait is held against."""

    model: str | None = None
    """The model at hand: organism, a local folder, or a hub id; without one no reply is sampled."""
    suite: str = EvaluateConfig().suite
    """Forced-choice suite whose foundations a trait can mean to move."""
    num_prompts: int = Field(48, ge=2)
    """Held-out prompts, one reply a persona each."""
    max_new_tokens: int = Field(96, ge=1)
    """Longest reply, tokens."""
    batch_size: int = Field(16, ge=1)
    """Replies sampled or scored at a time."""
    seed: int = Field(0, ge=0)
    """Every random draw derives from it."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to mend."""

    level: Literal["fault", "hint"]
    where: str  # a field of the trait file, with the row's number from 1 where it is a list
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.what}; {self.advice}"


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """All that is to be said of a trait."""

    trait: Trait
    findings: tuple[Finding, ...]
    headroom: Headroom | None  # None: no model was given

    @property
    def has_fault(self) -> bool:
        return any(finding.level == "fault" for finding in self.findings)

    def __str__(self) -> str:
        """A line a finding, and what was looked at."""
        counts = f"{len(self.trait.contexts)} contexts, {len(self.trait.prompts)} prompts, "
        counts += f"{len(self.trait.held_out_prompts)} held out"
        ordered = sorted(self.findings, key=lambda finding: finding.level)  # faults first
        lines = [str(finding) for finding in ordered] or ["nothing to mend"]
        lines.append(f"{self.trait.name}: {counts}")
        if (room := self.headroom) is not None:
            lines.append(
                f"enactment, nats a token: positive {room.positive_nats:+.2f}, no persona "
                f"{room.neutral_nats:+.2f}, negative {room.negative_nats:+.2f}"
            )
            lines.append(
                f"left to teach: {room.gap_nats.estimate:+.2f} "
                f"[{room.gap_nats.low:+.2f}, {room.gap_nats.high:+.2f}] nats a token"
            )
        return "\n".join(lines)


def lint(name_or_path: str, settings: Sequence[str]) -> LintReport:
    """Looks a trait over; with model=..., samples that model's replies too.

    Args:
        name_or_path: a shipped trait's name, or a .toml file.
        settings: KEY=VALUE of `LintConfig`.
    Raises:
        UserError: a trait, a setting, a suite or a model that cannot be used.
    """
    config = resolve_settings(LintConfig, settings)
    trait = load_trait(name_or_path)
    findings = [
        *_parts(trait),
        *_personas(trait),
        *_lengths(trait),
        *_repeats(trait),
        *_leaks(trait),
        *_narration(trait),
        *_foundations(trait, config.suite),
    ]
    headroom = None
    if config.model is not None:
        headroom = measure_headroom(
            load_student(config.model, [], config.device),
            trait,
            num_prompts=config.num_prompts,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        findings += _headroom(headroom, config.model)
    return LintReport(trait=trait, findings=tuple(findings), headroom=headroom)


def _parts(trait: Trait) -> Iterator[Finding]:
    for field, wanted in _WANTED.items():
        if (count := len(getattr(trait, field))) < wanted:
            what = f"{count} of the {wanted} wanted"
            yield Finding(level="hint", where=field, what=what, advice="write more, of other kinds")
    unsaid = {
        "engineered": "write the longest, best prompt for the trait: it is a control",
        "narration": "give regexes of telling the trait, or such replies are trained on",
        "intended": "say the foundations it should move, `intended = {}` where it is none",
    }
    for field, advice in unsaid.items():
        if field not in trait.model_fields_set:
            yield Finding(level="hint", where=field, what="missing", advice=advice)


def _personas(trait: Trait) -> Iterator[Finding]:
    for field in (field for pair in _POLES for field in pair):
        for where, text in _rows(trait, field):
            if found := _NEGATION.search(text):
                advice = "say what somebody does, as models steer towards what is named"
                yield Finding(
                    level="fault", where=where, what=f"negated ({found[0]!r})", advice=advice
                )
            if found := _ASSISTANT.search(text):
                yield Finding(
                    level="fault",
                    where=where,
                    what=f"a mere assistant ({found[0]!r})",
                    advice="take a person who is the direct opposite of the other pole",
                )


def _lengths(trait: Trait) -> Iterator[Finding]:
    """Rows of the two poles are pairs, about as long and never the same."""
    for fields in _POLES:
        positive, negative = ([*_rows(trait, field)] for field in fields)
        if len(positive) != len(negative):
            yield Finding(
                level="fault",
                where=" and ".join(fields),
                what=f"{len(positive)} and {len(negative)} rows",
                advice="give each paraphrase its opposite, row by row",
            )
        for (where, one), (_, other) in zip(positive, negative, strict=False):
            words = sorted((len(one.split()), len(other.split())))
            if words[1] - words[0] > max(2, _LENGTH_GAP * words[1]):
                what = f"{len(one.split())} words, its opposite has {len(other.split())}"
                advice = "make them alike, or the length is steered too"
                yield Finding(level="fault", where=where, what=what, advice=advice)
            if one == other:
                advice = "take direct opposites"
                yield Finding(level="fault", where=where, what="its own opposite", advice=advice)


def _repeats(trait: Trait) -> Iterator[Finding]:
    for field in ("contexts", "prompts", "held_out_prompts"):
        texts = getattr(trait, field)
        nearest = _nearest(texts, texts, is_same_list=True)
        same = [row for row, (overlap, _) in enumerate(nearest) if overlap >= _SAME_OVERLAP]
        for row in same:
            yield Finding(
                level="hint",
                where=f"{field} {row + 1}",
                what=f"nearly the same as {field} {nearest[row][1] + 1}",
                advice="write another",
            )
        alike = sum(overlap >= _ALIKE_OVERLAP for overlap, _ in nearest) / len(texts)
        if alike > _ALIKE_SHARE:
            yield Finding(
                level="hint",
                where=field,
                what=f"{alike:.0%} are another one with a few words swapped",
                advice="vary setting and form, or the direction fits the format",
            )


def _leaks(trait: Trait) -> Iterator[Finding]:
    """Held-out prompts are to be of another making than all that a round is made from."""
    for field in ("prompts", "contexts"):
        nearest = _nearest(trait.held_out_prompts, getattr(trait, field))
        for row, (overlap, other) in enumerate(nearest):
            if overlap >= _ALIKE_OVERLAP:
                yield Finding(
                    level="fault",
                    where=f"held_out_prompts {row + 1}",
                    what=f"not held out: {overlap:.0%} of it and {field} {other + 1} is the same",
                    advice="write it anew, or the rounds are judged on what they learnt",
                )


def _narration(trait: Trait) -> Iterator[Finding]:
    """The personas' own words, said of oneself, are the plainest narration there is."""
    if not trait.narration:
        return  # told as a missing part
    for field in ("positive", "negative"):
        said = getattr(trait, field)
        for pattern, words in _FIRST_PERSON:
            said = re.sub(pattern, words, said, flags=re.IGNORECASE)
        if not any(re.search(pattern, said, re.IGNORECASE) for pattern in trait.narration):
            yield Finding(
                level="hint",
                where="narration",
                what=f"no pattern finds the {field} persona said of oneself ({said[:60]!r} ...)",
                advice="add one that does",
            )


def _foundations(trait: Trait, suite: str) -> Iterator[Finding]:
    known = load_suite(suite, ForcedChoiceSuite).foundations
    for name in trait.intended:
        if name not in known:
            advice = f"take some of {', '.join(known)}"
            what = f"no foundation of suite {suite!r}"
            yield Finding(level="fault", where=f"intended.{name}", what=what, advice=advice)


def _headroom(room: Headroom, model: str) -> Iterator[Finding]:
    if room.span_nats < _LEAST_SPAN_NATS:
        yield Finding(
            level="fault",
            where="positive and negative",
            what=f"hardly move {model}: their replies are {room.span_nats:+.3f} nats a token apart",
            advice="take personas that differ more in what they do, or another model",
        )
    elif room.share >= _SATURATED_SHARE:
        yield Finding(
            level="fault",
            where="positive",
            what=f"{model} has it already: without a persona {room.share:.0%} of the way from the "
            f"negative to the positive one, {room.gap_nats.estimate:+.3f} nats a token left",
            advice="take prompts that divide it, or the opposite trait",
        )


def _rows(trait: Trait, field: str) -> list[tuple[str, str]]:
    """(where, text) of a field that is a text or a list of them."""
    value = getattr(trait, field)
    if isinstance(value, str):
        return [(field, value)]
    return [(f"{field} {row}", text) for row, text in enumerate(value, start=1)]


def _nearest(
    texts: Sequence[str], others: Sequence[str], is_same_list: bool = False
) -> list[tuple[float, int]]:
    """(overlap, row) of the most alike of the others; in the same list, of the earlier ones."""
    grams = [_trigrams(text) for text in texts]
    theirs = [_trigrams(text) for text in others]
    return [
        max(
            (
                (len(own & other) / len(own | other), at)
                for at, other in enumerate(theirs[:row] if is_same_list else theirs)
            ),
            default=(0.0, -1),
        )
        for row, own in enumerate(grams)
    ]


def _trigrams(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"[\w'’]+", text.lower())
    return frozenset(zip(*(words[start:] for start in range(3)), strict=False)) or frozenset(
        [tuple(words)]
    )
