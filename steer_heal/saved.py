"""A run read back from its files, and what each of its conditions came to. No model is needed.

Of a condition, with replies r to held-out prompts:

    enacted       share of r that act the trait; interval over prompts
    shift         <foundation>_nats - base's, paired by vignette; interval over vignettes
    length        words of r over words of base's, paired by prompt; interval over prompts
    neutral       perplexity of fixed neutral dialogues over base's, paired; interval over them
    trait shift   mean over the intended foundations of sign * shift, nats; where a trait names
                  none, the difference of enacted from base's
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from eval.coherence import TextFigures, text_figures
from eval.errors import UserError
from eval.figures import flip_rate, selectivity
from eval.statistics import (
    Interval,
    common_items,
    mean_interval,
    mean_pmass,
    perplexity_ratio,
    profile_nats,
    rank_correlation,
    ratio_interval,
    shift_nats,
)
from steer_heal.artifacts import (
    ConditionEval,
    Controls,
    Doses,
    Limits,
    ReplyRow,
    RoundAdapter,
    RoundEval,
    Screened,
    SteeringVector,
    TrainStep,
    Unbarred,
)
from steer_heal.rounds import RUN_FILE, Run, read_run
from steer_heal.trait import Trait


class Description(BaseModel):
    """What run.json says."""

    config: dict[str, Any]
    model: str  # hash of the weights
    version: str
    code: str  # hash of the source
    python: str
    libraries: dict[str, str]
    trait: Trait  # as it was when the run was begun
    suites: str  # hash of the items it is evaluated on


@dataclass(frozen=True, kw_only=True)
class BegunRound:
    """The files of a round, as far as it went; None: that stage has not been run."""

    number: int  # from 1
    folder: str
    vector: SteeringVector | None
    doses: Doses | None
    screened: Screened | None
    steps: tuple[TrainStep, ...] | None


@dataclass(frozen=True, kw_only=True)
class SavedRound(BegunRound):
    """The files of a finished round."""

    vector: SteeringVector
    doses: Doses
    screened: Screened
    steps: tuple[TrainStep, ...]
    evaluation: RoundEval


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """The files of a run."""

    path: Path
    description: Description
    trait: Trait
    limits: Limits
    controls: Controls
    unbarred: Unbarred | None  # None: it was not asked for
    rounds: tuple[SavedRound, ...]  # the finished ones


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure of single replies."""

    median: float
    p90: float


@dataclass(frozen=True, kw_only=True)
class CoherenceFigures:
    """How whole the text of one condition is."""

    perplexity: Spread  # of a reply under base: exp of its mean surprisal
    rmse_nats: Spread  # root mean square of a reply's surprisals under base
    repetition: float  # mean over replies of TextFigures.word_repetition, 0 to 1
    length_ratio: Interval  # mean words of a reply over base's; 1: as long
    neutral_ratio: Interval | None  # perplexity of neutral text over base's; None: not finite
    second_enacted: Interval  # share of the second replies that act the trait, 0 to 1
    second_tail_nats: Spread  # surprisal under base of their last quarter, a token


@dataclass(frozen=True, kw_only=True)
class ConditionFigures:
    """What one condition came to."""

    label: str
    dose: float | None  # multiples of the raw vector
    kl_nats: float | None  # mean KL(steered || student) a token
    enacted: Interval  # share of replies, 0 to 1
    nats: dict[str, float]  # foundation -> log of its mean probability
    shifts: dict[str, Interval]  # foundation -> difference of nats from base
    trait_shift: float
    selectivity: Interval | None  # nats; None where the trait names no foundation
    flip_rate: Interval | None  # -1 to 1, share of vignettes whose answer moved as intended
    others_shift_nats: float  # mean |shift| of the foundations that are not intended
    unscorable: int  # vignettes left out: their log-probabilities are not finite
    pmass: float  # 0 to 1
    pmass_share: float  # of base's
    tail_median_nats: float  # over replies, a token
    tail_p90_nats: float
    coherence: CoherenceFigures
    mundane: float  # share of tasks right, 0 to 1


def read_description(path: Path) -> Description:
    """What a run is of.

    Raises:
        UserError: no run.
    """
    try:
        return Description.model_validate(read_run(path))
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path / RUN_FILE} does not describe a run: {field}") from error


def read_saved_run(path: Path) -> SavedRun:
    """Reads a run's files, checked against their recorded hashes; at least one round is there.

    Raises:
        UserError: no run, no finished round yet, a file that is not what was written.
    """
    description = read_description(path)
    run = Run(path, description.config["seed"])
    if not run.done_rounds():
        raise UserError(f"{path}: no round is finished yet, so there is nothing to show")
    return gather(run, description)


def gather(run: Run, description: Description) -> SavedRun:
    """The files of a run whose controls are there, and of those of its rounds that are finished.

    Raises:
        UserError: a file that is not what was written.
    """
    rounds = [
        SavedRound(
            number=number,
            folder=round.path.name,
            vector=round.read(SteeringVector),
            doses=round.read(Doses),
            screened=round.read(Screened),
            steps=round.read(RoundAdapter).steps,
            evaluation=round.read(RoundEval),
        )
        for number, round in enumerate(run.done_rounds(), start=1)
    ]
    return SavedRun(
        path=run.path,
        description=description,
        trait=description.trait,
        limits=run.read(Limits),
        controls=run.read(Controls),
        unbarred=run.read(Unbarred) if run.has(Unbarred) else None,
        rounds=tuple(rounds),
    )


