"""A study is ordinary runs, goes on where it was stopped, and its numbers are those of the runs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.errors import UserError
from steer_heal.config import resolve_config
from steer_heal.studies import Study, load_studies, load_study
from steer_heal.study import run_study
from steer_heal.study_table import study_table, table_text
from tests.processes import command, portable_settings, refusal, rounds_of, tree
from tests.tiny import tiny_model_folder

ROOT = Path(__file__).parents[1]
FOLDER = Path("rounds") / "study" / "ranking"
CACHE = FOLDER.parent / "stages"
VARIANTS = {"ranked": "filter.rank_by_enactment=true", "any": "filter.rank_by_enactment=false"}
RUNS = [f"{variant}--seed{seed}" for seed in (0, 1) for variant in VARIANTS]
STUDENT_T = 12.7062  # 97.5 % quantile with one degree of freedom


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`steer-heal study ARGUMENTS`, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from steer_heal.cli import main; main()", "study", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _kill_once_there(process: subprocess.Popen[str], file: Path) -> None:
    """Kills the study and the run that it is at as soon as that has written a file."""
    end = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a small run, its files in a folder of their own."""
    folder = tmp_path_factory.mktemp("files")
    portable = portable_settings(tiny_model_folder(folder, "qwen3"), folder)
    return ["N=1", *(each for each in portable if not each.startswith("run="))]


