"""What artifacts are made of: frozen records, and how they are written and read.

Only safetensors and JSON are ever loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from eval.files import digest_of


class Record(BaseModel):
    """Values that do not change, all of them named."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(Record):
    """A record that a stage leaves behind."""

    stage: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    def digest(self) -> str:
        return digest_of([self.model_dump_json()])


class JsonArtifact(Artifact):
    """An artifact that is one JSON file."""

    def save(self, folder: Path) -> None:
        write_record(folder / self.files[0], self.model_dump())

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.model_validate_json((folder / cls.files[0]).read_text(encoding="utf-8"))


_Line = TypeVar("_Line", bound=Record)


def write_record(path: Path, value: Any) -> None:
    """Writes a value as JSON that people can read; a NaN in it is refused."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors by name as safetensors; the same bytes for the same tensors."""
    # Not save_file: on a full disk it raises an error of its own instead of an OSError. One key of
    # metadata, no more: safetensors writes several in random order, and bytes must be the same.
    path.write_bytes(save(dict(tensors), {"format": "pt"}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name.

    Raises:
        ValueError: the file is not whole.
    """
    try:
        return load_file(path)
    except SafetensorError as error:  # of no common base with other errors
        raise ValueError(f"{path.name} is truncated or corrupt: {error}") from error


def write_lines(path: Path, rows: Iterable[Record]) -> None:
    """Writes a line of JSON a row."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path, kind: type[_Line]) -> tuple[_Line, ...]:
    """The rows of such a file."""
    # not splitlines: a completion may hold U+2028 or U+0085, which JSON leaves as they are
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return tuple(kind.model_validate_json(line) for line in lines if line)
