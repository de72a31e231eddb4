"""What a study came to, a row a variant: of its runs' last rounds, healed.

    enacted       share of replies that act the trait
    trait shift   mean over the intended foundations of sign * shift from base, nats
    pmass, tail   pmass, and the median tail surprisal of replies, over base's
    barrier on    share of the training steps with a row over the threshold

A cell is the mean over seeds with its 95 % interval by Student's t. A variant's differences from
the first one are paired by seed, so that what a seed does to both is no part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from eval.figures import seed_interval
from eval.statistics import Interval
from eval.summary import fixed, interval_text
from steer_heal.saved import read_saved_run, share_fired
from steer_heal.studies import Study
from steer_heal.summary import summarise

FIGURES = {  # field of a StudyRow -> the head of its column
    "enacted": "enacted",
    "trait_shift_nats": "trait shift, nats",
    "selectivity_nats": "selectivity, nats",
    "pmass_of_base": "pmass / base",
    "tail_of_base": "tail median / base",
    "mundane": "mundane tasks",
    "internalised": "internalised",
    "barrier_on": "barrier on",
}
Value = Interval | float  # of one seed there is no interval


class StudyRow(BaseModel):
    """One run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    rounds: int  # that were finished
    best_round: int | None  # from 1; None: no round was coherent
    enacted: float  # share of replies, 0 to 1
    trait_shift_nats: float  # positive: as intended
    selectivity_nats: float | None  # None where the trait names no foundation
    pmass_of_base: float
    tail_of_base: float
    mundane: float  # share of tasks right, 0 to 1
    internalised: float  # -1 to 1
    barrier_on: float  # share of steps, 0 to 1


class StudyTable(BaseModel):
    """Every figure of a study, by variant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: dict[str, tuple[StudyRow, ...]]  # a row a seed, the same seeds in every variant
    over_seeds: dict[str, dict[str, Value]]  # figure -> mean
    minus_first: dict[str, dict[str, Value]]  # figure -> mean difference from the first variant


def study_table(runs: Mapping[str, Mapping[int, Path]]) -> StudyTable:
    """Reads the figures of finished runs.

    Args:
        runs: variant -> seed -> the run's folder.
    Raises:
        UserError: a file that is not what was written.
    """
    rows = {
        variant: tuple(_row(seed, path) for seed, path in paths.items())
        for variant, paths in runs.items()
    }
    every = [row for variant in rows.values() for row in variant]
    known = [name for name in FIGURES if all(getattr(row, name) is not None for row in every)]
    values = {
        variant: {name: [getattr(row, name) for row in of_variant] for name in known}
        for variant, of_variant in rows.items()
    }
    first, *others = values
    return StudyTable(
        rows=rows,
        over_seeds={
            variant: {name: _over_seeds(each) for name, each in figures.items()}
            for variant, figures in values.items()
        },
        minus_first={
            variant: {
                name: _over_seeds(_minus(values[variant][name], values[first][name]))
                for name in known
            }
            for variant in others
        },
    )


def table_text(study: Study, settings: Sequence[str], table: StudyTable) -> str:
    """The table as markdown."""
    seeds = [row.seed for row in table.rows[study.first]]
    several = len(seeds) > 1
    spread = "mean with its 95 % interval over seeds, by Student's t"
    parts = [
        f"# Study {study.name}",
        study.question,
        f"Settings for all: {' '.join(settings) or 'the preset'}. "
        f"Seeds: {', '.join(map(str, seeds))}. After the last round, healed; "
        + (f"{spread}." if several else "one seed, so no interval."),
        _markdown(study, table.over_seeds, _cell, table.rows),
        f"Minus {study.first}, paired by seed"
        + (":" if several else "; of one seed no difference can be shown:"),
        _markdown(study, table.minus_first, _difference_cell),
    ]
    return "\n\n".join(parts)


def _row(seed: int, path: Path) -> StudyRow:
    summary = summarise(read_saved_run(path))
    base, last = summary.base, summary.rounds[-1]
    healed = last.healed
    return StudyRow(
        seed=seed,
        rounds=len(summary.rounds),
        best_round=summary.best.number if summary.best else None,
        enacted=healed.enacted.estimate,
        trait_shift_nats=healed.trait_shift,
        selectivity_nats=healed.selectivity.estimate if healed.selectivity else None,
        pmass_of_base=healed.pmass_share,
        tail_of_base=healed.tail_median_nats / base.tail_median_nats,
        mundane=healed.mundane,
        internalised=last.saved.evaluation.internalised,
        barrier_on=share_fired(last.saved.steps),
    )


def _minus(values: Sequence[float], first: Sequence[float]) -> list[float]:
    return [value - of_first for value, of_first in zip(values, first, strict=True)]


def _over_seeds(values: Sequence[float]) -> Value:
    return seed_interval(values) if len(values) > 1 else values[0]


def _markdown(
    study: Study,
    values: Mapping[str, Mapping[str, Value]],
    cell: Callable[[Value], str],
    rows: Mapping[str, Sequence[StudyRow]] | None = None,
) -> str:
    """A line a variant; with the runs' rows also the best round of each."""
    names = list(next(iter(values.values())))
    heads = [FIGURES[name] for name in names] + ["best round"] * (rows is not None)
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for variant in [variant for variant in study.variants if variant in values]:
        cells = [cell(values[variant][name]) for name in names]
        if rows is not None:
            cells.append(", ".join(_best(row) for row in rows[variant]))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(row: StudyRow) -> str:
    return f"{row.best_round or 'none'} of {row.rounds}"


def _cell(value: Value) -> str:
    return interval_text(value) if isinstance(value, Interval) else fixed(value, 3, sign=True)


def _difference_cell(value: Value) -> str:
    shown = not isinstance(value, Interval) or value.excludes_zero
    return _cell(value) + ("" if shown else " no difference shown")
