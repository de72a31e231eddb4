"""One run in two processes: the same as in one, up to the order of sums, however it is started."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Command, Fate, command, portable_settings, together
from tests.tiny import tiny_model_folder

RUN = Path("rounds") / "small"
FIGURES = [
    *("limits.json", "base.json", "prompted.json", "random.json"),
    *("round-00/vector.json", "round-00/dose.json", "round-00/eval.json"),
]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same run twice."""

    alone: Path  # in one process
    shared: Path  # in two


def read(path: Path) -> Any:
    lines = path.read_text().splitlines()
    return (
        [json.loads(line) for line in lines]
        if path.suffix == ".jsonl"
        else json.loads(path.read_text())
    )


def same(found: Any, expected: Any, tolerance: float) -> bool:
    """Equal but for floats, which are within a tolerance, absolute or relative."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], expected[key], tolerance) for key in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(
            map(same, found, expected, [tolerance] * len(found))
        )
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    return found == expected


def require_same_run(pair: Pair) -> None:
    """The same completions and the same kept set; vector, adapter and figures within rounding."""
    for stage, tolerance in (("vector", 1e-5), ("adapter/adapter_model", 1e-4)):
        one, two = (
            load_file(run / f"round-00/{stage}.safetensors") for run in (pair.alone, pair.shared)
        )
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.allclose(two[key], value, rtol=0, atol=tolerance), key
    rows = [read(run / "round-00/completions.jsonl") for run in (pair.alone, pair.shared)]
    for before, after in zip(*rows, strict=True):
        assert after["token_ids"] == before["token_ids"]
        assert after["dropped"] == before["dropped"]
    assert same(rows[1], rows[0], 1e-3)
    assert same(
        read(pair.shared / "round-00/train.jsonl"), read(pair.alone / "round-00/train.jsonl"), 1e-3
    )
    for name in FIGURES:
        assert same(read(pair.shared / name), read(pair.alone / name), 1e-3), name


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a small run: 5 rows are kept, in batches of 4: of the last one a process has no row."""
    folder = tmp_path_factory.mktemp("settings")
    given = portable_settings(tiny_model_folder(folder, "qwen3"), folder)
    left = [line for line in given if not line.startswith(("filter.num_kept=", "heal.epochs="))]
    return [*left, "filter.num_kept=5", "heal.epochs=2", "heal.barrier_threshold_nats=auto", "N=1"]


@pytest.fixture(scope="module")
def pair(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    alone = Command(folder / "alone", "round", "--profile", *settings).end()
    assert alone.code == 0, alone
    tables = re.findall(
        r"by stage\n(stage +wall s +share +CPU s.*\n(?:\w+ +[\d.]+ .*\n)+)", alone.err
    )
    assert [re.findall(r"^drafts ", table, re.MULTILINE) for table in tables] == [["drafts "], []]
    running = [
        Command(folder / "shared", "round", *settings, fate=Fate(environment=environment))
        for environment in together(2)
    ]
    main, other = (each.end() for each in running)
    assert (main.code, other.code) == (0, 0), (main, other)
    assert "1 of 1 rounds done" in main.err
    assert " INFO " not in other.err and "%" not in other.err  # it keeps no log and draws no bar
    yield Pair(alone=folder / "alone" / RUN, shared=folder / "shared" / RUN)


def test_two_processes_come_to_what_one_comes_to(pair: Pair) -> None:
    require_same_run(pair)
    files = [
        {str(path.relative_to(run)) for path in run.rglob("*")} for run in (pair.alone, pair.shared)
    ]
    assert files[0] == files[1]  # no process left anything beside the main one's


def test_a_run_of_two_goes_on_alone(pair: Pair, settings: list[str]) -> None:
    """What was made by two is there for one, and every file is as it was written."""
    done = command(pair.shared.parents[1], "round", *settings)
    assert done.code == 0, done
    assert "run small is done: 1 round;" in done.err


# ------------------------------------------------------------------ as people start it, and slow

ROOT = Path(__file__).parents[1]
TWO = ["-m", "steer_heal", "round", "--processes", "2"]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Python in fresh processes, as from a shell."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _gone(number: int) -> bool:
    return not psutil.pid_exists(number) or psutil.Process(number).status() == "zombie"


def _stopped(
    folder: Path, settings: list[str], number: signal.Signals, whom: str
) -> tuple[int, str]:
    """Exit code and errors of a run whose launcher, or a process of it, gets a signal."""
    running = started(folder, *TWO, *settings)
    assert running.stderr is not None
    said = running.stderr.readline()
    while ": drafts\n" not in said:
        assert running.poll() is None, said
        said += running.stderr.readline()
    workers = psutil.Process(running.pid).children()
    assert len(workers) == 2
    victim = {"launcher": running.pid, "main": workers[0].pid, "other": workers[1].pid}[whom]
    os.kill(victim, number)
    said += running.stderr.read()
    code = running.wait(timeout=120)
    end = time.monotonic() + 30
    while not all(_gone(worker.pid) for worker in workers):
        assert time.monotonic() < end, "a process was left behind"
        time.sleep(0.1)
    return code, said


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["main", "other"])
def test_one_that_is_killed_ends_the_others(whom: str, settings: list[str], tmp_path: Path) -> None:
    code, said = _stopped(tmp_path, settings, signal.SIGKILL, whom)
    assert code == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"process {1 if whom == 'main' else 2} of 2 was ended by SIGKILL" in line
    assert "Traceback" not in said


@pytest.mark.slow
def test_ctrl_c_ends_all(settings: list[str], tmp_path: Path) -> None:
    code, said = _stopped(tmp_path, settings, signal.SIGINT, "launcher")
    assert code == 130
    assert said.count("stopped; the same command goes on from there") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(settings: list[str], tmp_path: Path) -> None:
    assert _stopped(tmp_path, settings, signal.SIGKILL, "launcher")[0] == -signal.SIGKILL
