"""The list of runs: against plain Python over the JSON files, in every state of a run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eval.files import locked
from steer_heal.listing import list_runs
from tests.processes import command, portable_settings, refusal, rewind, rounds_of
from tests.tiny import tiny_model_folder

HEADS = ["run", "model", "trait", "rounds", "best", "verdict", "size", "state"]
STAGES = ["vector", "doses", "drafts", "screened", "adapter", "eval"]
HOLDER = "import sys\nfrom eval.files import locked\nfrom pathlib import Path\n"
HOLDER += "with locked(Path(sys.argv[1]), 'x', 'y'): print('held', flush=True); sys.stdin.read()"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose rounds/small has two rounds."""
    folder = tmp_path_factory.mktemp("made")
    rounds_of(folder, 2, *portable_settings(tiny_model_folder(folder, "qwen3"), folder))
    return folder


@pytest.fixture
def rounds(made: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(made / "rounds", tmp_path / "rounds"))


def _rows(text: str) -> dict[str, dict[str, str]]:
    """Run -> column -> cell; where some are empty, those at the edges alone."""
    head, *lines = text.splitlines()
    names = head.split()
    found = {}
    for line in lines:
        cells = re.split(r" {2,}", line)
        if line.startswith(("(", "broken: ")):
            continue
        if len(cells) == len(names):
            found[cells[0]] = dict(zip(names, cells, strict=True))
        else:
            found[cells[0]] = {"run": cells[0], "size": cells[-2], "state": cells[-1]}
    return found


def _change(file: Path, **fields: Any) -> None:
    saved = json.loads(file.read_text())
    saved["config"] |= fields
    file.write_text(json.dumps(saved))


def _shift(rows: dict[str, Any], base: dict[str, Any]) -> float:
    """More care and less authority, nats, an item at a time."""

    def nats(side: dict[str, Any], name: str) -> float:
        shares = []
        for row in side["choices"]:
            total = sum(math.exp(score) for score in row["scores"].values())
            shares.append(math.exp(row["scores"][name]) / total)
        return math.log(statistics.mean(shares))

    moved = {name: nats(rows, name) - nats(base, name) for name in ("care", "authority")}
    return (moved["care"] - moved["authority"]) / 2


def _is_coherent(rows: dict[str, Any], run: Path) -> bool:
    base = json.loads((run / "base.json").read_text())
    tails = sorted(json.loads((run / "limits.json").read_text())["base_tail_nll_nats"])
    place = 0.95 * (len(tails) - 1)
    low = math.floor(place)
    high = tails[low] + (place - low) * (tails[min(low + 1, len(tails) - 1)] - tails[low])
    mass = [statistics.mean(row["pmass"] for row in side["choices"]) for side in (rows, base)]
    median = statistics.median(reply["surprisal"]["tail_nll_nats"] for reply in rows["replies"])
    return mass[0] >= 0.99 * mass[1] and median <= high


def test_a_finished_run_is_told_by_its_files(made: Path) -> None:
    run = made / "rounds" / "small"
    row = _rows(list_runs(made / "rounds", None))["small"]
    config = json.loads((run / "run.json").read_text())["config"]
    assert list(row) == HEADS
    assert (row["model"], row["trait"]) == (config["model"], "small")
    assert (row["rounds"], row["state"]) == ("2/2", "done")

    base, prompted = (
        json.loads((run / f"{name}.json").read_text()) for name in ("base", "prompted")
    )
    healed = [json.loads((run / f"round-0{n}/eval.json").read_text())["healed"] for n in (0, 1)]
    shifts = {n: _shift(each, base) for n, each in enumerate(healed, 1) if _is_coherent(each, run)}
    assert shifts, "no coherent round: this test would say nothing"
    best = max(shifts, key=lambda n: shifts[n])
    assert row["best"] == str(best)
    moved = f"{shifts[best]:+.2f}".replace("-", "−")
    reach = _shift(prompted, base)
    if shifts[best] <= 0:
        assert row["verdict"] == f"not moved ({moved})"
    elif reach > 0:
        assert row["verdict"] == f"{moved}, {100 * shifts[best] / reach:.0f} % of prompt"
    else:
        assert row["verdict"] == moved

    num_bytes = sum(path.lstat().st_size for path in run.rglob("*") if path.is_file())
    number, unit = row["size"].split()
    factor = {"kB": 1e3, "MB": 1e6}[unit]
    assert float(number) * factor == pytest.approx(num_bytes, rel=0.05)


