"""Vectors of others: read as written, or refused by file and reason. Nothing is unpickled."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eval.errors import UserError
from steer_heal.artifacts import SteeringVector
from steer_heal.vector_files import read_gguf, read_pt, read_vector, write_gguf

LAYERS, HIDDEN = 4, 6
DIRECTIONS = torch.arange(24.0).reshape(LAYERS, HIDDEN) / 7


def parsed(path: Path) -> dict[str, np.ndarray]:
    """Name -> values of a GGUF's fp32 tensors, by the format's own description, version 3."""
    raw, at = path.read_bytes(), 24
    magic, version, num_tensors, num_keys = struct.unpack_from("<4sIQQ", raw)
    assert (magic, version) == (b"GGUF", 3)

    def text() -> str:
        nonlocal at
        (length,) = struct.unpack_from("<Q", raw, at)
        at += 8 + length
        return raw[at - length : at].decode()

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(kind, raw, at)
        at += struct.calcsize(kind)
        return value

    keys = {}
    for _ in range(num_keys):
        name, kind = text(), number("<I")
        keys[name] = text() if kind == 8 else number("<I")
    assert keys["general.architecture"] == "controlvector"
    assert keys["controlvector.model_hint"] == "qwen3"
    assert keys["controlvector.layer_count"] == num_tensors
    places = {}
    for _ in range(num_tensors):
        name, num_dimensions = text(), number("<I")
        assert num_dimensions == 1  # else llama.cpp refuses it
        length, kind, offset = number("<Q"), number("<I"), number("<Q")
        assert kind == 0  # fp32
        places[name] = (length, offset)
    start = (at + 31) // 32 * 32
    return {
        name: np.frombuffer(raw, "<f4", length, start + offset)
        for name, (length, offset) in places.items()
    }


def test_llama_cpp_finds_each_direction_where_it_looks(tmp_path: Path) -> None:
    """Its buffer's row 0 is of layer 1: what it adds to layer l is named l, counted from 0."""
    path = tmp_path / "vector.gguf"
    write_gguf({3: DIRECTIONS[3], 1: DIRECTIONS[1]}, path, "qwen3")
    found = parsed(path)
    assert sorted(found) == ["direction.1", "direction.3"]
    for layer in (1, 3):
        assert found[f"direction.{layer}"].tolist() == DIRECTIONS[layer].tolist()
    read = read_gguf(path, num_layers=LAYERS, hidden=HIDDEN)
    assert list(read) == [1, 3]
    assert all(torch.equal(read[layer], DIRECTIONS[layer]) for layer in read)


def test_the_same_vector_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf({1: DIRECTIONS[1], 2: DIRECTIONS[2]}, tmp_path / name, "qwen3")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_layer_0_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layer 0, which llama.cpp cannot steer"):
        write_gguf(dict(enumerate(DIRECTIONS)), tmp_path / "vector.gguf", "qwen3")
    assert list(tmp_path.iterdir()) == []


