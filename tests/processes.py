"""Commands as real processes: run to their end, watched, stopped or killed on the way.

Each is forked from a server that has the heavy imports behind it, so it starts in no time; it has
its own working folder, its own exit code, and dies of real signals.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.small import small_settings

# read when the server imports tqdm and torch: every step is shown, and sums have one order
os.environ.setdefault("TQDM_MININTERVAL", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

_SERVER: Any = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["steer_heal.cli", "steer_heal.loop", "steer_heal.report", "trl.trainer.sft_trainer"]
)
_PATIENCE_S = 120
REPORT_FILES = ("report.html", "drift.png", "drift.svg", "drift.csv")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A process that has ended."""

    code: int  # exit code; minus the signal that ended it
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What is in store for a process."""

    dies_before: str = ""  # killed as it renames a file to a path that ends so ...
    dies_after: str = ""  # ... once this path exists
    largest_file_bytes: int = 0  # 0: no limit
    environment: Mapping[str, str] = field(default_factory=dict)  # of its own


class Command:
    """`steer-heal ARGUMENTS` in a folder, running."""

    def __init__(
        self, folder: Path, *arguments: str, fate: Fate | None = None, columns: int = 80
    ) -> None:
        """Starts it.

        Args:
            columns: of the terminal that it writes its errors to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._out = folder / f"out-{time.monotonic_ns()}"
        self._screen, self._terminal = os.openpty()
        tty.setraw(self._terminal)  # lines end as they are written
        termios.tcsetwinsize(self._terminal, (24, columns))
        self._process = _SERVER.Process(
            target=_main,
            args=(folder, arguments, fate or Fate(), self._out, os.ttyname(self._terminal)),
        )
        self._process.start()
        self._text = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def err(self) -> str:
        """What it has said on stderr so far."""
        return self._text.decode(errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, text: str) -> None:
        """Returns as soon as it has said this; fails when it ends without."""
        end = time.monotonic() + _PATIENCE_S
        while text not in self.err:
            if not self._process.is_alive() or time.monotonic() > end:
                self._process.kill()
                raise AssertionError(f"it never said {text!r}: {self.end()}")
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> Finished:
        self._process.join(_PATIENCE_S)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running: {self.err}")
        os.close(self._terminal)  # which it has no more: the screen ends
        self._reader.join()
        out = self._out.read_text()
        self._out.unlink()
        return Finished(code=self._process.exitcode, out=out, err=self.err)

    def kill(self) -> Finished:
        self.send(signal.SIGKILL)
        return self.end()

    def _read(self) -> None:
        with suppress(OSError):  # Linux's word for the end of a terminal
            while chunk := os.read(self._screen, 65536):
                self._text += chunk
        os.close(self._screen)


def together(num: int) -> list[dict[str, str]]:
    """What torchrun would tell each of several processes, in its environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num))
    return [shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(num)]


class Work:
    """A function in a process of its own, running; its errors are told as a command's are."""

    def __init__(self, folder: Path, environment: Mapping[str, str], work: Callable[[], None]):
        self._said = folder / f"said-{time.monotonic_ns()}"
        self._process = _SERVER.Process(target=_work, args=(environment, work, self._said))
        self._process.start()

    def end(self) -> Finished:
        self._process.join(_PATIENCE_S)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running: {self._said.read_text()}")
        return Finished(code=self._process.exitcode, out="", err=self._said.read_text())


def command(folder: Path, *arguments: str, fate: Fate | None = None) -> Finished:
    """Runs `steer-heal ARGUMENTS` in a folder to its end."""
    return Command(folder, *arguments, fate=fate).end()


def rounds_of(folder: Path, number: int, *settings: str) -> str:
    """Runs rounds up to the last one's end, and spares the report; returns what was said."""
    running = Command(folder, "round", f"N={number}", *settings)
    running.wait_for(f"{number} of {number} rounds done")
    return running.kill().err


def refusal(finished: Finished) -> str:
    """The one message of a command that was refused."""
    assert finished.code == 2, finished
    assert "Traceback" not in finished.err + finished.out, finished.err
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return line


def portable_settings(model: Path, folder: Path) -> list[str]:
    """The small settings, landing in ./rounds/small of whatever folder the command runs in.

    Training is made long enough to be stopped in the middle.
    """
    small = small_settings(model, folder)
    kept = [line for line in small if not line.startswith(("folder=", "heal.epochs="))]
    return [*kept, "heal.epochs=4"]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path, but for the log, the lock and the report."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (*REPORT_FILES, "log.txt", ".lock")
    }


def rewind(run: Path, index: int, stage: str) -> None:
    """Takes a finished round back to the point where `stage` is the next to run."""
    folder = run / f"round-{index:02d}"
    recorded = json.loads((folder / "stages.json").read_text())
    order = ["vector", "doses", "drafts", "screened", "adapter", "eval"]
    for gone in order[order.index(stage) :]:
        for name in recorded.pop(gone)["files"]:
            (folder / name).unlink()
    (folder / "stages.json").write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    (folder / "DONE").unlink()


def _work(environment: Mapping[str, str], work: Callable[[], None], said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    os.environ.update(environment)
    import typer

    from eval.people import for_people

    try:
        with for_people("nothing was changed"):
            work()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


def _main(folder: Path, arguments: tuple[str, ...], fate: Fate, out: Path, err: str) -> None:
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT, 0o600), 1)
    os.dup2(os.open(err, os.O_RDWR | os.O_NOCTTY), 2)
    os.chdir(folder)
    os.environ.update(fate.environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test worker's processes ignore it
    if fate.largest_file_bytes:  # the write that crosses it is a real OSError
        resource.setrlimit(resource.RLIMIT_FSIZE, (fate.largest_file_bytes, resource.RLIM_INFINITY))
    if fate.dies_before:
        sys.addaudithook(_killer(fate))
    sys.argv = ["steer-heal", *arguments]
    from steer_heal.cli import main

    main()


def _killer(fate: Fate) -> Callable[[str, tuple[Any, ...]], None]:
    def hook(event: str, details: tuple[Any, ...]) -> None:
        is_target = event == "os.rename" and str(details[1]).endswith(fate.dies_before)
        if is_target and (not fate.dies_after or Path(fate.dies_after).exists()):
            os.kill(os.getpid(), signal.SIGKILL)

    return hook
