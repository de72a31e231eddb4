"""Stages that leave their files in a folder, each run once.

A stage's files are written beside, flushed, and renamed, then `stages.json` records the fingerprint
of what went in and the hash of what came out. A stage that is recorded is loaded; one recorded with
another fingerprint, or whose files are not what was recorded, is refused by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

from loguru import logger
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from eval.errors import UserError
from eval.files import (
    NOT_AS_WRITTEN,
    digest_of,
    disk_errors,
    file_hash,
    move_into_place,
    scratch_folder,
    write_json,
)
from eval.processes import on_main
from steer_heal.cache import StageCache

STAGES_FILE = "stages.json"
WHAT_THEN = (
    "use the version that wrote it, or run again under another name with run=NAME: nothing in this "
    "run was changed"
)


class Artifact(Protocol):
    """What a stage leaves behind."""

    stage: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, folder: Path) -> Self: ...


@runtime_checkable
class Sampled(Protocol):
    """What a stage that samples leaves behind."""

    @property
    def num_tokens(self) -> int: ...


Value = TypeVar("Value", bound=Artifact)


class _StageRecord(BaseModel):
    """What stages.json says of a stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: str  # fingerprint of what went in
    files: dict[str, str]  # name -> SHA-256

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a file outside of the folder")
        return files


_RECORDS = TypeAdapter(dict[str, _StageRecord])


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a stage took, its files' writing included."""

    wall_s: float
    cpu_s: float  # of this process, all its threads together
    num_sampled: int | None  # tokens; None: it does not sample

    @property
    def tokens_a_s(self) -> float:
        return (self.num_sampled or 0) / self.wall_s