def written(
    path: Path, tensors: dict[str, Any], architecture: str = "controlvector", **keys: int
) -> Path:
    """A GGUF as repeng writes one: directions of any layers, in any order."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "qwen3")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, value in tensors.items():
        writer.add_tensor(name, np.asarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_vector_of_repengs_is_read(tmp_path: Path) -> None:
    """It goes from the last layer down, and leaves out layer 0."""
    tensors = {f"direction.{layer}": DIRECTIONS[layer] for layer in (3, 2, 1)}
    found = read_gguf(written(tmp_path / "repeng.gguf", tensors), num_layers=LAYERS, hidden=HIDDEN)
    assert list(found) == [1, 2, 3]
    assert all(torch.equal(found[layer], DIRECTIONS[layer]) for layer in found)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction.1": np.ones(HIDDEN + 1)}, r"layer 1 is \[7\].*hidden size is 6"),
        ({"direction.1": np.ones((2, 3))}, r"layer 1 is \[2, 3\]"),
        ({"direction.4": np.ones(HIDDEN)}, "layer 4 is not among the model's 4 layers"),
        ({"direction.0": np.ones(HIDDEN)}, "'direction.0' is no direction of a layer from 1 on"),
        ({"direction.-1": np.ones(HIDDEN)}, "'direction.-1' is no direction"),
        ({"../direction.1": np.ones(HIDDEN)}, "'../direction.1' is no direction"),
        ({"direction.1": np.full(HIDDEN, np.nan)}, "layer 1 is not finite"),
        ({}, "holds no direction"),
    ],
)
def test_a_gguf_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "odd.gguf", tensors)
    with pytest.raises(UserError, match=message) as refused:
        read_gguf(path, num_layers=LAYERS, hidden=HIDDEN)
    assert str(path) in str(refused.value)


def test_a_gguf_of_a_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", {"direction.1": np.ones(HIDDEN)}, "qwen3")
    with pytest.raises(UserError, match=r"GGUF file of 'qwen3', not a control vector"):
        read_gguf(path, num_layers=LAYERS, hidden=HIDDEN)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.95])
def test_a_gguf_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    tensors = {f"direction.{layer}": np.ones(HIDDEN) for layer in (1, 2, 3)}
    raw = written(tmp_path / "whole.gguf", tensors).read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError, match=r"short\.gguf cannot be read as GGUF"):
        read_gguf(path, num_layers=LAYERS, hidden=HIDDEN)


# --------------------------------------------------------------------------------------------- .pt


def test_tensors_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(DIRECTIONS.half(), tmp_path / "all.pt")
    torch.save({"vector": DIRECTIONS[2], "dose": 0.5}, tmp_path / "one.pt")
    every = read_pt(tmp_path / "all.pt", num_layers=LAYERS, hidden=HIDDEN)
    assert list(every) == [0, 1, 2, 3]
    assert all(torch.equal(every[layer], DIRECTIONS.half().float()[layer]) for layer in every)
    one = read_pt(tmp_path / "one.pt", num_layers=LAYERS, hidden=HIDDEN, layer=2)
    assert list(one) == [2] and torch.equal(one[2], DIRECTIONS[2])


class Trap:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_an_object_in_it_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"vector": DIRECTIONS[1], "more": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match=r"trap\.pt cannot be read as tensors alone"):
        read_pt(tmp_path / "trap.pt", num_layers=LAYERS, hidden=HIDDEN, layer=1)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "layer", "message"),
    [
        (DIRECTIONS[0], None, "say which layer"),
        (DIRECTIONS[0], 4, "layer 4 is not among the model's 4"),
        (DIRECTIONS[:3], None, r"is \[3, 6\], a row for each of 4 layers"),
        (torch.ones(LAYERS + 1, HIDDEN), None, "where row 0 is of the embeddings"),
        (DIRECTIONS[:, :5], None, r"layer 0 is \[5\]"),
        (DIRECTIONS * float("inf"), None, "not finite"),
        (torch.ones(LAYERS, HIDDEN, dtype=torch.long), None, "int64"),
        ({"direction": DIRECTIONS}, None, "holds neither a tensor nor"),
        (["vector"], None, "holds neither a tensor nor"),
    ],
)
def test_a_pt_that_does_not_fit_is_refused(
    tmp_path: Path, content: Any, layer: int | None, message: str
) -> None:
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match=message) as refused:
        read_pt(path, num_layers=LAYERS, hidden=HIDDEN, layer=layer)
    assert str(path) in str(refused.value)


# --------------------------------------------------------------------------------------------- own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    several = (1.0,) * LAYERS
    SteeringVector(
        directions=DIRECTIONS,
        band=(1, 2),
        norms=several,
        residual_norms=several,
        auc=several,
        pairwise_cosine=several,
        num_pairs=8,
        weights_hash="abc",
    ).save(tmp_path)
    return tmp_path


def test_our_own_is_read(folder: Path) -> None:
    found = read_vector(folder, "abc")
    assert torch.equal(found.directions, DIRECTIONS) and found.band == (1, 2)


def sidecar(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "vector.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def tensors(value: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file({"directions": value}, folder / "vector.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sidecar(weights_hash="abd"), "other weights"),
        (sidecar(operation="project out"), "does not say operation: 'add'"),
        (sidecar(site="attention output"), "does not say site"),
        (sidecar(token="mean of the reply"), "does not say token"),
        (sidecar(band=[1, 4]), "its band has layers"),
        (sidecar(norms=[1.0] * 3), "layer 3 is not among the model's 3 layers"),
        (sidecar(more=1), "no steering vector of ours"),
        (tensors(DIRECTIONS * float("nan")), "not finite"),
        (lambda folder: (folder / "vector.json").unlink(), "holds no vector.json"),
        (lambda folder: (folder / "vector.json").write_text("[]"), "does not say operation"),
        (
            lambda folder: (folder / "vector.safetensors").write_bytes(b"\0" * 64),
            "truncated or corrupt",
        ),
    ],
)
def test_our_own_with_another_sidecar_is_refused(
    folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        read_vector(folder, "abc")
