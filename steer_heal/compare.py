"""Runs side by side: the last round of each, and its paired differences from the first run's.

Differences are other run - first run, paired by vignette, task, and prompt and sample. Selectivity
and flip rate are what moved from each run's own base; their differences draw the vignettes of all
four evaluations together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.errors import UserError
from eval.figures import (
    Pair,
    flip_rate,
    flip_rate_difference,
    selectivity,
    selectivity_difference,
)
from eval.statistics import (
    Interval,
    common_items,
    mean_interval,
    mean_pmass,
    profile_nats,
    shift_nats,
)
from eval.summary import differences_text, fixed
from steer_heal.artifacts import ConditionEval, ReplyRow
from steer_heal.saved import SavedRun, prompt_means, read_saved_run
from steer_heal.wording import aligned


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What runs came to, and by how much each of them differs from the first."""

    runs: tuple[SavedRun, ...]
    figures: tuple[dict[str, float], ...]  # a run each: name -> figure, after its last round
    differences: tuple[dict[str, Interval], ...]  # a run each but the first: name -> difference

    @property
    def names(self) -> list[str]:
        """The runs' folders, a name each."""
        return [run.path.resolve().name for run in self.runs]

    @property
    def text(self) -> str:
        """A table of the figures, and a block of the differences of each run from the first."""
        return "\n\n".join([_table(self), *_blocks(self)])


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Compares the last round of every run with that of the first.

    Raises:
        UserError: fewer than two runs, one given twice, no run, no finished round, different items.
    """
    if len(paths) < 2:
        raise UserError(f"comparing takes two runs or more, {len(paths)} given")
    for index, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:index]]:
            raise UserError(f"{path} is given twice: a run does not differ from itself")
    runs = tuple(read_saved_run(path) for path in paths)
    first, *others = runs
    for other in others:
        _require_comparable(first, other)
    return Comparison(
        runs=runs,
        figures=tuple(_figures(run, _intended(runs)) for run in runs),
        differences=tuple(_intervals(first, other) for other in others),
    )


def _require_comparable(first: SavedRun, other: SavedRun) -> None:
    """Raises UserError where two runs were not evaluated on the same items."""
    left, right = first.controls.base, other.controls.base
    items = {
        "vignettes": (_vignettes(left), _vignettes(right)),
        "options": (sorted(left.choices[0].scores), sorted(right.choices[0].scores)),
        "mundane tasks": ([row.id for row in left.tasks], [row.id for row in right.tasks]),
        "held-out prompts": (first.trait.held_out_prompts, other.trait.held_out_prompts),
        "samples to held-out prompts": (
            [(reply.prompt_index, reply.sample) for reply in left.replies],
            [(reply.prompt_index, reply.sample) for reply in right.replies],
        ),
    }
    differing = [
        f"their {name} differ ({len(ours)} and {len(theirs)})"
        for name, (ours, theirs) in items.items()
        if list(ours) != list(theirs)
    ]
    if first.description.suites != other.description.suites:
        differing.append("the texts of their suites differ")
    if differing:
        raise UserError(
            f"{first.path} and {other.path} were evaluated on different items and cannot be "
            f"compared: {'; '.join(differing)}"
        )


def _vignettes(rows: ConditionEval) -> list[str]:
    """Keys of all that were asked, scorable or not, sorted."""
    return sorted([*(row.key for row in rows.choices), *rows.unscorable])


def _table(comparison: Comparison) -> str:
    """A line a figure, a column a run."""
    columns = comparison.figures
    lines = [["after its last round, healed", *comparison.names]]
    lines.append(["rounds", *(str(len(run.rounds)) for run in comparison.runs)])
    lines += [[label, *(fixed(column[label], 3) for column in columns)] for label in columns[0]]
    return "\n".join(aligned(lines, right=range(1, len(lines[0]))))


def _blocks(comparison: Comparison) -> Iterator[str]:
    """The paired differences of each run from the first, a line a figure."""
    first, *others = comparison.runs
    first_name, *names = comparison.names
    for name, other, intervals in zip(names, others, comparison.differences, strict=True):
        lines = [f"{name} minus {first_name}, with 95 % bootstrap intervals over items"]
        lines.append(differences_text(intervals))
        if first.trait.intended != other.trait.intended:
            lines.append(
                "no selectivity, no flip rate: the traits mean to move different foundations"
            )
        yield "\n".join(lines)


def _intended(runs: Sequence[SavedRun]) -> dict[str, Any]:
    """What all the runs mean to move; nothing where they do not mean the same."""
    first, *others = (run.trait.intended for run in runs)
    return dict(first) if all(other == first for other in others) else {}


def _healed(run: SavedRun) -> ConditionEval:
    return run.rounds[-1].evaluation.healed


def _from_base(run: SavedRun) -> Pair:
    """Rows healed and of base, of the vignettes that both could score."""
    after, before = common_items(_healed(run).choices, run.controls.base.choices)
    return after, before


def _figures(run: SavedRun, intended: dict[str, Any]) -> dict[str, float]:
    """Name -> figure of a run, a line of the table each."""
    rows = _healed(run)
    nats = profile_nats(rows.choices)
    figures = {"enacted": _mean(rows.replies, lambda row: row.enacted)}
    figures |= {f"{name}_nats": nats[name] for name in sorted(nats)}
    if intended:
        figures["selectivity"] = selectivity(*_from_base(run), intended).estimate
        figures["flip rate"] = flip_rate(*_from_base(run), intended).estimate
    return figures | {
        "pmass": mean_pmass(rows.choices),
        "mundane": _mean(rows.tasks, lambda row: row.right),
        "mean tail nats": _mean(rows.replies, lambda row: row.surprisal.tail_nll_nats),
    }


def _mean(rows: Sequence[Any], value: Callable[[Any], float]) -> float:
    return float(np.mean([value(row) for row in rows]))


def _intervals(first: SavedRun, other: SavedRun) -> dict[str, Interval]:
    """Name -> difference of the other run from the first."""
    left, right = _healed(first), _healed(other)
    after, before = common_items(right.choices, left.choices)
    shifts = shift_nats(after, before)
    intervals = {"enacted": _reply_difference(left, right, lambda reply: reply.enacted)}
    intervals |= {f"{name}_nats": shifts[name] for name in sorted(shifts)}
    if intended := _intended([first, other]):
        base, other_base = first.controls.base.choices, other.controls.base.choices
        sides = common_items(right.choices, other_base, left.choices, base)
        pairs = (sides[0], sides[1]), (sides[2], sides[3])
        intervals["selectivity"] = selectivity_difference(*pairs, intended)
        intervals["flip rate"] = flip_rate_difference(*pairs, intended)
    intervals["pmass"] = _difference([row.pmass for row in before], [row.pmass for row in after])
    intervals["mundane"] = _difference(
        [row.right for row in left.tasks], [row.right for row in right.tasks]
    )
    intervals["mean tail nats"] = _reply_difference(
        left, right, lambda reply: reply.surprisal.tail_nll_nats
    )
    return intervals


def _difference(left: Sequence[float], right: Sequence[float]) -> Interval:
    return mean_interval([float(b) - float(a) for a, b in zip(left, right, strict=True)])


def _reply_difference(
    left: ConditionEval, right: ConditionEval, value: Callable[[ReplyRow], float]
) -> Interval:
    """Over prompts; every prompt has the same samples in both, so means pair as samples do."""
    return _difference(prompt_means(left.replies, value), prompt_means(right.replies, value))
