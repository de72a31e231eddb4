"""`steer-heal list`: the runs below a folder, a line each, from their saved files. Loads no model.

    verdict    trait shift of the best round from base, nats (points where a trait names no
               foundation), and its share of what the persona prompt does to the base
    state      running: a living process holds the run; stopped, or failed where the last in its
               log is the error: the stage that comes next; done: no round is to follow; broken: a
               file is not what was written there

What is read of a run is only what its line says, so files of no figure in it are not looked into.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from eval.errors import UserError
from eval.files import explain_disk, is_locked
from eval.summary import fixed
from steer_heal.artifacts import Controls, Limits, RoundEval
from steer_heal.config import RunConfig
from steer_heal.gate import is_coherent
from steer_heal.progress import parts_of
from steer_heal.rounds import DONE_FILE, RUN_FILE, STAGES_FILE, Run, has_failed
from steer_heal.saved import Description, read_description, trait_shift
from steer_heal.summary import best_round, without_gain
from steer_heal.wording import aligned, nats, one_line

_HEADS = ("run", "model", "trait", "rounds", "best", "verdict", "size", "state")
_NUMBERS = ("rounds", "best", "size")
_LEFT_OUT_FIRST = ("trait", "model")  # a run's own name says both
_LEAST_NAME = 12  # characters
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is said of one run."""

    run: str  # its folder, below the one that was asked for
    model: str = ""
    trait: str = ""
    rounds: str = ""  # done/asked for
    best: str = ""  # number of the best round, from 1
    verdict: str = ""
    size: str
    state: str
    trouble: str = ""  # what is wrong with it; empty: nothing


def list_runs(folder: Path, width: int | None) -> str:
    """A table of the runs in a folder and in the folders below it.

    Args:
        width: characters a line, at most; None: however long.
    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: `just round N=3` makes the first run, in rounds/")
    lines = [_line(path, folder) for path in _run_folders(folder)]
    if not lines:
        return f"no runs in {folder}"
    troubles = [f"broken: {line.trouble}" for line in lines if line.trouble]
    return "\n".join([*_table(lines, width), *troubles])


def _run_folders(folder: Path) -> Iterator[Path]:
    """Every run, in the order of their paths; no run lies in another one."""
    names = {entry.name for entry in folder.iterdir()} if os.access(folder, os.R_OK) else set()
    if names & {RUN_FILE, STAGES_FILE, "round-00"}:
        yield folder
        return
    for name in sorted(names):
        below = folder / name
        if below.is_dir() and not below.is_symlink():
            yield from _run_folders(below)


def _line(path: Path, folder: Path) -> Line:
    name = one_line(str(path.relative_to(folder)) if path != folder else path.resolve().name)
    size = _size_text(sum(_sizes_bytes(path)))
    try:
        return _line_of(path, name, size)
    except UserError as error:
        trouble = str(error).partition(";")[0]
    except ValidationError as error:  # of the config
        field = ".".join(map(str, error.errors()[0]["loc"]))
        trouble = f"{path / RUN_FILE} was written by another version of steer-heal: {field}"
    except OSError as error:
        trouble = f"{error.filename or path}: {explain_disk(error)}"
    return Line(run=name, size=size, state="broken", trouble=one_line(trouble))


def _line_of(path: Path, name: str, size: str) -> Line:
    about = read_description(path)
    config = RunConfig.model_validate(about.config)
    run = Run(path, config.seed)
    run.require_files()
    done = run.done_rounds()
    for each in done:
        each.require_files()
    best, verdict = _best(run, about) if done else (None, "")
    doing = _next_stage(run, about, len(done))
    ended = "failed" if has_failed(path) else "stopped"
    state = "done" if _is_over(config, len(done), best) else f"{ended}: {doing}"
    return Line(
        run=name,
        model=one_line(config.model),
        trait=one_line(about.trait.name),
        rounds=f"{len(done)}/{config.rounds}",
        best="" if best is None else str(best),
        verdict=verdict,
        size=size,
        state=f"running: {doing}" if is_locked(path) else state,
    )


def _best(run: Run, about: Description) -> tuple[int | None, str]:
    """The number of the best round, and what it came to in a few words."""
    controls, limits, trait = run.read(Controls), run.read(Limits), about.trait
    healed = [each.read(RoundEval).healed for each in run.done_rounds()]
    shifts = [
        trait_shift(rows, controls.base, trait)
        if is_coherent(rows, controls.base, limits)
        else None
        for rows in healed
    ]
    best = best_round(shifts)
    shift = None if best is None else shifts[best - 1]
    if shift is None:
        return None, "no coherent round"
    prompted = trait_shift(controls.prompted, controls.base, trait)
    moved = nats(shift) if trait.intended else f"{fixed(100 * shift, 0, sign=True)} points"
    if shift <= 0:
        return best, f"not moved ({moved})"
    return best, f"{moved}, {100 * shift / prompted:.0f} % of prompt" if prompted > 0 else moved


def _is_over(config: RunConfig, num_done: int, best: int | None) -> bool:
    """Whether no round is to follow: all are done, or the run's patience has run out."""
    since = without_gain(num_done, best) if num_done else 0
    return num_done >= config.rounds or 0 < config.patience <= since


