"""The command line: help at once, one message and exit code 2 for what a person can put right."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.settings import valid_keys
from steer_heal.config import RunConfig
from tests.processes import Command, command, portable_settings, refusal, rounds_of, tree
from tests.tiny import tiny_model_folder

COMMANDS = (
    *("round", "report", "list", "compare", "judge", "export", "chat", "eval"),
    *("bench", "study", "lint", "doctor", "settings"),
)
HEAVY = ("torch", "transformers", "numpy", "peft", "trl", "matplotlib")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """Settings of a small run that would succeed; its files are in the test's own folder."""
    return portable_settings(tiny_model_folder(tmp_path, "qwen3"), tmp_path)


def _without(settings: list[str], *keys: str) -> list[str]:
    return [line for line in settings if line.partition("=")[0] not in keys]


def _refused(folder: Path, *arguments: str) -> str:
    """The message; nothing in the folder may have changed."""
    before = tree(folder)
    message = refusal(command(folder, *arguments))
    assert tree(folder) == before
    assert not (folder / "rounds" / "small" / "run.json").exists()
    return message


# ------------------------------------------------------------------------------------------- help


def test_help_answers_without_heavy_imports(tmp_path: Path) -> None:
    program = (
        "import json, sys; from typer.testing import CliRunner; from steer_heal.cli import app\n"
        f"calls = [['--help'], *([name, '--help'] for name in {COMMANDS!r})]\n"
        "done = [CliRunner().invoke(app, call) for call in calls]\n"
        f"heavy = sorted(set(sys.modules) & set({HEAVY!r}))\n"
        "print(json.dumps([[r.exit_code for r in done], [r.output for r in done], heavy]))\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    codes, pages, heavy = json.loads(done.stdout)
    assert codes == [0] * (1 + len(COMMANDS))
    assert heavy == []
    for name in COMMANDS:
        assert name in pages[0]
    assert "KEY=VALUE" in pages[1]
    assert "RUN" in pages[2]
    assert "FOLDER" in pages[3]
    assert "RUN" in pages[4]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_recipe(name: str) -> None:
    recipes = (Path(__file__).parents[1] / "justfile").read_text(encoding="utf-8")
    assert re.search(rf"^{name}\b.*: setup\n    @{{{{bin}}}}/steer-heal {name}\b", recipes, re.M)


def test_settings_lists_every_key(tmp_path: Path) -> None:
    done = command(tmp_path, "settings")
    assert done.code == 0
    listed = {line.partition("=")[0] for line in done.out.splitlines()}
    assert set(valid_keys(RunConfig)) <= listed


def test_unknown_command_is_refused(tmp_path: Path) -> None:
    done = command(tmp_path, "rond")
    assert done.code == 2
    assert "Traceback" not in done.err


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["heal.barier_weight=1"], ["unknown setting", "heal.barrier_weight"]),
        (["barrier_weight=0.3"], ["unknown setting", "heal.barrier_weight"]),
        (["heal.rank=0"], ["heal.rank is '0'", "at least 1"]),
        (["rounds=three"], ["rounds is 'three'", "whole number"]),
        (["three"], ["'three'", "KEY=VALUE"]),
        (["seed=1", "seed=1"], ["seed is given twice"]),
        (["pos=kind"], ["give both personas"]),
        (["run=a/b"], ["run is 'a/b'", "a name is made of letters"]),
    ],
)
def test_bad_setting_is_refused(given: list[str], parts: list[str], tmp_path: Path) -> None:
    message = _refused(tmp_path, "round", *given)
    for part in parts:
        assert part in message
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ model


def _drop_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _pickle_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _truncate_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _garble_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)


def _empty_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"")


def _drop_config(model: Path) -> None:
    (model / "config.json").unlink()


def _contradict_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 99}))


def _drop_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_drop_weights, ["no safetensors weights"]),
        (_pickle_weights, ["no safetensors weights", "are not loaded"]),
        (_truncate_weights, ["damaged"]),
        (_garble_weights, ["damaged"]),
        (_empty_weights, ["damaged"]),
        (_drop_config, ["no config.json"]),
        (_contradict_config, ["config cannot be loaded", "num_hidden_layers"]),
        (_drop_template, ["no chat template", "chat_template.jinja"]),
    ],
)
def test_model_that_cannot_be_used_is_refused(
    damage: Callable[[Path], None], parts: list[str], settings: list[str], tmp_path: Path
) -> None:
    damage(tmp_path / "tiny-qwen3")
    message = _refused(tmp_path, "round", *settings)
    for part in ["tiny-qwen3", *parts]:
        assert part in message


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("/nowhere/at/all", ["/nowhere/at/all", "neither a folder nor a hub id"]),
        ("no-such-maker/no-such-model", ["no-such-maker/no-such-model", "the hub", "HF_TOKEN"]),
        ("no-such-maker/no-such-model@v1", ["no-such-model@v1", "the hub"]),
    ],
)
def test_model_that_is_not_there_is_refused(
    model: str, parts: list[str], settings: list[str], tmp_path: Path
) -> None:
    message = _refused(tmp_path, "round", f"model={model}", *_without(settings, "model"))
    for part in parts:
        assert part in message


