"""Figures over the rows of a yes/no suite, their differences, and both as text.

With `r` an item's log-ratio of yes to no and `sign` its label:

    signed_log_ratio_nats   mean of sign * r over the labelled items; above 0: answers as labelled
    yes_bias_nats           mean of r over all items; above 0: says yes whatever is asked
    agreement               share of the labelled items answered as labelled, a tie counting half
    mean_mass               mean of p(yes) + p(no)

Where as many items are labelled 1 as -1, a plain liking for yes drops out of the first, and
answering as labelled out of the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from eval.rows import YesNoResult, YesNoRow
from eval.statistics import Interval, common_items, mean_interval, require_same_items
from eval.summary import count_text, differences_text, interval_text


class YesNoSummary(BaseModel):
    """The figures of one evaluation of a yes/no suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_items: int
    unscorable: tuple[str, ...]  # ids of items that have no row
    mass: float  # mean probability of yes or no, 0 to 1
    yes_bias_nats: Interval  # above 0: rather yes, whatever is asked
    signed_log_ratio_nats: Interval | None  # above 0: as labelled; None without labels
    agreement: float | None  # share answered as labelled, 0 to 1; None without labels


def signed_log_ratio_nats(rows: Sequence[YesNoRow]) -> Interval:
    """Mean of label times log-ratio over the labelled items, nats; above 0: as labelled."""
    return mean_interval(_signed(rows).tolist())


def yes_bias_nats(rows: Sequence[YesNoRow]) -> Interval:
    """Mean log-ratio over all items, nats; above 0: rather yes, whatever is asked."""
    return mean_interval([row.log_ratio_nats for row in rows])


def mean_mass(rows: Sequence[YesNoRow]) -> float:
    """Mean probability of yes or no, 0 to 1."""
    return float(np.mean([row.mass for row in rows]))


def agreement(rows: Sequence[YesNoRow]) -> float:
    """Share of the labelled items answered as labelled, 0 to 1; a tie counts half."""
    return float((np.sign(_signed(rows)).mean() + 1) / 2)


def signed_log_ratio_shift_nats(rows: Sequence[YesNoRow], base: Sequence[YesNoRow]) -> Interval:
    """`signed_log_ratio_nats` less that of base on the same items; above 0: more as labelled."""
    _require_same(rows, base)
    return mean_interval((_signed(rows) - _signed(base)).tolist())


def yes_bias_shift_nats(rows: Sequence[YesNoRow], base: Sequence[YesNoRow]) -> Interval:
    """`yes_bias_nats` less that of base on the same items; above 0: says yes more readily."""
    _require_same(rows, base)
    pairs = zip(rows, base, strict=True)
    return mean_interval([row.log_ratio_nats - old.log_ratio_nats for row, old in pairs])


def summarise_yes_no(result: YesNoResult) -> YesNoSummary:
    """The figures of a result."""
    rows = result.rows
    labelled = any(row.label is not None for row in rows)
    return YesNoSummary(
        num_items=len(rows) + len(result.unscorable),
        unscorable=result.unscorable,
        mass=mean_mass(rows),
        yes_bias_nats=yes_bias_nats(rows),
        signed_log_ratio_nats=signed_log_ratio_nats(rows) if labelled else None,
        agreement=agreement(rows) if labelled else None,
    )


def format_yes_no_summary(summary: YesNoSummary) -> str:
    """The figures as text, a line each."""
    lines = []
    if summary.signed_log_ratio_nats is not None and summary.agreement is not None:
        lines += [
            f"signed log-ratio {interval_text(summary.signed_log_ratio_nats)} nats (above 0: as "
            "labelled)",
            f"agreement {summary.agreement:.3f} (all as labelled 1)",
        ]
    lines += [
        f"yes bias {interval_text(summary.yes_bias_nats)} nats (above 0: rather yes, whatever is "
        "asked)",
        f"mass {summary.mass:.4f} (probability of yes or no)",
        count_text(summary.num_items, summary.unscorable),
    ]
    return "\n".join(lines)


def format_yes_no_difference(after: Sequence[YesNoRow], before: Sequence[YesNoRow]) -> str:
    """Paired differences as text, over the items that both have."""
    rows, base = common_items(after, before)
    intervals = {}
    if any(row.label is not None for row in rows):
        intervals["signed log-ratio, nats"] = signed_log_ratio_shift_nats(rows, base)
    intervals["yes bias, nats"] = yes_bias_shift_nats(rows, base)
    pairs = zip(rows, base, strict=True)
    intervals["mass"] = mean_interval([row.mass - old.mass for row, old in pairs])
    return differences_text(intervals)


def _signed(rows: Sequence[YesNoRow]) -> np.ndarray:
    """Label times log-ratio of every labelled item: [labelled items]."""
    signed = [row.log_ratio_nats * row.label for row in rows if row.label is not None]
    if not signed:
        raise ValueError(f"none of {len(rows)} items has a label")
    return np.array(signed)


def _require_same(rows: Sequence[YesNoRow], base: Sequence[YesNoRow]) -> None:
    require_same_items([row.key for row in rows], [row.key for row in base])
    for row, old in zip(rows, base, strict=True):
        if row.label != old.label:
            raise ValueError(f"item {row.id!r}: labelled {row.label} here and {old.label} there")
