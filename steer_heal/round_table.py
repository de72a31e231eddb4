"""What a run came to so far, as a table that fits the narrowest terminal: 40 columns.

enacted: share of held-out replies that act the trait; shift: the trait shift from base, nats
(points where the trait names no foundation); pmass: share of base's; tail: median surprisal of the
replies' ends, nats a token. A star marks the best round so far.
"""

from __future__ import annotations

from steer_heal.saved import ConditionFigures
from steer_heal.summary import Summary
from steer_heal.wording import aligned, nats, percent

LEGEND = "bare shifts and tails are nats, pmass is a share of base's, * the best"
_HEADS = ("", "enacted", "shift", "pmass", "tail")


def round_table(summary: Summary) -> list[str]:
    """A line for base and persona prompt, for each round healed, and for the last one steered."""
    last, best = summary.rounds[-1], summary.best
    rows = [("base", summary.base), ("prompt", summary.prompted)]
    rows += [(f"{each.number} healed", each.healed) for each in summary.rounds[:-1]]
    rows += [(f"{last.number} steered", last.steered), (f"{last.number} healed", last.healed)]
    named = [
        (f"{name} *" if best is not None and figures is best.healed else name, figures)
        for name, figures in rows
    ]
    cells = [_cells(name, figures, summary) for name, figures in named]
    return aligned([_HEADS, *cells], right=range(1, len(_HEADS)))


def _cells(name: str, figures: ConditionFigures, summary: Summary) -> tuple[str, ...]:
    moved = figures.trait_shift
    shift = nats(moved) if summary.run.trait.intended else f"{100 * moved:+.0f} pt"
    return (
        name,
        percent(figures.enacted.estimate),
        "" if figures is summary.base else shift,
        f"{figures.pmass_share:.3f}",
        f"{figures.tail_median_nats:.2f}",
    )