# ------------------------------------------------------------------------------- traits and suites


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name = ", "not TOML"),
        ('name = "x"', "required"),
        (None, "no trait"),
    ],
)
def test_trait_that_cannot_be_used_is_refused(
    text: str | None, part: str, settings: list[str], tmp_path: Path
) -> None:
    trait = tmp_path / "small.toml"
    trait.unlink() if text is None else trait.write_text(text)
    message = _refused(tmp_path, "round", *settings)
    assert str(trait) in message
    assert part in message


@pytest.mark.parametrize("name", ["choices.json", "tasks.json", "neutral.json"])
def test_suite_that_cannot_be_used_stops_a_run_at_once(
    name: str, settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("{")
    assert name in _refused(tmp_path, "round", *settings)


# ----------------------------------------------------------------------------------------- filter


def test_filter_that_drops_everything_says_what_did_it(settings: list[str], tmp_path: Path) -> None:
    changed = ["filter.min_enactment_nats=100", *_without(settings, "filter.min_enactment_nats")]
    message = refusal(command(tmp_path, "round", *changed))
    assert "the filter left 0 of 24 completions, 2 are needed" in message
    assert "'enactment'" in message
    assert "Try: " in message
    run = tmp_path / "rounds" / "small"
    assert (run / "round-00" / "drafts.jsonl").exists()  # what was done is kept
    assert not (run / "round-00" / "completions.jsonl").exists()
    assert not list(run.rglob(".tmp-*"))


# ---------------------------------------------------------------------------------- older versions


def _as_an_older_version_wrote_it(run: Path) -> None:
    """Takes the fields away that the evaluation got last, wherever they are saved and recorded."""
    gone = ("second_replies", "neutral")
    for file in ("base.json", "prompted.json", "engineered.json", "round-00/eval.json"):
        saved = json.loads((run / file).read_text())
        for rows in saved, saved.get("steered", {}), saved.get("healed", {}):
            for field in gone:
                rows.pop(field, None)
        (run / file).write_text(json.dumps(saved))
    for record in (run / "stages.json", run / "round-00" / "stages.json"):
        stages = json.loads(record.read_text())
        for stage in stages.values():
            for name in stage["files"]:
                content = (record.parent / name).read_bytes()
                stage["files"][name] = hashlib.sha256(content).hexdigest()
        record.write_text(json.dumps(stages))
    description = json.loads((run / "run.json").read_text())
    for setting in ("neutral", "num_dialogues", "controls"):
        del description["config"]["evaluate"][setting]
    del description["trait"]["second_turns"]
    (run / "run.json").write_text(json.dumps(description))


def test_run_of_an_older_version_is_named_and_left_alone(
    settings: list[str], tmp_path: Path
) -> None:
    rounds_of(tmp_path, 1, *settings)
    run = tmp_path / "rounds" / "small"
    _as_an_older_version_wrote_it(run)
    (tmp_path / "rounds" / "other").mkdir()
    before = tree(tmp_path)
    older = "was written by an older version of steer-heal, without"
    for arguments in (["report", "small"], ["compare", "small", "other"], ["eval", "small"]):
        message = refusal(command(tmp_path, *arguments))
        assert f"rounds/small/round-00/eval.json {older} steered.second_replies; " in message
        assert "run=NAME" in message
    message = refusal(command(tmp_path, "round", "N=2", *settings))
    assert f"rounds/small/run.json {older} evaluate.neutral, " in message
    assert "run=NAME" in message
    assert tree(tmp_path) == before


# ----------------------------------------------------------------------------------------- report


@pytest.mark.parametrize("name", ["report", "compare", "export"])
def test_run_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    runs = ["nowhere"] if name == "report" else ["nowhere", "nor-here"]
    assert "no run nowhere" in _refused(tmp_path, name, *runs)


@pytest.mark.parametrize("name", ["report", "compare", "export"])
def test_folder_that_is_no_run_is_refused(name: str, tmp_path: Path) -> None:
    for folder in ("empty", "too"):
        (tmp_path / "rounds" / folder).mkdir(parents=True)
    runs = {"report": ["empty"], "compare": ["empty", "too"], "export": ["empty", "out"]}[name]
    assert "is not a run" in _refused(tmp_path, name, *runs)


def test_report_of_a_run_without_a_finished_round_says_where_it_stands(
    settings: list[str], tmp_path: Path
) -> None:
    begun = Command(tmp_path, "round", *settings)
    begun.wait_for("round 1 (round-00): vector")
    begun.kill()
    before = tree(tmp_path)
    shown = command(tmp_path, "report", "small")
    assert shown.code == 0 and "no round is done yet; next: find the steering vector" in shown.err
    page = (tmp_path / "rounds" / "small" / "report.html").read_text(encoding="utf-8")
    assert "No round is finished yet" in page and "find the steering vector (round 1)" in page
    assert tree(tmp_path) == before


def test_what_reads_runs_alone_loads_no_model_library() -> None:
    program = (
        "import sys, steer_heal.listing, steer_heal.report, steer_heal.compare\n"
        "assert not {'transformers', 'peft', 'trl', 'accelerate'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# ------------------------------------------------------------------------------------ busy machines


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '2000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_threads_do_not_wait_long_for_those_that_do_not_run(
    asked: dict[str, str], expected: str
) -> None:
    """OpenMP itself says what it goes by when it is loaded; what a user asks for stays."""
    program = (
        "from eval.people import for_people\n"
        "with for_people('nothing was changed'):\n"
        "    import torch\n"
    )
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment | asked,
    )
    assert expected in done.stderr
