"""Runs that are killed, stopped, damaged or short of disk go on to the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import (
    REPORT_FILES,
    Command,
    Fate,
    command,
    portable_settings,
    refusal,
    rewind,
    rounds_of,
    tree,
)
from tests.tiny import tiny_model, tiny_model_folder, tiny_tokenizer

RUN = Path("rounds") / "small"
FRESH = "from steer_heal.cli import main; main()"
ARTIFACTS = [
    "limits.json",
    "base.json",
    "prompted.json",
    "engineered.json",
    "random.json",
    "round-00/vector.safetensors",
    "round-00/vector.json",
    "round-01/vector.safetensors",
    "round-01/vector.json",
    "round-01/probe.json",
    "round-01/drafts.jsonl",
    "round-01/completions.jsonl",
    "round-01/dose.json",
    "round-01/adapter/adapter_model.safetensors",
    "round-01/adapter/adapter_config.json",
    "round-01/train.jsonl",
    "round-00/eval.json",
]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A run of two rounds that nothing disturbed, and the same run after its first round."""

    settings: list[str]
    one: Path  # working folders: the run is in rounds/small
    two: Path

    @property
    def files(self) -> dict[str, bytes]:
        return tree(self.two / RUN)

    def copy(self, rounds: Path, folder: Path) -> Path:
        shutil.copytree(rounds, folder)
        return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    folder = tmp_path_factory.mktemp("reference")
    settings = portable_settings(tiny_model_folder(folder, "qwen3"), folder)
    made = Reference(settings=settings, one=folder / "one", two=folder / "two")
    made.two.mkdir()
    arguments = [sys.executable, "-c", FRESH, "round", "N=2", *settings]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        arguments, cwd=made.two, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rounds_of(made.one, 1, *settings)
    before = tree(folder)
    yield made
    assert tree(folder) == before  # no test wrote into what the others start from


def test_reference_is_whole(reference: Reference) -> None:
    files = reference.files
    assert set(ARTIFACTS) <= set(files)
    assert {"run.json", "round-00/DONE", "round-01/DONE"} <= set(files)
    first, second = (files[f"round-0{n}/adapter/adapter_model.safetensors"] for n in (0, 1))
    assert first != second
    for path in (reference.two / RUN).rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


# ------------------------------------------------------------------------------------------- kill


KILLS = {  # stage -> what the process says when it is in the middle of it
    "limits": ("run small: limits", "stages.json"),
    "controls": ("run small: controls", "stages.json"),
    "vector": ("round 2 (round-01): vector", "round-01/stages.json"),
    "drafts": ("round 2 (round-01): drafts", "round-01/stages.json"),
    "screened": ("round 2 (round-01): screened", "round-01/stages.json"),
    "adapter": ("heal 3/8", "round-01/stages.json"),
    "eval": ("round 2 (round-01): eval", "round-01/stages.json"),
}


def _stopped_in(
    stage: str, number: signal.Signals, reference: Reference, tmp_path: Path
) -> tuple[Path, int, str]:
    """A run that got a signal in the middle of a stage; a signal that came too late is resent."""
    line, record = KILLS[stage]
    for attempt in range(5):
        folder = tmp_path / f"try-{attempt}"
        if stage not in ("limits", "controls"):
            reference.copy(reference.one, folder)
        running = Command(folder, "round", "N=2", *reference.settings)
        running.wait_for(line)
        running.send(number)
        finished = running.end()
        recorded = folder / RUN / record
        if not recorded.exists() or f'"{stage}"' not in recorded.read_text():
            return folder, finished.code, finished.err
    raise AssertionError(f"{stage} was over each time the signal came")


@pytest.mark.parametrize("stage", KILLS)
def test_killed_in_a_stage_ends_with_the_same_bytes(
    stage: str, reference: Reference, tmp_path: Path
) -> None:
    folder, code, _ = _stopped_in(stage, signal.SIGKILL, reference, tmp_path)
    assert code == -signal.SIGKILL
    assert not (folder / RUN / "round-01" / "DONE").exists()

    said = rounds_of(folder, 2, *reference.settings)

    assert KILLS[stage][0].split(" [")[0] in said  # the stage was run again
    assert tree(folder / RUN) == reference.files
    assert not list((folder / RUN).rglob(".tmp-*"))


