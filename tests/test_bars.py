"""Progress: in a real terminal of any width, and in a file without control characters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.bars import duration_text
from steer_heal.listing import list_runs
from tests.processes import Command, command, portable_settings
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[1]
LINES = """
import time
from eval.bars import progress_bar
with progress_bar(40, "drafts", initial=10, line_s=0.2) as bar:
    for _ in range(6):
        time.sleep(0.1)
        bar.update(5)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bars")
    return [*portable_settings(tiny_model_folder(folder, "qwen3"), folder), "N=1"]


def test_bars_and_the_table_fit_a_narrow_terminal(settings: list[str], tmp_path: Path) -> None:
    done = Command(tmp_path, "round", *settings, columns=40).end()
    assert done.code == 0, done.err
    shown = done.err.replace("[transformers]", "\n")  # whose own warnings know no bars
    bars = [part for part in re.split(r"[\r\n]", shown) if re.match(r" *\d+% ", part)]
    assert max(map(len, bars)) <= 40
    assert all(re.match(r" *\d+% (\d\d:\d\d|\?) left  \S", bar) for bar in bars)
    assert {name for name in ("steered drafts", "heal", "base: replies") if name in done.err} == {
        "steered drafts",
        "heal",
        "base: replies",
    }
    lines = done.err.splitlines()
    begin = next(place for place, line in enumerate(lines) if "what round 1 came to" in line)
    table = lines[begin + 1 : begin + 6]
    assert [line.split()[0] for line in table] == ["enacted", "base", "prompt", "1", "1"]
    assert max(map(len, table)) <= 40
    assert lines[-1].endswith("rounds/small/report.html")


def test_a_file_gets_plain_lines(settings: list[str], tmp_path: Path) -> None:
    with (tmp_path / "err.txt").open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", "from steer_heal.cli import main; main()", "round", *settings],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=file,
            timeout=300,
        )
    text = (tmp_path / "err.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert "what round 1 came to" in text and "%|" not in text
    log = (tmp_path / "rounds" / "small" / "log.txt").read_text(encoding="utf-8")
    assert "1 healed" in log


def test_a_plain_line_says_how_much_is_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LINES], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    said = [re.fullmatch(r"drafts: (\d+) of 40, (\d+) s left", x) for x in done.stderr.splitlines()]
    assert 1 <= len(said) < 6 and all(said)  # not at every update
    assert [int(each[1]) for each in said if each] == sorted(int(each[1]) for each in said if each)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3599.6, "1 h 0 min"), (7530, "2 h 6 min")],
)
def test_a_duration_is_as_long_as_it_says(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_run_that_fails_says_so_in_its_log(settings: list[str], tmp_path: Path) -> None:
    changed = [each for each in settings if "min_enactment" not in each]
    done = command(tmp_path, "round", *changed, "filter.min_enactment_nats=100")
    assert done.code == 2
    log = (tmp_path / "rounds" / "small" / "log.txt").read_text().splitlines()
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert log[-1].endswith(f"ERROR failed: {error.removeprefix('error: ')}")
    assert done.err.count("the filter left 0") == 1
    assert "failed: screened" in list_runs(tmp_path / "rounds", None)
    with (tmp_path / "rounds" / "small" / "log.txt").open("a") as file:  # as if begun again
        file.write(f"{log[-1].split()[0]} INFO round 1 (round-00): screened\n")
    assert "stopped: screened" in list_runs(tmp_path / "rounds", None)
