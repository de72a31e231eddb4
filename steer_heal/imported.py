"""A steering vector from elsewhere, as a run takes it in before its first round.

In every round it stands in the place of the mean difference, as it was given: its own norm, the
same direction however far the student has gone. The run keeps a copy, and refuses another vector
under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save

from eval.errors import UserError
from eval.files import digest_of
from steer_heal.config import VectorConfig
from steer_heal.model import Student
from steer_heal.stages import Stages
from steer_heal.vector_files import Directions, read_gguf, read_pt, read_vector


@dataclass(frozen=True, kw_only=True)
class ImportedVector:
    """Directions of the layers that are steered."""

    directions: Mapping[int, torch.Tensor]  # decoder layer, from 0, ascending -> [hidden] fp32

    stage: ClassVar[str] = "imported"
    files: ClassVar[tuple[str, ...]] = ("imported.safetensors",)

    @property
    def band(self) -> list[int]:
        return list(self.directions)

    def filled(self, num_layers: int) -> torch.Tensor:
        """A row for each layer, 0 where none is steered: [layers, hidden]."""
        rows = torch.zeros(num_layers, len(self.directions[self.band[0]]))
        rows[self.band] = torch.stack(list(self.directions.values()))
        return rows

    def save(self, folder: Path) -> None:
        tensors = {f"direction.{layer}": each for layer, each in self.directions.items()}
        (folder / self.files[0]).write_bytes(save(tensors, {"format": "pt"}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        tensors = load_file(folder / cls.files[0])
        layers = {int(name.rpartition(".")[2]): each for name, each in tensors.items()}
        return cls(directions=dict(sorted(layers.items())))

    def digest(self) -> str:
        return digest_of(
            f"{n} {each.numpy().tobytes().hex()}" for n, each in self.directions.items()
        )


def take_vector(run: Stages, student: Student, config: VectorConfig) -> ImportedVector | None:
    """The vector that a run is given; None where it takes its own from the personas.

    Raises:
        UserError: it cannot be used, or it is another one than the run was begun with.
    """
    if config.file is None:
        return None
    return run.once(ImportedVector, lambda read: read, import_vector(student, config))


def import_vector(student: Student, config: VectorConfig) -> ImportedVector:
    """Reads `config.file` for this student's model: the layers of the band, or what the file says.

    Raises:
        UserError: no such file, of no kind that is known, unfit for the model, of other weights,
            without a layer of the band, or 0 in all of it.
    """
    assert config.file is not None
    path = Path(config.file).expanduser()
    found = _read(path, student, config)
    if not any(bool(each.any()) for each in found.values()):
        raise UserError(f"{path}: the vector is 0 in the layers {list(found)}, which are steered")
    return ImportedVector(directions=found)


def _read(path: Path, student: Student, config: VectorConfig) -> Directions:
    """The directions to be steered along."""
    loaded = student.loaded
    num_layers = len(loaded.layers)
    hidden = loaded.model.config.get_text_config(decoder=True).hidden_size
    if path.is_dir():
        vector = read_vector(path, loaded.weights_hash)
        return {layer: vector.directions[layer] for layer in vector.band}
    if path.suffix == ".gguf":
        every = read_gguf(path, num_layers=num_layers, hidden=hidden)
    elif path.suffix == ".pt":
        every = read_pt(path, num_layers=num_layers, hidden=hidden, layer=config.layer)
    else:
        raise UserError(
            f"{path}: a vector is a folder with vector.json, as `just export RUN {path.name} "
            "as=vector` writes one, a control vector (.gguf), or a tensor of torch's (.pt)"
        )
    if config.layer is not None:
        return {config.layer: _of(every, config.layer, path)}
    return {layer: _of(every, layer, path) for layer in student.band(config.band)}


def _of(every: Directions, layer: int, path: Path) -> torch.Tensor:
    if layer not in every:
        raise UserError(
            f"{path} has no direction of layer {layer}, which is steered (it has "
            f"{', '.join(map(str, every))}); choose others with vector.band= or vector.layer="
        )
    return every[layer]
