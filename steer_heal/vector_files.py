"""Steering vectors as files for others, and the files of others as vectors: {layer: [hidden]}.

    vector  vector.safetensors and its sidecar vector.json, as in a run
    GGUF    llama.cpp's control vector: `direction.<l>` is added to the output of decoder layer l,
            counted from 0. There is none for layer 0: the first row of its buffer is layer 1
            (llama_adapter_cvec::apply), and repeng gives its layers the same numbers
    .pt     a tensor [layers, hidden], or {"vector": [hidden]}; no object is unpickled

Layers are counted from 0 here. Nothing is scaled: a dose multiplies the raw vector. Every reader
checks what it reads against the model that it is for, and raises UserError with file and reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFWriter

from eval.errors import UserError
from eval.files import read_json
from steer_heal.artifacts import SteeringVector

_ARCHITECTURE = "controlvector"
# what a vector of ours always is: added elsewhere or otherwise it would be another one
_KIND = {"operation": "add", "site": "decoder layer output", "token": "last prompt token"}

Directions = dict[int, torch.Tensor]  # decoder layer, from 0 -> [hidden] fp32


def read_vector(folder: Path, weights_hash: str) -> SteeringVector:
    """Reads vector.safetensors and vector.json, for the model with these weights."""
    file = folder / "vector.json"
    if not file.is_file():
        raise UserError(f"{folder} holds no vector.json")
    sidecar = read_json(file)
    for key, ours in _KIND.items():
        if not isinstance(sidecar, dict) or sidecar.get(key) != ours:
            raise UserError(f"{file} does not say {key}: {ours!r}, which is what is added here")
    if sidecar.get("weights_hash") != weights_hash:
        raise UserError(f"{file}: the vector was taken from a model with other weights")
    try:
        vector = SteeringVector.load(folder)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{folder} is no steering vector of ours: {error}") from error
    if not all(0 <= layer < len(vector.norms) for layer in vector.band):
        raise UserError(f"{file}: its band has layers that its {len(vector.norms)} norms have not")
    hidden = vector.directions.shape[-1]
    every = dict(enumerate(vector.directions))
    _require_fitting(folder, every, num_layers=len(vector.norms), hidden=hidden)
    return vector


def write_gguf(directions: Mapping[int, torch.Tensor], path: Path, model_type: str) -> None:
    """Writes a llama.cpp control vector.

    Args:
        directions: decoder layer, from 0 -> [hidden]; only these layers are steered.
        model_type: of the model's config, such as qwen3: llama.cpp's hint, which nobody checks.
    Raises:
        UserError: layer 0 is among them.
    """
    if 0 in directions:
        raise UserError(
            "the vector is added at layer 0, which llama.cpp cannot steer; vector.band= takes "
            "later layers"
        )
    writer = GGUFWriter(path, _ARCHITECTURE)
    writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
    writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in sorted(directions.items()):
        writer.add_tensor(f"direction.{layer}", direction.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, *, num_layers: int, hidden: int) -> Directions:
    """Reads a control vector of llama.cpp's or repeng's for a model of this size."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field else None
        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    except Exception as error:  # the reader has none of its own: what it meets first is raised
        raise UserError(f"{path} cannot be read as GGUF: {error}") from error
    if architecture != _ARCHITECTURE:
        raise UserError(f"{path} is a GGUF file of {architecture!r}, not a control vector")
    directions = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"direction\.(\d{1,6})", name)
        if found is None or found[1] == "0":
            raise UserError(f"{path}: {name!r} is no direction of a layer from 1 on")
        directions[int(found[1])] = tensor
    return _require_fitting(path, directions, num_layers=num_layers, hidden=hidden)


def read_pt(path: Path, *, num_layers: int, hidden: int, layer: int | None = None) -> Directions:
    """Reads a tensor that `torch.save` wrote, for a model of this size.

    Args:
        layer: which one a single direction is of.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip or torch, by what is wrong with it
        raise UserError(
            f"{path} cannot be read as tensors alone; a file that holds other objects is not loaded"
        ) from error
    tensor = content.get("vector") if isinstance(content, dict) else content
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f'{path} holds neither a tensor nor {{"vector": tensor}}')
    if tensor.dim() == 1:
        if layer is None:
            raise UserError(f"{path} holds one direction; say which layer it is of")
        return _require_fitting(path, {layer: tensor}, num_layers=num_layers, hidden=hidden)
    if len(tensor) != num_layers:
        raise UserError(
            f"{path} is {list(tensor.shape)}, a row for each of {num_layers} layers is needed; "
            "where row 0 is of the embeddings, leave it out"
        )
    return _require_fitting(path, dict(enumerate(tensor)), num_layers=num_layers, hidden=hidden)


def _require_fitting(
    path: Path, directions: Directions, *, num_layers: int, hidden: int
) -> Directions:
    """The directions in fp32; refuses none at all, other sizes, and what is not finite."""
    if not directions:
        raise UserError(f"{path} holds no direction")
    for layer, direction in directions.items():
        if not 0 <= layer < num_layers:
            raise UserError(f"{path}: layer {layer} is not among the model's {num_layers} layers")
        if tuple(direction.shape) != (hidden,) or not direction.is_floating_point():
            raise UserError(
                f"{path}: the direction of layer {layer} is {list(direction.shape)} "
                f"{direction.dtype}; the model's hidden size is {hidden}"
            )
        if not direction.isfinite().all():
            raise UserError(f"{path}: the direction of layer {layer} is not finite")
    return {layer: direction.float() for layer, direction in sorted(directions.items())}