@pytest.fixture(scope="module")
def resumed(
    settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str, str]]:
    """The folder of a study that was killed in its second run and gone on with; what it said."""
    folder = tmp_path_factory.mktemp("resumed")
    arguments = ["ranking", "seeds=2", *settings]
    begun = _start(folder, *arguments)
    _kill_once_there(begun, folder / FOLDER / RUNS[1] / "round-00" / "drafts.jsonl")
    assert not (folder / FOLDER / "study.md").exists()
    assert not (folder / FOLDER / RUNS[1] / "round-00" / "DONE").exists()
    process = _start(folder, *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    before = tree(folder)
    yield folder, out, err
    assert tree(folder) == before


def test_killed_study_goes_on_to_the_bytes_of_ordinary_runs(
    settings: list[str], resumed: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder, _, said = resumed
    assert re.findall(r"run (\d of 4): (\w+), seed (\d)", said) == [
        ("2 of 4", "any", "0"),
        ("3 of 4", "ranked", "1"),
        ("4 of 4", "any", "1"),
    ]
    for run in RUNS:
        variant, _, seed = run.partition("--seed")
        own = [VARIANTS[variant], f"seed={seed}", f"run={run}", f"folder={FOLDER}"]
        own.append(f"cache={CACHE}")
        shutil.rmtree(tmp_path / CACHE, ignore_errors=True)  # so that every stage is made
        rounds_of(tmp_path, 1, *settings[1:], *own)
        assert tree(folder / FOLDER / run) == tree(tmp_path / FOLDER / run), run
        assert (folder / FOLDER / run / "report.html").exists()


def test_finished_study_prints_its_table_at_once(
    settings: list[str],
    resumed: tuple[Path, str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, out, _ = resumed
    monkeypatch.chdir(folder)
    monkeypatch.setattr("steer_heal.study.run_apart", None)  # nothing may be run
    text = run_study(load_study("ranking"), ["seeds=2", *settings])
    assert text + "\n" == out == (FOLDER / "study.md").read_text()


def test_table_is_that_of_the_runs_files(resumed: tuple[Path, str, str]) -> None:
    folder = resumed[0] / FOLDER
    saved = json.loads((folder / "figures.json").read_text())
    own = {
        variant: [_figures(folder / f"{variant}--seed{seed}") for seed in (0, 1)]
        for variant in VARIANTS
    }
    cells = _cells((folder / "study.md").read_text())
    for column, name in enumerate(own["ranked"][0]):
        values = {variant: [row[name] for row in rows] for variant, rows in own.items()}
        for variant, pair in values.items():
            assert [row[name] for row in saved["rows"][variant]] == pytest.approx(pair)
            assert _text(pair) == cells[variant][column]
        gaps = [b - a for a, b in zip(values["ranked"], values["any"], strict=True)]
        shown = "" if _excludes_zero(gaps) else " no difference shown"
        assert cells["minus any"][column] == _text(gaps) + shown
    assert any("no difference shown" in cell for cell in cells["minus any"])
    assert own["ranked"] != own["any"]  # the variants are not one run under two names


def _cells(text: str) -> dict[str, list[str]]:
    """Variant -> its cells; those of the second table under `minus`."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    means, differences = lines[2:4], lines[6:]
    return {line[0]: line[1:] for line in means} | {
        f"minus {line[0]}": line[1:] for line in differences
    }


def _figures(run: Path) -> dict[str, float]:
    """A run's figures from its rows, by their definitions, in the order of the columns."""
    healed = json.loads((run / "round-00" / "eval.json").read_text())
    base, after = json.loads((run / "base.json").read_text()), healed["healed"]
    steps = [json.loads(line) for line in (run / "round-00" / "train.jsonl").open()]
    moved = {name: _nats(after, name) - _nats(base, name) for name in ("care", "authority")}
    shift = (moved["care"] - moved["authority"]) / 2
    pmass = [statistics.mean(row["pmass"] for row in each["choices"]) for each in (after, base)]
    tail = [
        statistics.median(reply["surprisal"]["tail_nll_nats"] for reply in each["replies"])
        for each in (after, base)
    ]
    return {
        "enacted": statistics.mean(reply["enacted"] for reply in after["replies"]),
        "trait_shift_nats": shift,
        "selectivity_nats": _selectivity(after, base) * min(1, pmass[0] / pmass[1]) ** 2,
        "pmass_of_base": pmass[0] / pmass[1],
        "tail_of_base": tail[0] / tail[1],
        "mundane": statistics.mean(task["right"] for task in after["tasks"]),
        "internalised": healed["internalised"],
        "barrier_on": statistics.mean(step["share_over"] > 0 for step in steps),
    }


def _nats(rows: dict[str, Any], name: str) -> float:
    return math.log(statistics.mean(math.exp(logs[name]) for logs in _log_shares(rows)))


def _log_shares(rows: dict[str, Any]) -> list[dict[str, float]]:
    found = []
    for row in rows["choices"]:
        total = math.log(sum(map(math.exp, row["scores"].values())))
        found.append({name: score - total for name, score in row["scores"].items()})
    return found


def _selectivity(after: dict[str, Any], base: dict[str, Any]) -> float:
    """Without its share of pmass: `on - 0.1 * off`, in centred log-ratio nats."""
    moved = {
        name: _centred_nats(after, name) - _centred_nats(base, name)
        for name in after["choices"][0]["scores"]
    }
    on = (moved.pop("care") - moved.pop("authority")) / 2
    return on - 0.1 * statistics.mean(map(abs, moved.values()))


def _centred_nats(rows: dict[str, Any], name: str) -> float:
    scores = [row["scores"] for row in rows["choices"]]
    return statistics.mean(each[name] - statistics.mean(each.values()) for each in scores)


def _bounds(pair: list[float]) -> tuple[float, float, float]:
    mean, half = sum(pair) / 2, STUDENT_T * abs(pair[1] - pair[0]) / 2
    return mean, mean - half, mean + half


def _text(pair: list[float]) -> str:
    mean, low, high = (f"{round(each, 3) + 0.0:+.3f}" for each in _bounds(pair))
    return f"{mean} [{low}, {high}]"


def _excludes_zero(pair: list[float]) -> bool:
    _, low, high = _bounds(pair)
    return low > 0 or high < 0


def test_one_seed_has_no_interval(resumed: tuple[Path, str, str]) -> None:
    paths = {variant: {0: resumed[0] / FOLDER / f"{variant}--seed0"} for variant in VARIANTS}
    text = table_text(load_study("ranking"), [], study_table(paths))
    assert "one seed, so no interval" in text
    assert "of one seed no difference can be shown" in text
    assert "[" not in text
    assert "no difference shown" not in text


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ("N=2", "rounds: 1 -> 2"),
        ("evaluate.num_dialogues=2", "evaluate.num_dialogues: 3 -> 2"),
    ],
)
def test_study_begun_with_other_settings_is_refused(
    changed: str, part: str, settings: list[str], resumed: tuple[Path, str, str]
) -> None:
    key = changed.partition("=")[0]
    others = [each for each in settings if each.partition("=")[0] != key]
    message = refusal(command(resumed[0], "study", "ranking", "seeds=2", *others, changed))
    assert f"study {FOLDER} was begun with other settings ({part})" in message
    assert "folder=PATH" in message


def test_variant_that_was_changed_is_refused(
    settings: list[str], resumed: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(resumed[0])
    study = load_study("ranking")
    other = Study(
        name=study.name,
        question=study.question,
        variants=study.variants | {"any": ("filter.num_kept=4",)},
    )
    without = [each for each in settings if not each.startswith("filter.num_kept")]
    with pytest.raises(UserError, match=r"num_kept: 8 -> 192; variant any: filter\.rank_by"):
        run_study(other, ["seeds=2", *without])


# ---------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("name", load_studies())
def test_shipped_study_can_be_run(name: str) -> None:
    study = load_study(name)
    preset = resolve_config([])
    configs = [
        resolve_config([*overrides, f"run={label}--seed0"])
        for label, overrides in study.variants.items()
    ]
    plain = [config.model_copy(update={"run": None}) for config in configs]
    assert study.question.endswith("?")
    assert plain[0] == preset
    assert len({config.model_dump_json() for config in plain}) == len(plain) > 1


def test_without_a_name_the_studies_are_listed(tmp_path: Path) -> None:
    done = command(tmp_path, "study")
    assert done.code == 0
    for study in load_studies().values():
        assert f"\n{study.name}\n" in done.out
        assert study.question.split()[0] in done.out


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["tragets"], ["unknown study 'tragets'", "the nearest are: targets"]),
        (["zzzz"], ["unknown study 'zzzz'", "there are: control, targets, "]),
        (["rank", "heal.rnk=3"], ["unknown setting 'heal.rnk'", "heal.rank"]),
        (["ranking", "heal.rank=0"], ["heal.rank is '0'", "at least 1"]),
        (["rank", "heal.rank=3"], ["heal.rank is set by study rank itself"]),
        (["rank", "seed=3"], ["seed is set by study rank itself"]),
        (["rank", "run=mine"], ["run is set by study rank itself"]),
        (["rank", "seeds=0"], ["seeds is '0'", "at least 1"]),
        (["rank", "trait=nowhere"], ["no trait 'nowhere'"]),
        (["rank", "model=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["rank", "evaluate.suite=nowhere"], ["nowhere"]),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    given: list[str], parts: list[str], tmp_path: Path
) -> None:
    message = refusal(command(tmp_path, "study", *given))
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []
