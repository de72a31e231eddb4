"""Measures the main job: rounds on each of several seeds, each in a process of its own.

Every row of the table is read from the run's own files, what is healed and steered from those of
its best round, which is what export takes (the last round where none is coherent); wall time and
peak memory are of the process that made it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from eval.errors import UserError
from eval.figures import seed_interval, selectivity_difference
from eval.statistics import Interval, mean_interval, shift_nats
from eval.summary import fixed, interval_text
from steer_heal.apart import run_apart
from steer_heal.artifacts import ReplyRow
from steer_heal.config import resolve_config
from steer_heal.manifest import run_path
from steer_heal.saved import SavedRun, condition_figures, prompt_means, read_saved_run
from steer_heal.summary import summarise


class BenchRow(BaseModel):
    """One seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    best_round: int  # from 1
    wall_s: float
    peak_memory_gib: float  # of this process or an earlier seed's, whichever was larger
    enacted_base: Interval  # shares of held-out replies, 0 to 1
    enacted_prompted: Interval
    enacted_engineered: Interval
    enacted_random: tuple[float, ...]  # a value a direction
    enacted_steered: Interval
    enacted_healed: Interval
    healed_minus_prompted: Interval  # paired
    authority_shift_prompted: Interval  # nats, from base
    authority_shift_engineered: Interval
    authority_shift_random: tuple[float, ...]  # a value a direction
    authority_shift_steered: Interval
    authority_shift_healed: Interval
    authority_healed_minus_prompted: Interval  # paired
    selectivity_prompted: Interval  # nats
    selectivity_healed: Interval
    selectivity_healed_minus_prompted: Interval  # paired
    internalised: float  # -1 to 1
    pmass_of_base: float
    tail_nats_base: float  # median over replies, nats a token
    tail_nats_healed: float
    tasks_base: float  # shares of mundane tasks solved, 0 to 1
    tasks_healed: float


def bench(folder: Path, seeds: Sequence[int], settings: Sequence[str]) -> str:
    """Runs the main job for every seed from nothing in `folder`; returns the table.

    Raises:
        UserError: `folder` is there already, or a run failed.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: a benchmark starts from nothing, take it away")
    rows = [_measure(folder, seed, list(settings)) for seed in seeds]
    return _table(rows)


def _measure(folder: Path, seed: int, settings: list[str]) -> BenchRow:
    arguments = [*settings, f"seed={seed}", f"folder={folder}"]
    config = resolve_config(arguments)
    path = run_path(config)
    start = time.monotonic()
    run_apart(f"seed {seed}", arguments)
    wall_s = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    return _row(seed, wall_s, peak, read_saved_run(path))


def _row(seed: int, wall_s: float, peak_gib: float, run: SavedRun) -> BenchRow:
    best = summarise(run).best
    number = best.number if best is not None else len(run.rounds)
    controls, chosen = run.controls, run.rounds[number - 1].evaluation
    rows = {
        "base": controls.base,
        "prompted": controls.prompted,
        "engineered": controls.engineered,
        "steered": chosen.steered,
        "healed": chosen.healed,
    }
    of = {
        name: condition_figures(name, each, rows["base"], run.trait) for name, each in rows.items()
    }
    random = [condition_figures("random", row, rows["base"], run.trait) for row in controls.random]
    means = [prompt_means(rows[name].replies, _enacted) for name in ("healed", "prompted")]
    gain = mean_interval([after - before for after, before in zip(*means, strict=True)])
    choices = {name: each.choices for name, each in rows.items()}
    healed, prompted = ((choices[name], choices["base"]) for name in ("healed", "prompted"))
    moved = {name: figures.shifts["authority"] for name, figures in of.items() if name != "base"}
    return BenchRow(
        seed=seed,
        best_round=number,
        wall_s=wall_s,
        peak_memory_gib=peak_gib,
        **{f"enacted_{name}": figures.enacted for name, figures in of.items()},
        enacted_random=tuple(figures.enacted.estimate for figures in random),
        healed_minus_prompted=gain,
        **{f"authority_shift_{name}": shift for name, shift in moved.items()},
        authority_healed_minus_prompted=shift_nats(healed[0], prompted[0])["authority"],
        authority_shift_random=tuple(each.shifts["authority"].estimate for each in random),
        selectivity_prompted=_known(of["prompted"].selectivity),
        selectivity_healed=_known(of["healed"].selectivity),
        selectivity_healed_minus_prompted=selectivity_difference(
            healed, prompted, run.trait.intended
        ),
        internalised=chosen.internalised,
        pmass_of_base=of["healed"].pmass_share,
        tail_nats_base=of["base"].tail_median_nats,
        tail_nats_healed=of["healed"].tail_median_nats,
        tasks_base=of["base"].mundane,
        tasks_healed=of["healed"].mundane,
    )


def _known(interval: Interval | None) -> Interval:
    assert interval is not None  # the embedded model's trait names foundations
    return interval


def _enacted(reply: ReplyRow) -> float:
    return float(reply.enacted)


def _table(rows: Sequence[BenchRow]) -> str:
    """Markdown, a column a seed; with several, their mean with its interval over seeds."""
    several = len(rows) > 1
    heads = [f"seed {row.seed}" for row in rows] + ["over seeds"] * several
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name in [name for name in BenchRow.model_fields if name != "seed"]:
        values = [getattr(row, name) for row in rows]
        cells = [_cell(value) for value in values]
        if several:
            means = [np.mean(getattr(value, "estimate", value)) for value in values]
            cells.append(interval_text(seed_interval([float(mean) for mean in means])))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Interval | tuple[float, ...] | float | int) -> str:
    if isinstance(value, Interval):
        return interval_text(value)
    if isinstance(value, tuple):
        return ", ".join(fixed(each, 3) for each in value)
    if isinstance(value, int):
        return str(value)
    return fixed(value, 3)