@pytest.mark.parametrize("line", ["run small: unbarred", "unbarred: vignettes"])
def test_killed_in_the_control_without_the_barrier_ends_with_the_same_bytes(
    line: str, reference: Reference, tmp_path: Path
) -> None:
    settings = [*reference.settings, "evaluate.controls=full"]
    rounds_of(tmp_path / "whole", 1, *settings)
    killed = Command(tmp_path / "killed", "round", "N=1", *settings)
    killed.wait_for(line)
    assert killed.kill().code == -signal.SIGKILL
    assert not (tmp_path / "killed" / RUN / "unbarred.json").exists()

    said = rounds_of(tmp_path / "killed", 1, *settings)

    assert line in said and "run small: controls" not in said
    whole, again = (tree(tmp_path / name / RUN) for name in ("whole", "killed"))
    assert "unbarred.json" in whole and whole == again
    others = {"run.json", "stages.json", "round-00/stages.json"}  # they say what was asked for
    for name in set(reference.files) & set(whole) - others:
        assert whole[name] == reference.files[name], name


@pytest.mark.parametrize(
    ("fate", "left", "missing"),
    [
        (Fate(dies_before="round-01/dose.json"), "completions.jsonl", "dose.json"),
        (
            Fate(
                dies_before="round-01/stages.json", dies_after="rounds/small/round-01/train.jsonl"
            ),
            "train.jsonl",
            "eval.json",
        ),
        (Fate(dies_before="round-01/DONE"), "eval.json", "DONE"),
    ],
    ids=["between two files", "before the record", "before the marker"],
)
def test_killed_between_writes_ends_with_the_same_bytes(
    fate: Fate, left: str, missing: str, reference: Reference, tmp_path: Path
) -> None:
    folder = reference.copy(reference.one, tmp_path / "work")
    killed = command(folder, "round", "N=2", *reference.settings, fate=fate)
    assert killed.code == -signal.SIGKILL
    assert (folder / RUN / "round-01" / left).exists()
    assert not (folder / RUN / "round-01" / missing).exists()
    assert list((folder / RUN).rglob(".tmp-*"))  # what a killed process cannot take away

    rounds_of(folder, 2, *reference.settings)

    assert tree(folder / RUN) == reference.files
    assert not list((folder / RUN).rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("stage", "number", "name"),
    [
        ("adapter", signal.SIGINT, "Ctrl-C"),
        ("eval", signal.SIGINT, "Ctrl-C"),
        ("adapter", signal.SIGTERM, "SIGTERM"),
    ],
)
def test_a_run_that_is_stopped_says_how_to_go_on(
    stage: str, number: signal.Signals, name: str, reference: Reference, tmp_path: Path
) -> None:
    folder, code, said = _stopped_in(stage, number, reference, tmp_path)

    assert code == 128 + number
    assert said.splitlines()[-1] == "stopped; the same command goes on from there"
    log = (folder / RUN / "log.txt").read_text()
    assert log.splitlines()[-1].endswith(f"stopped by {name}; the same command goes on from there")
    assert "stopped by" not in said
    assert "Traceback" not in said
    assert not list((folder / RUN).rglob(".tmp-*"))
    rounds_of(folder, 2, *reference.settings)
    assert tree(folder / RUN) == reference.files


# ---------------------------------------------------------------------------------- again, further


def _artifacts(folder: Path) -> list[Path]:
    return [folder / RUN / name for name in tree(folder / RUN)]


def test_same_command_on_a_finished_run_does_nothing(reference: Reference, tmp_path: Path) -> None:
    folder = reference.copy(reference.two, tmp_path / "work")
    times = {path: path.stat().st_mtime_ns for path in _artifacts(folder)}

    again = command(folder, "round", "N=2", *reference.settings)

    assert again.code == 0
    assert "run small is done: 2 rounds" in again.err
    assert {path: path.stat().st_mtime_ns for path in _artifacts(folder)} == times
    for name in REPORT_FILES:
        assert (folder / RUN / name).read_bytes() == (reference.two / RUN / name).read_bytes()


def test_fewer_rounds_than_are_there_changes_nothing(reference: Reference, tmp_path: Path) -> None:
    folder = reference.copy(reference.two, tmp_path / "work")
    running = Command(folder, "round", "N=1", *reference.settings)
    running.wait_for("run small is done: 2 rounds")
    running.kill()
    assert tree(folder / RUN) == reference.files


def test_more_rounds_go_on_from_the_last(reference: Reference, tmp_path: Path) -> None:
    folder = reference.copy(reference.one, tmp_path / "work")
    times = {path: path.stat().st_mtime_ns for path in (folder / RUN / "round-00").rglob("*")}
    said = rounds_of(folder, 2, *reference.settings)
    assert "round 1 (round-00):" not in said
    assert {p: p.stat().st_mtime_ns for p in (folder / RUN / "round-00").rglob("*")} == times
    assert tree(folder / RUN) == reference.files