def test_the_best_round_is_the_one_with_the_largest_shift_that_is_coherent(rounds: Path) -> None:
    run = rounds / "small"
    before = _rows(list_runs(rounds, None))["small"]
    other = {"1": "2", "2": "1"}[before["best"]]
    worst = run / f"round-0{int(before['best']) - 1}" / "eval.json"
    saved = json.loads(worst.read_text())
    for row in saved["healed"]["choices"]:
        row["pmass"] = 0.0
    _write_recorded(worst, saved)
    assert _rows(list_runs(rounds, None))["small"]["best"] == other
    (left,) = {"round-00/eval.json", "round-01/eval.json"} - {str(worst.relative_to(run))}
    saved = json.loads((run / left).read_text())
    saved["healed"]["unscorable"] = ["gone"]
    _write_recorded(run / left, saved)
    assert "no coherent round" in list_runs(rounds, None)


def _write_recorded(file: Path, saved: Any) -> None:
    """Writes an evaluation, and its hash where the stage is recorded."""
    file.write_text(json.dumps(saved))
    record = json.loads((file.parent / "stages.json").read_text())
    record["eval"]["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / "stages.json").write_text(json.dumps(record))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_says_which_stage_comes_next(stage: str, rounds: Path) -> None:
    rewind(rounds / "small", 1, stage)
    row = _rows(list_runs(rounds, None))["small"]
    assert (row["rounds"], row["state"]) == ("1/2", f"stopped: {stage}")


def test_the_stages_are_those_that_a_run_goes_through(made: Path, tmp_path: Path) -> None:
    """The state of a run whose stages are taken away from the last one on, against its log."""
    run = Path(shutil.copytree(made / "rounds" / "small", tmp_path / "small"))
    log = (run / "log.txt").read_text()
    said = re.findall(r"(?:run small|round 1 \(round-00\)): (\w+)$", log, re.M)
    assert said[:3] == ["doctor", "batches", "limits"] and said[-2:] == ["adapter", "eval"]
    shutil.rmtree(run / "round-01")
    (run / "round-00" / "DONE").unlink()
    for stage in reversed(said):
        for record in (run / "stages.json", run / "round-00" / "stages.json"):
            left = json.loads(record.read_text())
            left.pop(stage, None)
            record.write_text(json.dumps(left))
        assert f"stopped: {stage}\n" in list_runs(run, None) + "\n"


def test_a_run_that_a_process_holds_is_running_and_a_dead_ones_is_not(rounds: Path) -> None:
    rewind(rounds / "small", 1, "drafts")
    arguments = [sys.executable, "-c", HOLDER, str(rounds / "small")]
    with subprocess.Popen(arguments, stdin=-1, stdout=-1, cwd=Path(__file__).parents[1]) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert "running: drafts" in list_runs(rounds, None)
        assert "running: drafts" in list_runs(rounds, None)  # the look freed nothing
        holder.kill()
    assert "stopped: drafts" in list_runs(rounds, None)
    with locked(rounds / "small", "run small", "run=NAME"):  # and the look holds nothing
        pass


def test_a_run_whose_patience_ran_out_is_done(rounds: Path) -> None:
    best = int(_rows(list_runs(rounds, None))["small"]["best"])
    for patience in (0, 1, 2):
        _change(rounds / "small" / "run.json", rounds=8, patience=patience)
        row = _rows(list_runs(rounds, None))["small"]
        is_out = 0 < patience <= 2 - best
        assert row["rounds"] == "2/8"
        assert row["state"] == ("done" if is_out else "stopped: vector")


BREAKING = {
    "run.json is not JSON": lambda run: (run / "run.json").write_text("{"),
    "run.json is gone": lambda run: (run / "run.json").unlink(),
    "of another version": lambda run: _change(run / "run.json", heal={"unheard_of": 1}),
    "an evaluation is cut off": lambda run: (run / "round-00/eval.json").write_text("{"),
    "an adapter is gone": lambda run: (run / "round-00/adapter/adapter_config.json").unlink(),
    "a record is cut off": lambda run: (run / "stages.json").write_text("{"),
}


@pytest.mark.parametrize("what", BREAKING)
def test_a_broken_run_is_a_line_and_not_the_end_of_the_list(what: str, rounds: Path) -> None:
    shutil.copytree(rounds / "small", rounds / "broken")
    BREAKING[what](rounds / "broken")
    text = list_runs(rounds, None)
    rows = _rows(text)
    assert (rows["broken"]["state"], rows["small"]["state"]) == ("broken", "done")
    (trouble,) = [line for line in text.splitlines() if line.startswith("broken: ")]
    assert "rounds/broken" in trouble and "\n" not in trouble


def test_runs_in_folders_below_are_found_in_order(rounds: Path) -> None:
    for name in ("bench/seed0", "study/targets/nll--seed0"):
        shutil.copytree(rounds / "small", rounds / name)
    (rounds / "README.md").write_text("no run")
    (rounds / "empty").mkdir()
    (rounds / "loop").symlink_to(rounds)
    names = ["bench/seed0", "small", "study/targets/nll--seed0"]
    assert list(_rows(list_runs(rounds, None))) == names
    assert list(_rows(list_runs(rounds / "study", None))) == ["targets/nll--seed0"]
    assert list(_rows(list_runs(rounds / "small", None))) == ["small"]


def test_eighty_columns_are_kept_and_what_is_cut_is_said(rounds: Path) -> None:
    long = "care-over-authority-organism--organism--seed0"
    for seed in (0, 1):
        shutil.copytree(rounds / "small", rounds / f"{long[:-1]}{seed}")
        rewind(rounds / f"{long[:-1]}{seed}", 1, "screened")
    whole = list_runs(rounds, None)
    assert long in whole and "columns)" not in whole
    for width in (40, 80, 100):
        *table, note = list_runs(rounds, width).splitlines()
        assert max(map(len, table)) <= width
        assert note.startswith("(model and trait left out") and note.endswith(f"{width} columns)")
    *table, note = list_runs(rounds, 80).splitlines()
    names = [line.split()[0] for line in table[1:]]
    assert len(set(names)) == 3 and all("…" in name for name in names[:2])
    assert names[0].endswith("seed0") and names[1].endswith("seed1")
    assert "lines cut" not in note and "names cut" in note
    assert all("stopped: screened" in line for line in table[1:3])


def test_control_characters_of_a_name_are_not_sent_to_the_terminal(rounds: Path) -> None:
    (rounds / "small").rename(rounds / "a\x1b[2Jb\nc")
    (name,) = _rows(list_runs(rounds, None))
    assert name.replace("\N{REPLACEMENT CHARACTER}", "") == "a[2Jbc"


def test_a_hundred_runs_are_listed_in_seconds(rounds: Path) -> None:
    for number in range(99):
        shutil.copytree(rounds / "small", rounds / f"copy-{number:02d}")
    start = time.process_time()
    text = list_runs(rounds, 80)
    assert len(_rows(text)) == 100
    assert time.process_time() - start < 5


def test_the_command_prints_the_list(made: Path, tmp_path: Path) -> None:
    done = command(made, "list")
    assert done.code == 0
    told = {line.split()[0]: line.split()[-1] for line in done.out.splitlines()}
    assert (told["run"], told["small"]) == ("state", "done")
    assert "no folder rounds" in refusal(command(tmp_path, "list"))
    (tmp_path / "rounds").mkdir()
    empty = command(tmp_path, "list")
    assert (empty.code, empty.out) == (0, "no runs in rounds\n")
