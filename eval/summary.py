"""What an evaluation came to, as figures and as text; and the difference of two of them.

Every figure is computed from the rows; a foundation's line says how often it is named, how far that
is from people where their answers are known, and how many of its own items are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from eval.figures import (
    FittedTemperature,
    SoftCrossEntropy,
    fitted_temperature,
    flip_rate,
    informedness,
    perspective_gap_nats,
    selectivity,
    soft_cross_entropy_nats,
)
from eval.rows import ForcedChoiceResult, ForcedChoiceRow
from eval.statistics import (
    Interval,
    accuracy,
    choice_probabilities,
    common_items,
    mean_interval,
    mean_pmass,
    profile_nats,
    shift_nats,
)


class Summary(BaseModel):
    """The figures of one evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_items: int
    unscorable: tuple[str, ...]  # keys of items that have no row
    pmass: float  # mean probability on the allowed answers, 0 to 1
    prefill_nll_nats: float  # a token of the prefill, mean over items
    natural: int  # answers that were read inside a think
    profile: dict[str, float]  # foundation -> mean probability, 0 to 1
    nats: dict[str, float]  # foundation -> log of it
    found: dict[str, float]  # foundation -> share of its items whose likeliest option it is
    informedness: Interval | None  # -1 to 1; None with fewer than two foundations among the labels
    soft_cross_entropy: SoftCrossEntropy | None  # None without human labels
    temperature: FittedTemperature | None  # the one that is nearest to people
    perspective_gap_nats: dict[str, Interval] | None  # self less other; None with one perspective


def summarise(result: ForcedChoiceResult) -> Summary:
    """The figures of a result."""
    rows = result.rows
    labels = {row.label for row in rows} - {None}
    has_people = any(row.human is not None for row in rows)
    pairs = _perspective_pairs(rows)
    names = list(rows[0].scores)
    return Summary(
        num_items=len(rows) + len(result.unscorable),
        unscorable=result.unscorable,
        pmass=mean_pmass(rows),
        prefill_nll_nats=float(np.mean([row.prefill_nll_nats for row in rows])),
        natural=sum(row.natural for row in rows),
        profile=dict(zip(names, choice_probabilities(rows).mean(0).tolist(), strict=True)),
        nats=profile_nats(rows),
        found={name: accuracy(rows, [name]) for name in names if name in labels},
        informedness=informedness(rows) if len(labels) > 1 else None,
        soft_cross_entropy=soft_cross_entropy_nats(rows) if has_people else None,
        temperature=fitted_temperature(rows) if has_people else None,
        perspective_gap_nats=perspective_gap_nats(pairs) if pairs else None,
    )


def format_summary(summary: Summary) -> str:
    """The figures as text, a line a foundation and a line a figure."""
    gap = summary.perspective_gap_nats
    lines = [
        f"{'':14}{'p':>7}{'nats':>8}{'found':>8}"
        + (f"{'self less other, nats':>28}" if gap else "")
    ]
    for name, p in summary.profile.items():
        found = f"{summary.found[name]:>8.2f}" if name in summary.found else f"{'':8}"
        apart = f"{interval_text(gap[name]):>28}" if gap else ""
        lines.append(f"{name:14}{p:>7.3f}{fixed(summary.nats[name], 2):>8}{found}{apart}")
    lines.append(f"pmass {summary.pmass:.4f}")
    lines.append(f"prefill {summary.prefill_nll_nats:.4f} nats a token")
    if summary.informedness is not None:
        lines.append(f"informedness {interval_text(summary.informedness)} (chance 0, all found 1)")
    people, fitted = summary.soft_cross_entropy, summary.temperature
    if people is not None and fitted is not None:
        bound = ", the end of the range" if fitted.at_bound else ""
        lines.append(
            f"cross-entropy to people's answers {interval_text(people.nats)} nats; "
            f"{fitted.nats:.3f} at temperature {fitted.temperature:.2f}{bound}; a "
            f"perfect match {people.floor_nats:.3f}"
        )
    if summary.natural:
        lines.append(f"{summary.natural} answers were read inside the think")
    return "\n".join([*lines, count_text(summary.num_items, summary.unscorable)])


def format_difference(
    after: Sequence[ForcedChoiceRow],
    before: Sequence[ForcedChoiceRow],
    intended: Mapping[str, int] | None = None,
) -> str:
    """Paired differences as text: shifts, pmass, and selectivity where a direction is intended.

    Args:
        intended: foundation -> 1 (more is meant) or -1; those that the suite has not are left out.
    """
    rows, base = common_items(after, before)
    intervals = {f"{name}_nats": shift for name, shift in shift_nats(rows, base).items()}
    intervals["pmass"] = mean_interval(
        [row.pmass - old.pmass for row, old in zip(rows, base, strict=True)],
        ids=[row.id for row in rows],
    )
    intended = {name: sign for name, sign in (intended or {}).items() if name in rows[0].scores}
    if intended:
        intervals["flip rate"] = flip_rate(rows, base, intended)
        intervals["selectivity"] = selectivity(rows, base, intended)
    return differences_text(intervals)


def differences_text(intervals: Mapping[str, Interval]) -> str:
    """Paired differences, a line each; where an interval has 0 in it, that is said."""
    width = max(map(len, intervals))
    lines = []
    for name, interval in intervals.items():
        lines.append(f"{name:{width}}  {interval_text(interval)}  {doubt_text(interval)}".rstrip())
    return "\n".join(lines)


def doubt_text(interval: Interval) -> str:
    """Why a difference is none, or hardly one; nothing where it is one."""
    if not interval.excludes_zero:
        return "no difference shown"
    return "a difference, but below 0.0005" if abs(interval.estimate) < 0.0005 else ""


def interval_text(interval: Interval) -> str:
    """An estimate with its bounds: `+0.123 [+0.045, +0.201]`."""
    estimate, low, high = (
        fixed(value, 3, sign=True) for value in (interval.estimate, interval.low, interval.high)
    )
    return f"{estimate} [{low}, {high}]"


def fixed(value: float, digits: int, sign: bool = False) -> str:
    """A number with so many digits after its point, with a sign or not; 0 is never negative."""
    rounded = round(value, digits) + 0.0  # + 0.0: no minus before a zero
    return f"{rounded:+.{digits}f}" if sign else f"{rounded:.{digits}f}"


def count_text(num_items: int, unscorable: Sequence[str]) -> str:
    """How many items there are, and which of them have no row."""
    if not unscorable:
        return f"{num_items} items"
    return f"{num_items} items, {len(unscorable)} of them unscorable: {', '.join(unscorable)}"


def _perspective_pairs(rows: Sequence[ForcedChoiceRow]) -> list[ForcedChoiceRow]:
    """Rows of the items that were scored in both perspectives."""
    sides = [{row.id for row in rows if row.perspective == side} for side in ("self", "other")]
    return [row for row in rows if row.id in sides[0] & sides[1]]
