"""A vector from elsewhere in a run: it is what steers, as it was given, in every round."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eval.errors import UserError
from steer_heal.config import resolve_config
from steer_heal.export import export
from steer_heal.imported import ImportedVector, import_vector
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.model import Student, load_student
from steer_heal.vector_files import read_gguf
from tests.conftest import TinyModel
from tests.small import small_settings

LAYERS, HIDDEN = 2, 32
DIRECTIONS = torch.sin(torch.arange(64.0)).reshape(LAYERS, HIDDEN)


@pytest.fixture(scope="module")
def student(tiny_qwen3: TinyModel) -> Student:
    return load_student(str(tiny_qwen3.folder), [], "cpu")


@pytest.fixture(scope="module")
def run(tiny_qwen3: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of the trait's own vector at layer 1."""
    return ran(tiny_qwen3, tmp_path_factory.mktemp("own"), "N=2")


def ran(tiny: TinyModel, folder: Path, *settings: str) -> Path:
    config = resolve_config([*small_settings(tiny.folder, folder), "vector.band=0.6,1", *settings])
    run_rounds(config, run_path(config))
    return run_path(config)


def imported(student: Student, file: Path, *settings: str) -> ImportedVector:
    settings = settings or ("vector.band=0.6,1",)
    return import_vector(student, resolve_config([f"vector.file={file}", *settings]).vector)


def directions(run: Path, round: int) -> torch.Tensor:
    return load_file(run / f"round-0{round}" / "vector.safetensors")["directions"]


def control_vector(path: Path, rows: dict[int, Any]) -> Path:
    """As llama.cpp and repeng have it."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "qwen3")
    writer.add_uint32("controlvector.layer_count", len(rows))
    for layer, row in rows.items():
        writer.add_tensor(f"direction.{layer}", np.asarray(row, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_exported_vector_steers_another_run_as_it_did_its_own(
    run: Path, tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    """The first round is the same to the byte; the second is steered by the first's vector."""
    export(run, tmp_path / "vector", ["as=vector", "round=1"])
    other = ran(tiny_qwen3, tmp_path, "N=2", f"vector.file={tmp_path / 'vector'}")
    for file in ("drafts.jsonl", "completions.jsonl", "adapter/adapter_model.safetensors"):
        assert (other / "round-00" / file).read_bytes() == (run / "round-00" / file).read_bytes()
    assert not torch.equal(directions(run, 1)[1], directions(run, 0)[1])
    for round in (0, 1):
        assert torch.equal(directions(other, round)[1], directions(run, 0)[1])
        assert not directions(other, round)[0].any()  # not steered, so not there


