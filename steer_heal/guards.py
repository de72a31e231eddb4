"""Guards: what to be warned of in a round, by name, from the figures of a run.

    coherence gate failed       the round is not coherent, as summary.py says
    undone                      retention < 0.3
    steering moved nothing      no trait shift in the wanted direction when steered
    kept set base-like          mean enactment of the kept completions <= the upper end of the 95 %
                                interval of that of base's own unsteered replies
    direction wandered          cosine of the vector with round 1's, over the steered layers, < 0.5
    mundane tasks lost          right in less than base's share - 0.01
    second replies drift off    their median tail surprisal > 95 % of base's own second replies
    length confound             words over base's are off 1 by more than a tenth and than chance
    barrier never fired         no training step has a completion over the threshold
    barrier always on           in the last quarter of the steps at least 95 % of them are over it

All is computed again from saved files; what is said here is said in the log and on the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.summary import fixed
from steer_heal.gate import PMASS_GATE
from steer_heal.saved import late, share_fired
from steer_heal.summary import RoundFigures, Summary
from steer_heal.wording import bounds, nats, percent, plain_bounds

RETENTION_GATE = 0.3  # below: undone
_COSINE_GATE = 0.5
_MUNDANE_DROP = 0.01  # a larger one is a loss; share of the tasks
_LENGTH_GATE = 0.1  # prompts alone move it by 1 to 4 %
_ALWAYS_SHARE = 0.95  # the embedded model's first round, where the barrier works: 0.4 to 0.5


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A guard that went off in a round."""

    name: str  # of the guard
    round: int  # from 1
    what: str  # what it means: the same in every round
    figure: str  # how much, in this round
    advice: str  # what to try

    def __str__(self) -> str:
        return f"round {self.round}: {self.name}: {self.what} ({self.figure}); {self.advice}"


def alarms(summary: Summary) -> list[Alarm]:
    """Everything to be warned of: the gravest guard first, each down the rounds."""
    return [
        Alarm(
            name=guard.name,
            round=round.number,
            what=guard.what,
            figure=figure,
            advice=guard.advice,
        )
        for guard in _GUARDS
        for round in summary.rounds
        if (figure := guard.trips(summary, round)) is not None
    ]


@dataclass(frozen=True, kw_only=True)
class _Guard:
    name: str
    trips: Callable[[Summary, RoundFigures], str | None]  # how much, where something is wrong
    what: str
    advice: str


def _incoherent(summary: Summary, round: RoundFigures) -> str | None:
    if round.is_coherent:
        return None
    healed, causes = round.healed, []
    if healed.pmass_share < PMASS_GATE:
        causes.append(f"pmass {fixed(healed.pmass_share, 3)} of base's, below {PMASS_GATE}")
    if healed.unscorable:
        causes.append(f"{healed.unscorable} vignettes cannot be scored, as the model overflows")
    if healed.tail_median_nats > summary.tail_high_nats:
        causes.append(
            f"replies drift off: median tail surprisal {nats(healed.tail_median_nats, False)} nats "
            f"a token, above 95 % of base's own ({nats(summary.tail_high_nats, False)})"
        )
    return ", ".join(causes)


def _undone(summary: Summary, round: RoundFigures) -> str | None:
    kept = round.retention
    return nats(kept, False) if kept is not None and kept < RETENTION_GATE else None


def _unmoved(summary: Summary, round: RoundFigures) -> str | None:
    return f"shift {nats(round.steered.trait_shift)}" if round.retention is None else None


def _base_like(summary: Summary, round: RoundFigures) -> str | None:
    kept, base = round.kept_enactment_nats, summary.base_enactment_nats
    if kept > base.high:
        return None
    return f"{nats(kept)} nats a token, base's {nats(base.estimate)} {bounds(base)}"


def _wandered(summary: Summary, round: RoundFigures) -> str | None:
    return nats(round.vector_cosine) if round.vector_cosine < _COSINE_GATE else None


def _duller(summary: Summary, round: RoundFigures) -> str | None:
    right, base = round.healed.mundane, summary.base.mundane
    is_loss = right < base - _MUNDANE_DROP - 1e-9  # one point itself is none
    return f"{percent(right)} right, where base has {percent(base)}" if is_loss else None