class Stages:
    """A folder in which stages leave their files, each once."""

    def __init__(
        self, path: Path, label: str, seed_path: tuple[Any, ...], cache: StageCache | None = None
    ) -> None:
        self.path = path
        self.label = label  # how messages call it
        self.cache = cache  # of stages that other runs have made already
        self._seed_path = seed_path
        self.spent: dict[str, Spent] = {}  # on each stage that ran in this process

    def seed(self, stage: str) -> int:
        """Seed of a stage's draws, from (run, round, stage): 31 bits."""
        return int(digest_of(map(str, [*self._seed_path, stage]))[:8], 16) >> 1

    def once(self, kind: type[Value], stage: Callable[..., Value], *inputs: Any) -> Value:
        """The stage's artifact: loaded if it is there from the same inputs, made if it is not."""
        name = kind.stage
        fingerprint = digest_of([name, *(_digest(value) for value in inputs)])
        start, start_cpu, sampled = time.monotonic(), time.process_time(), None
        found = self._find(kind, fingerprint)
        if found == "nowhere":
            logger.info("{}: {}", self.label, name)
            value = stage(*inputs)
            if isinstance(value, Sampled):
                sampled = value.num_tokens
            self._write(kind, value, fingerprint)
        if found != "here":
            self.spent[name] = Spent(
                wall_s=time.monotonic() - start,
                cpu_s=time.process_time() - start_cpu,
                num_sampled=sampled,
            )
        return self.read(kind)

    @property
    def spent_s(self) -> float:
        """Wall time of the stages that ran in this process."""
        return sum(spent.wall_s for spent in self.spent.values())

    def by_stage(self) -> str:
        """Where the time went, the longest first; of what samples, how fast.

        As `drafts 8.1 s (45 %, 1799 tokens/s), eval 6.0 s (33 %)`.
        """
        shares = []
        for name, spent in self._longest_first():
            rate = f", {spent.tokens_a_s:.0f} tokens/s" if spent.num_sampled else ""
            share = spent.wall_s / self.spent_s
            shares.append(f"{name} {spent.wall_s:.1f} s ({share:.0%}{rate})")
        return ", ".join(shares) or "no time: all its stages were there"

    def profile(self) -> list[str]:
        """The same as a table, with the CPU time of this process and the tokens sampled."""
        rows = [
            f"{name:<10}{spent.wall_s:>8.1f}{spent.wall_s / self.spent_s:>8.0%}{spent.cpu_s:>8.1f}"
            + (f"{spent.num_sampled:>8}{spent.tokens_a_s:>10.0f}" if spent.num_sampled else "")
            for name, spent in self._longest_first()
        ]
        return [
            f"{'stage':<10}{'wall s':>8}{'share':>8}{'CPU s':>8}{'tokens':>8}{'tokens/s':>10}",
            *rows,
        ]

    def _longest_first(self) -> list[tuple[str, Spent]]:
        return sorted(self.spent.items(), key=lambda item: -item[1].wall_s)

    @on_main
    def read(self, kind: type[Value]) -> Value:
        """A recorded artifact, checked against its recorded hashes.

        Raises:
            UserError: not recorded, gone, not what was written, or of another version.
        """
        recorded = self._recorded().get(kind.stage)
        if recorded is None:
            raise UserError(f"{self.path}: stage {kind.stage!r} has not been run")
        self._check(recorded)
        try:
            return kind.load(self.path)
        except (ValueError, TypeError, KeyError) as error:  # its bytes are right, its fields not
            raise UserError(_of_another_version(self.path / kind.files[0], error)) from error

    def check(self) -> None:
        """Refuses files of any stage that are not what was written."""
        for recorded in self._recorded().values():
            self._check(recorded)

    def _require_there(self, recorded: _StageRecord) -> None:
        for name in recorded.files:
            if not (self.path / name).is_file():
                raise UserError(f"{self.path / name} is gone; {self._how_to_redo()}")

    def _check(self, recorded: _StageRecord) -> None:
        self._require_there(recorded)
        for name, expected in recorded.files.items():
            path = self.path / name
            if file_hash(path) != expected:
                raise UserError(f"{path} {NOT_AS_WRITTEN}; {self._how_to_redo()}")

    def has(self, kind: type[Artifact]) -> bool:
        """Whether the stage has been run."""
        return kind.stage in self._recorded()

    def require_files(self) -> None:
        """Refuses where a file of a stage that has been run is gone; what is in them is not read.

        Raises:
            UserError: which one, and how to make it again.
        """
        for recorded in self._recorded().values():
            self._require_there(recorded)

    def recorded_stages(self) -> frozenset[str]:
        """Names of the stages that have been run."""
        return frozenset(self._recorded())

    @on_main
    def _find(
        self, kind: type[Artifact], fingerprint: str
    ) -> Literal["here", "in the cache", "nowhere"]:
        """Where a stage's files are; those that the cache has are taken from it.

        Raises:
            UserError: they are here, made from other inputs.
        """
        recorded = self._recorded().get(kind.stage)
        if recorded is None:
            if not self._fetch(kind, fingerprint):
                return "nowhere"
            logger.info("{}: {}, from the cache", self.label, kind.stage)
            return "in the cache"
        if recorded.inputs != fingerprint:
            raise UserError(
                f"{self.path / kind.files[0]} was made from other inputs than this run would give "
                "it (the model, an earlier stage or the code's settings changed); start another "
                "run with run=NAME, or take the old files away"
            )
        return "here"

    def _fetch(self, kind: type[Artifact], fingerprint: str) -> bool:
        """Takes the files of a stage from the cache; False: it has none from the same inputs."""
        if self.cache is None:
            return False
        with disk_errors(self.path), scratch_folder(self.path) as folder:
            found = self.cache.fetch(kind.stage, fingerprint, kind.files, folder)
            if found:
                self._place(kind, fingerprint, folder)
        return found

    @on_main
    def _write(self, kind: type[Artifact], value: Artifact, fingerprint: str) -> None:
        with disk_errors(self.path), scratch_folder(self.path) as folder:
            value.save(folder)
            if self.cache is not None:
                self.cache.put(kind.stage, fingerprint, kind.files, folder)
            self._place(kind, fingerprint, folder)

    def _place(self, kind: type[Artifact], fingerprint: str, folder: Path) -> None:
        """Moves the files of a stage to where they belong, and records them."""
        hashes = {name: file_hash(folder / name) for name in kind.files}
        for name in kind.files:
            move_into_place(folder / name, self.path / name)
        stages = self._recorded() | {kind.stage: _StageRecord(inputs=fingerprint, files=hashes)}
        plain = {stage: record.model_dump() for stage, record in stages.items()}
        write_json(self.path / STAGES_FILE, plain)

    def _recorded(self) -> dict[str, _StageRecord]:
        path = self.path / STAGES_FILE
        if not path.exists():
            return {}
        try:
            return _RECORDS.validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(f"{path} {NOT_AS_WRITTEN}; {self._how_to_redo()}") from error

    def _how_to_redo(self) -> str:
        # without its record a stage is run again, and gives the same bytes
        return f"take {self.path / STAGES_FILE} away to make the files of {self.label} again"


def _of_another_version(file: Path, error: Exception) -> str:
    """What to say of a file whose fields are not those of this version."""
    first = error.errors()[0] if isinstance(error, ValidationError) else None
    if first is None or first["type"] != "missing":
        return (
            f"{file} was written by another version of steer-heal "
            f"({str(error).splitlines()[0]}); {WHAT_THEN}"
        )
    field = ".".join(map(str, first["loc"]))
    return f"{file} was written by an older version of steer-heal, without {field}; {WHAT_THEN}"


def _digest(value: Any) -> str:
    if hasattr(value, "digest"):
        return value.digest()
    if isinstance(value, BaseModel):
        return digest_of([value.model_dump_json()])
    return digest_of([repr(value)])
