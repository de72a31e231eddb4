"""Stages that several runs have in common: made once, copied into the others.

    <folder>/<stage>-<key>/    the stage's files as a run has them, and hashes.json

    key = hash over what went into the stage and what it is made with

What it is made with: the source, the library versions, the device, the number of threads and of
processes. So what is copied are the bytes that would have been made.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.errors import UserError
from eval.files import (
    NOT_AS_WRITTEN,
    digest_of,
    disk_errors,
    file_hash,
    move_folder_into_place,
    read_json,
    scratch_folder,
    write_json,
)
from eval.processes import count

_HASHES_FILE = "hashes.json"


@dataclass(frozen=True, kw_only=True)
class StageCache:
    """A folder of stages."""

    folder: Path
    made_with: str  # hash: files that were made with something else are other files

    def fetch(self, stage: str, inputs: str, files: Sequence[str], into: Path) -> bool:
        """Copies a stage's files into a folder; False where nobody has made them.

        Args:
            inputs: fingerprint of what goes into the stage.
        Raises:
            UserError: a file there is not what was written.
        """
        entry = self._entry(stage, inputs)
        if not entry.is_dir():
            return False
        for name in files:
            (into / name).parent.mkdir(exist_ok=True)
            if not _copied(entry, name, into):
                raise UserError(f"{entry / name} {NOT_AS_WRITTEN}; take the folder {entry} away")
        return True

    def put(self, stage: str, inputs: str, files: Sequence[str], made: Path) -> None:
        """Copies a stage's files from the folder that they were made in."""
        entry = self._entry(stage, inputs)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with scratch_folder(self.folder) as scratch:
                target = scratch / entry.name
                for name in files:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(made / name, target / name)
                write_json(target / _HASHES_FILE, {name: file_hash(made / name) for name in files})
                try:
                    move_folder_into_place(target, entry)
                except OSError:  # another process was first, with the same bytes
                    if not entry.is_dir():
                        raise

    def _entry(self, stage: str, inputs: str) -> Path:
        return self.folder / f"{stage}-{digest_of([stage, inputs, self.made_with])[:32]}"


def open_cache(
    folder: str | None, description: Mapping[str, Any], device: Any
) -> StageCache | None:
    """The cache of a run that is described so; None where no folder is given.

    Args:
        device: that the model is on.
    """
    if folder is None:
        return None
    libraries = sorted(description["libraries"].items())
    workers = f"{torch.get_num_threads()} threads in each of {count()} processes"
    parts = [description["code"], repr(libraries), str(device), workers]
    return StageCache(folder=Path(folder).expanduser(), made_with=digest_of(parts))


def _copied(entry: Path, name: str, into: Path) -> bool:
    """Whether a file was there as it was written; it is copied if it was."""
    if not (entry / _HASHES_FILE).is_file() or not (entry / name).is_file():
        return False
    shutil.copyfile(entry / name, into / name)
    return file_hash(into / name) == read_json(entry / _HASHES_FILE).get(name)