def test_same_seed_same_bytes_other_seed_other_bytes(reference: Reference, tmp_path: Path) -> None:
    assert command(tmp_path / "same", "round", "N=2", *reference.settings).code == 0
    assert tree(tmp_path / "same" / RUN) == reference.files
    for name in REPORT_FILES:
        again = (tmp_path / "same" / RUN / name).read_bytes()
        assert again == (reference.two / RUN / name).read_bytes()

    rounds_of(tmp_path / "other", 2, "seed=1", *reference.settings)
    other = tree(tmp_path / "other" / RUN)
    assert set(other) == set(reference.files)
    same = {name for name, content in other.items() if content == reference.files[name]}
    assert not [name for name in same if name.endswith((".safetensors", ".jsonl", "eval.json"))]


# --------------------------------------------------------------------------------------- refusals


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _edit(path: Path) -> None:
    """Another byte in the middle: the length stays, JSON stays JSON."""
    content = bytearray(path.read_bytes())
    digits = [place for place, byte in enumerate(content) if chr(byte) in "123456789"]
    place = digits[len(digits) // 2]
    content[place] = ord("1") if content[place] != ord("1") else ord("2")
    path.write_bytes(content)


DAMAGES: list[Callable[[Path], None]] = [_truncate, _edit, Path.unlink]


@pytest.mark.parametrize("number", range(len(ARTIFACTS)), ids=ARTIFACTS)
def test_damaged_artifact_is_refused_by_name(
    number: int, reference: Reference, tmp_path: Path
) -> None:
    name = ARTIFACTS[number]
    folder = reference.copy(reference.two, tmp_path / "work")
    if number % 2:  # as well in a round that is not finished
        (folder / RUN / "round-01" / "DONE").unlink()
    DAMAGES[number % 3](folder / RUN / name)
    before = tree(folder / RUN)

    message = refusal(command(folder, "round", "N=2", *reference.settings))

    assert f"{RUN / name} " in message
    assert "is gone" in message or "is not what was written there" in message
    assert tree(folder / RUN) == before


@pytest.mark.parametrize("text", ["", "[]", '{"vector": {}}', "\udcff"])
@pytest.mark.parametrize("name", ["run.json", "stages.json", "round-01/stages.json"])
def test_record_that_is_none_is_refused_and_can_be_made_again(
    name: str, text: str, reference: Reference, tmp_path: Path
) -> None:
    folder = reference.copy(reference.two, tmp_path / "work")
    (folder / RUN / name).write_bytes(text.encode(errors="surrogateescape"))
    before = tree(folder / RUN)
    message = refusal(command(folder, "round", "N=2", *reference.settings))
    assert f"{RUN / name} is not what was written there" in message
    assert "away" in message
    assert tree(folder / RUN) == before


@pytest.mark.parametrize(
    ("damaged", "taken_away"),
    [
        ("base.json", "stages.json"),
        ("round-00/adapter/adapter_model.safetensors", "round-00/stages.json"),
        ("run.json", "run.json"),
    ],
)
def test_advice_of_the_message_brings_the_same_bytes_back(
    damaged: str, taken_away: str, reference: Reference, tmp_path: Path
) -> None:
    folder = reference.copy(reference.two, tmp_path / "work")
    _truncate(folder / RUN / damaged)
    message = refusal(command(folder, "round", "N=2", *reference.settings))
    assert f"take {RUN / taken_away} away" in message or "take it away" in message

    (folder / RUN / taken_away).unlink()

    assert command(folder, "round", "N=2", *reference.settings).code == 0
    assert tree(folder / RUN) == reference.files


def test_artifact_from_other_inputs_is_refused_by_name(
    reference: Reference, tmp_path: Path
) -> None:
    folder = reference.copy(reference.two, tmp_path / "work")
    first, second = (folder / RUN / f"round-0{n}" for n in (0, 1))
    adapter = first / "adapter" / "adapter_model.safetensors"
    old = hashlib.sha256(adapter.read_bytes()).hexdigest()
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x3c")
    record = (first / "stages.json").read_text()
    assert old in record
    new = hashlib.sha256(adapter.read_bytes()).hexdigest()
    (first / "stages.json").write_text(record.replace(old, new))
    (second / "DONE").unlink()
    before = tree(folder / RUN)

    message = refusal(command(folder, "round", "N=2", *reference.settings))

    assert f"{RUN / 'round-01' / 'vector.safetensors'} was made from other inputs" in message
    assert "run=NAME" in message
    assert tree(folder / RUN) == before


def test_config_change_is_refused_key_by_key(reference: Reference, tmp_path: Path) -> None:
    folder = reference.copy(reference.two, tmp_path / "work")
    before = tree(folder)
    changed = ["heal.barrier_weight=0.7", "generate.temperature=0.9", "seed=5"]
    message = refusal(command(folder, "round", "N=3", *reference.settings, *changed))
    for difference in (
        "heal.barrier_weight: 0.3 -> 0.7",
        "generate.temperature: 1.0 -> 0.9",
        "seed: 0 -> 5",
    ):
        assert difference in message
    assert "rounds" not in message.replace(str(RUN), "")  # more rounds are no other config
    assert "run=NAME" in message
    assert tree(folder) == before


def _other_weights(folder: Path) -> None:
    tiny_model("qwen3", tiny_tokenizer("qwen3"), seed=1).save_pretrained(folder / "tiny-qwen3")


def _other_trait(folder: Path) -> None:
    path = folder / "small.toml"
    path.write_text(path.read_text().replace("You care for people", "You look after people"))


def _other_suite(folder: Path) -> None:
    path = folder / "choices.json"
    path.write_text(path.read_text().replace("did wrong", "did right"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_weights, "weights"),
        (_other_trait, "the trait file has changed in positive"),
        (_other_suite, "suites"),
    ],
)
def test_other_content_under_the_same_name_is_refused(
    change: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    settings = portable_settings(tiny_model_folder(tmp_path, "qwen3"), tmp_path)
    begun = Command(tmp_path, "round", *settings)
    begun.wait_for("run small: limits")
    begun.kill()
    change(tmp_path)
    before = tree(tmp_path)
    message = refusal(command(tmp_path, "round", *settings))
    assert named in message
    assert tree(tmp_path) == {k: v for k, v in before.items() if "/.tmp-" not in k}


def test_run_that_a_process_holds_is_refused_until_it_is_dead(
    reference: Reference, tmp_path: Path
) -> None:
    folder = reference.copy(reference.one, tmp_path / "work")
    holder = Command(folder, "round", "N=2", *reference.settings)
    holder.wait_for("round 2 (round-01): vector")
    holder.send(signal.SIGSTOP)
    before = tree(folder / RUN)

    message = refusal(command(folder, "round", "N=2", *reference.settings))

    assert f"run {RUN} is being worked on by another process (PID {holder.pid}): wait" in message
    assert "run=NAME" in message
    assert tree(folder / RUN) == before
    assert holder.kill().code == -signal.SIGKILL
    assert (folder / RUN / ".lock").exists()  # the file stays, its hold does not
    rounds_of(folder, 2, *reference.settings)
    assert tree(folder / RUN) == reference.files


# ------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize(
    ("stage", "largest"),
    [("drafts", "drafts.jsonl"), ("adapter", "adapter/adapter_model.safetensors")],
)
def test_file_that_does_not_fit_costs_nothing_but_itself(
    stage: str, largest: str, reference: Reference, tmp_path: Path
) -> None:
    folder = reference.copy(reference.two, tmp_path / "work")
    size = (folder / RUN / "round-01" / largest).stat().st_size
    rewind(folder / RUN, 1, stage)
    (folder / RUN / "log.txt").unlink()
    before = tree(folder / RUN)
    fate = Fate(largest_file_bytes=size - 1)

    message = refusal(command(folder, "round", "N=2", *reference.settings, fate=fate))

    assert f"{RUN / 'round-01'}: File too large: make room on the disk and start again" in message
    assert tree(folder / RUN) == before
    rounds_of(folder, 2, *reference.settings)
    assert tree(folder / RUN) == reference.files


def test_log_on_a_full_disk_is_one_message(reference: Reference, tmp_path: Path) -> None:
    folder = reference.copy(reference.one, tmp_path / "work")
    (folder / RUN / "log.txt").unlink()
    (folder / RUN / "log.txt").symlink_to("/dev/full")
    message = refusal(command(folder, "round", "N=2", *reference.settings))
    assert "No space left on device: make room on the disk and start again" in message
    (folder / RUN / "log.txt").unlink()
    rounds_of(folder, 2, *reference.settings)
    assert tree(folder / RUN) == reference.files