def _late(summary: Summary, round: RoundFigures) -> str | None:
    median, high = round.healed.coherence.second_tail_nats.median, summary.second_tail_high_nats
    if median <= high:
        return None
    return f"median tail surprisal {nats(median, False)} nats a token over {nats(high, False)}"


def _stretched(summary: Summary, round: RoundFigures) -> str | None:
    ratio = round.healed.coherence.length_ratio
    if abs(ratio.estimate - 1) <= _LENGTH_GATE or ratio.low <= 1 <= ratio.high:
        return None
    return f"{fixed(ratio.estimate, 2)} {plain_bounds(ratio)} times the words"


def _silent(summary: Summary, round: RoundFigures) -> str | None:
    if share_fired(round.saved.steps) > 0:
        return None
    highest = max(step.kl_nats for step in round.saved.steps)
    off = ", and its weight is 0" if _heal(summary)["barrier_weight"] == 0 else ""
    dose = fixed(round.saved.screened.mean_kept_dose, 2)
    return f"highest step {fixed(highest, 3)} nats, threshold {_threshold(round)}, dose {dose}{off}"


def _always_on(summary: Summary, round: RoundFigures) -> str | None:
    steps = late(round.saved.steps)
    share = sum(step.share_over for step in steps) / len(steps)
    if share < _ALWAYS_SHARE or _heal(summary)["barrier_weight"] == 0:
        return None
    lowest = min(step.kl_nats for step in steps)
    return f"{percent(share)}; lowest step {fixed(lowest, 3)} nats, threshold {_threshold(round)}"


def _threshold(round: RoundFigures) -> str:
    return f"{round.saved.steps[0].threshold_nats:.3g}"


def _heal(summary: Summary) -> dict[str, Any]:
    return summary.run.description.config["heal"]


_GUARDS = (
    _Guard(
        name="coherence gate failed",
        trips=_incoherent,
        what="after healing the model is not as coherent as base, so the round cannot be the best",
        advice="try smaller generate.doses, a lower heal.learning_rate or more heal.barrier_weight",
    ),
    _Guard(
        name="undone",
        trips=_undone,
        what=f"retention is below {RETENTION_GATE}, the adapter kept little of what steering moved",
        advice="try more heal.epochs, a higher heal.learning_rate or less heal.barrier_weight",
    ),
    _Guard(
        name="steering moved nothing",
        trips=_unmoved,
        what="steering shows no shift in the wanted direction, so retention says nothing",
        advice="try larger generate.doses, or personas that are more opposite",
    ),
    _Guard(
        name="kept set base-like",
        trips=_base_like,
        what="the kept completions enact the trait no more than base's own replies do",
        advice="try larger generate.doses or a higher filter.min_enactment_nats",
    ),
    _Guard(
        name="direction wandered",
        trips=_wandered,
        what=f"cosine of the vector with round 1's below {_COSINE_GATE}: it steers elsewhere",
        advice="try more vector.num_contexts, or fewer rounds",
    ),
    _Guard(
        name="mundane tasks lost",
        trips=_duller,
        what="the rounds cost small tasks that the trait must not touch",
        advice="try smaller generate.doses, a lower heal.learning_rate or more heal.barrier_weight",
    ),
    _Guard(
        name="second replies drift off",
        trips=_late,
        what="after a second user turn they surprise base more than 95 % of its own",
        advice="try smaller generate.doses, a lower heal.learning_rate or more heal.barrier_weight",
    ),
    _Guard(
        name="length confound",
        trips=_stretched,
        what="replies are longer or shorter than base's, which may be part of what moved",
        advice="see under the coherence table how length and enactment go together in base's own "
        "replies, and take personas that are alike in length",
    ),
    _Guard(
        name="barrier never fired",
        trips=_silent,
        what="no training step had a completion over the threshold, so it shaped nothing",
        advice="where the doses were walked down to nearly 0 there is nothing to bar; else a lower "
        "heal.barrier_threshold_nats, or auto, would bring it in",
    ),
    _Guard(
        name="barrier always on",
        trips=_always_on,
        what="late in training nearly all completions were over the threshold, so it held back "
        "the trait as well",
        advice="a higher heal.barrier_threshold_nats would leave room",
    ),
)