def early(steps: tuple[TrainStep, ...]) -> tuple[TrainStep, ...]:
    """The first quarter of the training steps: single ones are noisy."""
    return steps[: max(1, len(steps) // 4)]


def late(steps: tuple[TrainStep, ...]) -> tuple[TrainStep, ...]:
    """The last quarter of the training steps."""
    return steps[-max(1, len(steps) // 4) :]


def share_fired(steps: tuple[TrainStep, ...]) -> float:
    """Share of the training steps with the barrier on, 0 to 1."""
    return sum(step.share_over > 0 for step in steps) / len(steps)


def trait_shift(rows: ConditionEval, base: ConditionEval, trait: Trait) -> float:
    """The mean over the intended foundations of sign * shift, nats.

    Where the trait names none: the share of replies that act it, less base's, -1 to 1.
    """
    if not trait.intended:
        shares = [np.mean([reply.enacted for reply in each.replies]) for each in (rows, base)]
        return float(shares[0] - shares[1])
    after, before = (profile_nats(each) for each in common_items(rows.choices, base.choices))
    signs = trait.intended.items()
    return float(np.mean([sign * (after[name] - before[name]) for name, sign in signs]))


def condition_figures(
    label: str, rows: ConditionEval, base: ConditionEval, trait: Trait
) -> ConditionFigures:
    """The numbers of one condition, against those of base."""
    enacted = mean_interval(prompt_means(rows.replies, lambda reply: reply.enacted))
    after, before = common_items(rows.choices, base.choices)
    shifts = shift_nats(after, before)
    others = [abs(shift.estimate) for name, shift in shifts.items() if name not in trait.intended]
    tails = [reply.surprisal.tail_nll_nats for reply in rows.replies]
    return ConditionFigures(
        label=label,
        dose=rows.dose,
        kl_nats=rows.kl_nats,
        enacted=enacted,
        nats=profile_nats(rows.choices),
        shifts=shifts,
        trait_shift=trait_shift(rows, base, trait),
        selectivity=selectivity(after, before, trait.intended) if trait.intended else None,
        flip_rate=flip_rate(after, before, trait.intended) if trait.intended else None,
        others_shift_nats=float(np.mean(others)) if others else 0.0,
        unscorable=len(rows.unscorable),
        pmass=mean_pmass(rows.choices),
        pmass_share=mean_pmass(rows.choices) / mean_pmass(base.choices),
        tail_median_nats=float(np.median(tails)),
        tail_p90_nats=float(np.quantile(tails, 0.9)),
        coherence=_coherence(rows, base),
        mundane=float(np.mean([task.right for task in rows.tasks])),
    )


def _coherence(rows: ConditionEval, base: ConditionEval) -> CoherenceFigures:
    first = [reply.surprisal for reply in rows.replies]
    second = rows.second_replies
    repeated = [_text_figures(reply.text).word_repetition for reply in rows.replies]
    return CoherenceFigures(
        perplexity=_spread([math.exp(each.mean_nll_nats) for each in first]),
        rmse_nats=_spread([each.rmse_nll_nats for each in first]),
        repetition=float(np.mean(repeated)),
        length_ratio=ratio_interval(
            prompt_means(rows.replies, _words), prompt_means(base.replies, _words)
        ),
        neutral_ratio=perplexity_ratio(rows.neutral, base.neutral),
        second_enacted=mean_interval([float(reply.enacted) for reply in second]),
        second_tail_nats=_spread([reply.surprisal.tail_nll_nats for reply in second]),
    )


def length_correlation(replies: Sequence[ReplyRow]) -> Interval | None:
    """Spearman's correlation of a reply's words with its enactment, nats a token: -1 to 1.

    Positive: longer replies carry more of the trait. Replies to one prompt are drawn together. None
    where one of the two never varies.
    """
    return rank_correlation(
        [_words(reply) for reply in replies],
        [enactment_nats(reply) for reply in replies],
        [str(reply.prompt_index) for reply in replies],
    )


def enactment_nats(reply: ReplyRow) -> float:
    """The enactment of one of base's replies, nats a token; others may have none."""
    assert reply.enactment_nats is not None
    return reply.enactment_nats


def _words(reply: ReplyRow) -> float:
    return float(_text_figures(reply.text).words)


@lru_cache(maxsize=65536)  # a reply is looked at for several figures, base's by every condition
def _text_figures(text: str) -> TextFigures:
    return text_figures(text)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=float(np.median(values)), p90=float(np.quantile(values, 0.9)))


def prompt_means(replies: Sequence[ReplyRow], value: Callable[[ReplyRow], float]) -> list[float]:
    """Mean over the samples of each prompt: replies to one prompt are not independent."""
    by_prompt: dict[int, list[float]] = {}
    for reply in replies:
        by_prompt.setdefault(reply.prompt_index, []).append(value(reply))
    return [float(np.mean(values)) for _, values in sorted(by_prompt.items())]
