"""drift.csv: every condition's figures with their intervals, a line each, for other programs.

condition,round,figure,estimate,low,high: round is empty for what is measured once; low and high are
empty where a figure has no interval. Units: shares 0 to 1, `_nats` in nats, in full precision.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from eval.statistics import Interval
from steer_heal.saved import ConditionFigures
from steer_heal.summary import Summary

COLUMNS = ("condition", "round", "figure", "estimate", "low", "high")
Figure = Interval | float | None


def drift_csv(report: Summary) -> str:
    """The table as text, the conditions in the page's order."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for condition, number, figures in _conditions(report):
        for name, value in _figures(figures).items():
            if isinstance(value, Interval):
                writer.writerow((condition, number, name, value.estimate, value.low, value.high))
            elif value is not None:
                writer.writerow((condition, number, name, value, "", ""))
    return buffer.getvalue()


def _conditions(report: Summary) -> Iterator[tuple[str, int | str, ConditionFigures]]:
    yield from (
        ("base", "", report.base),
        ("prompted", "", report.prompted),
        ("engineered", "", report.engineered),
    )
    for number, figures in enumerate(report.random, start=1):
        yield f"random {number}", "", figures
    if report.unbarred is not None:
        yield "unbarred", 1, report.unbarred
    for round in report.rounds:
        yield "steered", round.number, round.steered
        yield "healed", round.number, round.healed


def _figures(figures: ConditionFigures) -> dict[str, Figure]:
    return {
        "dose": figures.dose,
        "enacted": figures.enacted,
        **{f"{name}_shift_nats": shift for name, shift in figures.shifts.items()},
        "selectivity_nats": figures.selectivity,
        "flip_rate": figures.flip_rate,
        "pmass_of_base": figures.pmass_share,
        "tail_median_nats": figures.tail_median_nats,
        "tail_p90_nats": figures.tail_p90_nats,
        "length_ratio": figures.coherence.length_ratio,
        "mundane": figures.mundane,
    }
