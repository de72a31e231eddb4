"""Files on disk: atomic writes (a temporary name, flushed, renamed), hashes, and clear errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eval.errors import UserError

LOCK_FILE = ".lock"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOOK_S = 0.3  # who only looks whether a lock is held holds it himself for less
NOT_AS_WRITTEN = "is not what was written there (truncated, corrupt or edited)"


def digest_of(parts: Iterable[str]) -> str:
    """SHA-256 over texts, each closed by a NUL."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8") + b"\0")
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise UserError(
            f"{path} {NOT_AS_WRITTEN}: not JSON, {error}; take it away to have it written again"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: a temporary name, flushed, renamed."""
    with disk_errors(path), scratch_folder(path.parent) as folder:
        (folder / path.name).write_bytes(content)
        move_into_place(folder / path.name, path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder beside the target, so that a rename from it is atomic."""
    folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(source: Path, target: Path) -> None:
    """Flushes a file and renames it."""
    source.chmod(0o644)  # safetensors writes for the owner alone
    with source.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(exist_ok=True)
    os.replace(source, target)


def move_folder_into_place(source: Path, target: Path) -> None:
    """Flushes every file of a folder and renames the folder; `target` must not be there."""
    for path in source.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # as above
            with path.open("rb") as file:
                os.fsync(file.fileno())
    os.replace(source, target)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def locked(folder: Path, name: str, instead: str) -> Iterator[None]:
    """Makes a folder this process's own; a dead process keeps no lock.

    Args:
        name: what the message calls the folder.
        instead: the setting that gives another folder.
    Raises:
        UserError: another process has it.
    """
    file = folder / LOCK_FILE
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, timeout=_LOOK_S)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{name} is being worked on by another process{_holder(file)}: wait for its end, "
                f"stop it, or give this one a place of its own with {instead}"
            ) from error
        if isinstance(lock, FileLock):  # where there is no flock the file says whose it is already
            file.write_text(f"{os.getpid()}\n")
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a living process works on a folder; changes nothing that stays."""
    file = folder / LOCK_FILE
    if not file.is_file():
        return False
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written is worked on by nobody
        return False
    lock.release()
    return False


def _holder(file: Path) -> str:
    """Whose a lock is, as ` (PID 123)`; nothing where its file does not say."""
    first = file.read_text().partition("\n")[0]
    return f" (PID {first})" if first.isdecimal() else ""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a message that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {explain_disk(error)}") from error


def explain_disk(error: OSError) -> str:
    """What happened to a file, and what to do where it is a lack of room."""
    what = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return f"{what}: make room on the disk and start again; finished stages are kept"
    return f"cannot be read or written ({what})"