def _next_stage(run: Run, about: Description, num_done: int) -> str:
    """The first stage that is not on disk; after the last one of a round its marker is missing."""
    parts = (part for part in parts_of(run, about, num_done) if not part.is_done)
    left = (step.stage for part in parts for step in part.steps if not step.is_done)
    return next(left, DONE_FILE)


def _sizes_bytes(path: Path) -> Iterator[int]:
    """Of every file in a folder; one that goes away meanwhile counts nothing."""
    for file in path.rglob("*"):
        try:
            if not file.is_dir():
                yield file.lstat().st_size
        except OSError:
            continue


def _size_text(size_bytes: float) -> str:
    """A size as `3.1 MB`, in powers of 1000."""
    power = 0
    while size_bytes >= 999.5 and power < len(_UNITS) - 1:
        size_bytes, power = size_bytes / 1000, power + 1
    digits = 1 if power and size_bytes < 9.95 else 0
    return f"{size_bytes:.{digits}f} {_UNITS[power]}"


def _table(lines: Sequence[Line], width: int | None) -> list[str]:
    """The lines in columns, and a note of what was left out or cut to fit."""
    heads = list(_HEADS)
    table = _rows(lines, heads)
    for head in _LEFT_OUT_FIRST:
        if width is not None and _widest(table) > width:
            heads.remove(head)
            table = _rows(lines, heads)
    if width is None or (len(heads) == len(_HEADS) and _widest(table) <= width):
        return table
    said = [" and ".join(head for head in _HEADS if head not in heads) + " left out"]
    if (over := _widest(table) - width) > 0:
        room = max(_LEAST_NAME, max(len(line.run) for line in lines) - over)
        table = _rows([replace(line, run=_cut(line.run, room)) for line in lines], heads)
        said.append("names cut")
    if _widest(table) > width:
        table = [line[:width] for line in table]
        said.append("lines cut")
    return [*table, f"({', '.join(said)} for {width} columns)"]


def _rows(lines: Sequence[Line], heads: Sequence[str]) -> list[str]:
    cells = [[getattr(line, head) for head in heads] for line in lines]
    return aligned([heads, *cells], right=[heads.index(head) for head in _NUMBERS])


def _widest(table: Sequence[str]) -> int:
    return max(map(len, table))


def _cut(name: str, room: int) -> str:
    """A name with its middle taken out: its end tells it from others."""
    if len(name) <= room:
        return name
    head = (room - 1) // 2
    return f"{name[:head]}…{name[len(name) - (room - 1 - head) :]}"
