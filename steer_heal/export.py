"""One servable adapter from a run: its stack up to the best round, as a standard PEFT folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from eval.errors import UserError
from steer_heal.rounds import Run, read_run
from steer_heal.saved import read_saved_run
from steer_heal.stack import fold
from steer_heal.summary import summarise


def export_adapter(run_path: Path, out: Path, num_rounds: int | None = None) -> int:
    """Writes the sum of a run's first rounds as one LoRA to `out`, exactly, in fp32.

    Args:
        num_rounds: how many; None: up to the best round, as the report marks it.
    Returns:
        How many rounds it is the sum of.
    Raises:
        UserError: no run, no finished round, none that is coherent, fewer than asked for, a damaged
            adapter, or `out` is there already.
    """
    if out.exists():
        raise UserError(f"{out} is there already; take it away or name another folder")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder to write {out.name} into")
    adapters = Run(run_path, read_run(run_path)["config"]["seed"]).last_stack()
    if not adapters:
        raise UserError(f"{run_path}: no round is finished yet, so there is nothing to export")
    count = _best(run_path) if num_rounds is None else num_rounds
    if not 1 <= count <= len(adapters):
        raise UserError(f"{run_path} has {len(adapters)} finished rounds; --rounds {count} asks")
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as scratch:
        fold(adapters[:count]).save(Path(scratch))
        os.replace(Path(scratch) / "adapter", out)
    return count


def _best(run_path: Path) -> int:
    """The number of the best round, from 1."""
    best = summarise(read_saved_run(run_path)).best
    if best is None:
        raise UserError(
            f"{run_path}: no round stayed coherent, so none is best; --rounds N takes the first N"
        )
    return best.number
