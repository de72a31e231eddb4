"""What a run came to: every number of the page from the saved rows. Loads no model.

Beside the figures of the conditions (saved.py):

    retention     trait shift healed / trait shift steered: near 1 healed, near 0 undone
    coherent      passes the gate (gate.py)
    best round    the largest trait shift among the coherent rounds, the first of equal ones
    cosine        of a round's vector with the first round's, their steered layers put end to end

Rounds are counted from 1 here, round 0 being the base; the folder of round 1 is round-00.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.nn.functional import cosine_similarity

from eval.figures import seed_interval
from eval.statistics import Interval, mean_interval
from steer_heal.artifacts import SteeringVector
from steer_heal.gate import TAIL_GATE, is_coherent
from steer_heal.saved import (
    ConditionFigures,
    SavedRound,
    SavedRun,
    condition_figures,
    enactment_nats,
    length_correlation,
    prompt_means,
)

UNBARRED = "round 1, no barrier"


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """What one round came to."""

    number: int  # from 1
    saved: SavedRound
    steered: ConditionFigures
    healed: ConditionFigures
    retention: float | None  # None: steering moved nothing, or the wrong way
    is_coherent: bool
    vector_cosine: float  # with round 1's vector, over the steered layers, -1 to 1

    @property
    def kept_enactment_nats(self) -> float:
        """Enactment of the kept completions, on average, nats a token."""
        return float(np.mean([row.enactment_nats for row in self.saved.screened.kept]))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that the page says in numbers."""

    run: SavedRun
    base: ConditionFigures
    prompted: ConditionFigures
    engineered: ConditionFigures
    random: tuple[ConditionFigures, ...]
    unbarred: ConditionFigures | None  # None: it was not asked for
    rounds: tuple[RoundFigures, ...]  # the finished ones
    tail_low_nats: float  # 5th percentile of the base's own completions
    tail_high_nats: float  # 95th
    second_tail_high_nats: float  # 95th percentile of base's second replies
    base_enactment_nats: Interval  # of base's replies, a token
    length_correlation: Interval | None  # of base's replies with their enactment, -1 to 1

    @property
    def intended(self) -> list[str]:
        """Foundations that the trait is meant to move, those meant to rise first."""
        signs = self.run.trait.intended
        return sorted(signs, key=lambda name: (-signs[name], name))

    @property
    def foundations(self) -> list[str]:
        """All that the probe asks about: the intended ones, then the others by name."""
        return [*self.intended, *sorted(set(self.base.nats) - set(self.intended))]

    @property
    def random_shifts(self) -> dict[str, Interval]:
        """Foundation -> mean shift of the random directions, its interval over directions, nats.

        What a push of the vector's size does wherever it points. One direction's own interval is
        over vignettes: it says how surely *this* direction moves them, and hardly ever holds 0.
        Empty with a single direction.
        """
        if len(self.random) < 2:
            return {}
        return {
            name: seed_interval([each.shifts[name].estimate for each in self.random])
            for name in self.foundations
        }

    @property
    def best(self) -> RoundFigures | None:
        """The round with the largest trait shift among the coherent ones."""
        shifts = [each.healed.trait_shift if each.is_coherent else None for each in self.rounds]
        number = best_round(shifts)
        return None if number is None else self.rounds[number - 1]

    @property
    def rounds_without_gain(self) -> int:
        """Rounds after the best one; after the first while none is coherent."""
        return without_gain(len(self.rounds), self.best.number if self.best else None)


def best_round(shifts: Sequence[float | None]) -> int | None:
    """The number of the round with the largest trait shift, from 1; None where there is none.

    Args:
        shifts: a round each; None: it is not coherent.
    """
    coherent = {n: shift for n, shift in enumerate(shifts, start=1) if shift is not None}
    return max(coherent, key=lambda number: coherent[number], default=None)


def without_gain(num_rounds: int, best: int | None) -> int:
    """Rounds after the best one; after the first while none is coherent."""
    return num_rounds - (best or 1)


def summarise(run: SavedRun) -> Summary:
    """Computes every number of the page from the saved rows."""
    controls, base, trait = run.controls, run.controls.base, run.trait
    low, high = np.quantile(run.limits.base_tail_nll_nats, [0.05, TAIL_GATE])
    rounds = []
    for number, saved in enumerate(run.rounds, start=1):
        rows = saved.evaluation
        steered = condition_figures(f"round {number}, steered", rows.steered, base, trait)
        healed = condition_figures(f"round {number}, healed", rows.healed, base, trait)
        moved = steered.trait_shift
        rounds.append(
            RoundFigures(
                number=number,
                saved=saved,
                steered=steered,
                healed=healed,
                retention=healed.trait_shift / moved if moved > 0 else None,
                is_coherent=is_coherent(rows.healed, controls.base, run.limits),
                vector_cosine=_cosine(saved.vector, run.rounds[0].vector),
            )
        )
    return Summary(
        run=run,
        base=condition_figures("base", base, base, trait),
        prompted=condition_figures("persona prompt", controls.prompted, base, trait),
        engineered=condition_figures("longer prompt", controls.engineered, base, trait),
        random=tuple(
            condition_figures(f"random direction {number}", each, base, trait)
            for number, each in enumerate(controls.random, start=1)
        ),
        unbarred=condition_figures(UNBARRED, run.unbarred.healed, base, trait)
        if run.unbarred
        else None,
        rounds=tuple(rounds),
        tail_low_nats=float(low),
        tail_high_nats=float(high),
        second_tail_high_nats=float(
            np.quantile([reply.surprisal.tail_nll_nats for reply in base.second_replies], 0.95)
        ),
        base_enactment_nats=mean_interval(prompt_means(base.replies, enactment_nats)),
        length_correlation=length_correlation(base.replies),
    )


def _cosine(vector: SteeringVector, other: SteeringVector) -> float:
    one, two = (each.band_directions.double().flatten() for each in (vector, other))
    return float(cosine_similarity(one, two, dim=0))