def test_a_control_vector_of_others_steers_a_run(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    file = control_vector(tmp_path / "theirs.gguf", {1: DIRECTIONS[1]})
    run = ran(tiny_qwen3, tmp_path, "N=1", f"vector.file={file}")
    assert torch.equal(directions(run, 0)[1], DIRECTIONS[1])
    kept = load_file(run / "imported.safetensors")
    assert list(kept) == ["direction.1"] and torch.equal(kept["direction.1"], DIRECTIONS[1])
    file.unlink()
    control_vector(file, {1: DIRECTIONS[0]})
    with pytest.raises(UserError, match=r"imported\.safetensors was made from other inputs"):
        ran(tiny_qwen3, tmp_path, "N=2", f"vector.file={file}")


def test_a_single_direction_is_of_the_layer_that_is_named(student: Student, tmp_path: Path) -> None:
    file = tmp_path / "one.pt"
    torch.save({"vector": DIRECTIONS[1].half()}, file)
    found = imported(student, file, "vector.layer=0")
    assert found.band == [0]
    expected = torch.stack([DIRECTIONS[1].half().float(), torch.zeros(HIDDEN)])
    assert torch.equal(found.filled(LAYERS), expected)
    with pytest.raises(UserError, match="say which layer"):
        imported(student, file)


def test_of_a_file_of_all_layers_the_band_is_taken(student: Student, tmp_path: Path) -> None:
    torch.save(DIRECTIONS, tmp_path / "all.pt")
    for settings, band in (((), [1]), (("vector.band=0,1",), [0, 1]), (("vector.layer=0",), [0])):
        found = imported(student, tmp_path / "all.pt", *settings)
        assert found.band == band
        assert torch.equal(found.filled(LAYERS)[band], DIRECTIONS[band])


def test_one_that_points_away_is_told(run: Path, tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    logs = {}
    for sign in (1, -1):
        file = tmp_path / f"{sign}.pt"
        torch.save(sign * directions(run, 0), file)
        folder = tmp_path / f"with {sign}"
        folder.mkdir()
        ran_with = ran(tiny_qwen3, folder, "N=1", f"vector.file={file}")
        logs[sign] = (ran_with / "log.txt").read_text()
    assert "cosine 1.00 with the personas' mean difference" in logs[1]
    assert "points away" not in logs[1]
    assert "points away from the positive persona (cosine -1.00)" in logs[-1]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ({1: DIRECTIONS[1]}, ("vector.band=0,1",), r"no direction of layer 0, .*it has 1\)"),
        ({1: DIRECTIONS[1]}, ("vector.layer=0",), "no direction of layer 0"),
        ({1: np.zeros(HIDDEN)}, (), r"the vector is 0 in the layers \[1\]"),
        ({1: np.ones(HIDDEN + 1)}, (), "hidden size is 32"),
        ({5: np.ones(HIDDEN)}, (), "layer 5 is not among the model's 2 layers"),
    ],
)
def test_what_does_not_fit_is_refused(
    student: Student, tmp_path: Path, rows: dict[int, Any], settings: Any, message: str
) -> None:
    file = control_vector(tmp_path / "odd.gguf", rows)
    with pytest.raises(UserError, match=message) as refused:
        imported(student, file, *settings)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone.gguf", "there is no such file"), ("vector.npy", "a vector is a folder with")],
)
def test_nothing_is_begun_with_a_file_that_is_not_there_or_unknown(
    tiny_qwen3: TinyModel, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "vector.npy").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        ran(tiny_qwen3, tmp_path, f"vector.file={tmp_path / name}")
    run = tmp_path / "rounds" / "small"
    assert not (run / "imported.safetensors").exists() and not list(run.glob("round-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["vector.file=a.pt", "vector.direction=random"], "vector.file gives the direction"),
        (["vector.layer=1"], "vector.layer is of a vector.file"),
        (["vector.file="], "vector.file"),
    ],
)
def test_settings_that_contradict_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_config(settings)


# ------------------------------------------------------------------------------------------- repeng

REPENG = ("repeng==0.4.0", "numpy==1.26.4")
_ITS_NEEDS = (
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "joblib==1.6.0",
    "cloudpickle==3.1.2",
    "threadpoolctl==3.8.0",
)
_TRAINS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from repeng import ControlModel, ControlVector, DatasetEntry
import numpy
assert numpy.__version__.startswith("1."), numpy.__version__
model_folder, ours, theirs, back = sys.argv[1:]
read = ControlVector.import_gguf(ours)
torch.save({str(k): torch.tensor(v) for k, v in read.directions.items()}, back)
tokenizer = AutoTokenizer.from_pretrained(model_folder)
tokenizer.pad_token_id = tokenizer.pad_token_id or 0
model = ControlModel(AutoModelForCausalLM.from_pretrained(model_folder), [1])
pairs = [DatasetEntry(f"You care for {w}", f"You obey {w}") for w in "abcdefgh"]
vector = ControlVector.train(model, tokenizer, pairs, batch_size=4)
vector.export_gguf(theirs)
torch.save({str(k): torch.tensor(v) for k, v in vector.directions.items()}, back + ".theirs")
"""


@pytest.fixture(scope="module")
def repeng_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own, with numpy 1; torch and transformers are those of this one."""
    folder = tmp_path_factory.mktemp("repeng")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    Path(own, "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    quiet = ["-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([python, "-m", "pip", "install", *quiet, *REPENG, *_ITS_NEEDS], check=True)
    return python


@pytest.mark.slow
def test_repeng_reads_ours_and_a_run_reads_what_repeng_trained(
    run: Path, repeng_python: Path, tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    ours, theirs, back = (tmp_path / name for name in ("ours.gguf", "theirs.gguf", "back.pt"))
    export(run, ours, ["as=gguf-vector", "round=1"])
    arguments = [tiny_qwen3.folder, ours, theirs, back]
    subprocess.run([repeng_python, "-c", _TRAINS, *arguments], check=True)
    read = torch.load(back, weights_only=True)
    assert list(read) == ["1"] and torch.equal(read["1"], directions(run, 0)[1])
    trained = torch.load(f"{back}.theirs", weights_only=True)
    found = read_gguf(theirs, num_layers=LAYERS, hidden=HIDDEN)
    assert {str(layer) for layer in found} == set(trained)
    steered = ran(tiny_qwen3, tmp_path, "N=1", f"vector.file={theirs}")
    assert torch.equal(directions(steered, 0)[1], trained["1"].float())
