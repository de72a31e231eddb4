"""The benchmark's numbers are those of the runs' own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.errors import UserError
from steer_heal.bench import bench
from steer_heal.saved import read_saved_run
from steer_heal.summary import summarise
from tests.conftest import TinyModel
from tests.small import small_settings


def test_table_is_read_from_the_runs_files(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    own = ("run=", "folder=")
    settings = [s for s in small_settings(tiny_qwen3.folder, tmp_path) if not s.startswith(own)]
    settings.append("N=2")  # in place of three rounds
    table = bench(tmp_path / "bench", [3, 4], settings)
    runs = sorted((tmp_path / "bench").iterdir())
    best = [summarise(read_saved_run(run)).best for run in runs]
    numbers = [each.number if each else 2 for each in best]
    folders = [run / f"round-{number - 1:02d}" for run, number in zip(runs, numbers, strict=True)]
    shares = [_share(json.loads((folder / "eval.json").read_text())) for folder in folders]
    lines = {
        line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ")[1:]
        for line in table.splitlines()[2:]
    }
    assert table.startswith("| | seed 3 | seed 4 | over seeds |")
    assert [float(cell) for cell in lines["best_round"][:2]] == numbers
    for cell, share in zip(lines["enacted_healed"], shares, strict=False):
        assert cell.startswith(f"{share:+.3f} [")
    mean, gap = sum(shares) / 2, abs(shares[1] - shares[0])
    # Student's t with one degree of freedom, 12.706, times the standard error, half the gap
    low, high = mean - 12.7062 * gap / 2, mean + 12.7062 * gap / 2
    assert lines["enacted_healed"][2] == f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    assert all(float(cell) > 0 for cell in lines["wall_s"][:2])
    assert all(float(cell) > 0.1 for cell in lines["peak_memory_gib"][:2])
    assert len(lines["authority_shift_random"][0].split(", ")) == 2
    difference = [
        float(lines["authority_shift_healed"][seed].split()[0])
        - float(lines["authority_shift_prompted"][seed].split()[0])
        for seed in (0, 1)
    ]
    for seed in (0, 1):
        paired = lines["authority_healed_minus_prompted"][seed]
        assert float(paired.split()[0]) == pytest.approx(difference[seed], abs=2e-3)
        assert "[" in lines["selectivity_healed_minus_prompted"][seed]
    with pytest.raises(UserError, match="starts from nothing"):
        bench(tmp_path / "bench", [3], settings)


def _share(evaluation: dict[str, Any]) -> float:
    replies = evaluation["healed"]["replies"]
    return sum(row["enacted"] for row in replies) / len(replies)
