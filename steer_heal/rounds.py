"""A run directory: its rounds and their markers, written last; the lock; what it was begun with."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from loguru import logger

from eval.bars import duration_text
from eval.errors import Terminated, UserError
from eval.files import NOT_AS_WRITTEN, disk_errors, locked, read_json, write_json, write_text
from eval.people import IN_LOG_ALONE
from eval.processes import on_main
from steer_heal.artifacts import Controls, Limits, RoundAdapter, RoundEval
from steer_heal.cache import StageCache
from steer_heal.changes import absent, changes
from steer_heal.config import FREE
from steer_heal.gate import is_coherent
from steer_heal.stages import STAGES_FILE, WHAT_THEN, Stages

RUN_FILE, DONE_FILE, LOG_FILE = "run.json", "DONE", "log.txt"
_RECORD = re.compile(r"^\d{4}-\d\d-\d\dT\S+ (.*)$", re.MULTILINE)  # its first line, less its time


class Round(Stages):
    """One round's folder."""

    def __init__(self, path: Path, index: int, seed: int, cache: StageCache | None = None) -> None:
        super().__init__(path, f"round {index + 1} ({path.name})", (seed, index), cache)
        self.index = index

    @property
    def adapter_name(self) -> str:
        return f"r{self.index:02d}"

    @property
    def is_done(self) -> bool:
        return all((self.path / name).is_file() for name in (DONE_FILE, STAGES_FILE))

    @on_main
    def finish(self) -> None:
        """Writes the marker: everything before it is on disk."""
        write_text(self.path / DONE_FILE, "")


class Run(Stages):
    """A run's folder; hold it open while working in it."""

    def __init__(
        self, path: Path, seed: int, cache: StageCache | None = None, profiled: bool = False
    ) -> None:
        super().__init__(path, f"run {path.name}", (seed, "run"), cache)
        self._seed = seed
        self._profiled = profiled  # what each stage took is told as a table

    def round(self, index: int) -> Round:
        return Round(self.path / f"round-{index:02d}", index, self._seed, self.cache)

    @on_main
    def done_rounds(self) -> list[Round]:
        """Finished rounds from the first on, without a gap; none before the controls are there."""
        rounds: list[Round] = []
        while self.has(Controls) and (following := self.round(len(rounds))).is_done:
            rounds.append(following)
        return rounds

    def unfinished_rounds(self, total: int, why_stop: Callable[[], str | None]) -> Iterator[Round]:
        """The rounds that remain of `total`, the one that was begun first.

        Args:
            why_stop: asked before each of them, from the files of those that are done; an answer
                ends the run.
        """
        first, reason = len(self.done_rounds()), why_stop()
        start, before = time.monotonic(), self.spent_s
        for index in range(first, total):
            if reason is not None:
                break
            following = self.round(index)
            self._make_folder(following.path)
            yield following
            reason = why_stop()
            once_s = self.spent_s - before  # its own stages do not come again
            taken = (time.monotonic() - start - once_s) / (index + 1 - first)
            left_s = taken * (total - 1 - index) if reason is None else 0.0
            logger.info("{} took {}", following.label, following.by_stage())
            self._tell_profile(following)
            each = (
                f"{index + 1} of {total} rounds done, {duration_text(taken)} each, controls apart"
            )
            logger.info("{}", f"{each}, about {duration_text(left_s)} to go" if left_s else each)
        if self.spent:
            logger.info("{} itself took {}", self.label, self.by_stage())
            self._tell_profile(self)
        if reason is not None or first >= total:
            num_done = len(self.done_rounds())
            further = reason or f"N={num_done + 1} goes further"
            rounds = "1 round" if num_done == 1 else f"{num_done} rounds"
            logger.info("{} is done: {}; {}", self.label, rounds, further)

    @on_main
    def last_stack(self) -> list[RoundAdapter]:
        """The adapters of the finished rounds, all of whose files are as they were written."""
        rounds = self.done_rounds()
        self.check()
        for done in rounds:
            done.check()
        return [done.read(RoundAdapter) for done in rounds]

    @on_main
    def reference(self, which: Literal["previous", "base", "last_good"], round: Round) -> list[str]:
        """Names of the adapters that act in what a round's student is held to.

        last_good: those up to the last round that is coherent by its saved evaluation; a ratchet,
        so that a round that broke is not what the next one is held to. None where none is.
        """
        # not the later ones, which are there where a round is made again
        rounds = self.done_rounds()[: round.index] if which != "base" else []
        while which == "last_good" and rounds and not self._is_coherent(rounds[-1]):
            rounds.pop()
        return [done.adapter_name for done in rounds]

    def _tell_profile(self, stages: Stages) -> None:
        if self._profiled and stages.spent:
            logger.info("{}, by stage\n{}", stages.label, "\n".join(stages.profile()))

    @on_main
    def _make_folder(self, path: Path) -> None:
        with disk_errors(self.path):
            path.mkdir(parents=True, exist_ok=True)

    def _is_coherent(self, done: Round) -> bool:
        healed, base = done.read(RoundEval).healed, self.read(Controls).base
        return is_coherent(healed, base, self.read(Limits))


@on_main
def check_run(path: Path, description: dict[str, Any]) -> None:
    """Refuses to go on with a run for what `open_run` would, and changes nothing.

    Args:
        description: as far as it is known: without the hash of the model's weights.
    """
    if (path / RUN_FILE).is_file():
        with _held(path):
            _require_same(path, read_run(path), description)


@contextmanager
def open_run(
    path: Path,
    seed: int,
    description: dict[str, Any],
    cache: StageCache | None = None,
    profiled: bool = False,
) -> Iterator[Run]:
    """Opens a run for work: creates it, or goes on with it; no other process can meanwhile.

    Args:
        description: what run.json says; its "config" must be the run's own, but for what says how
            far to go.
        cache: stages that other runs have made already are taken from it.
        profiled: what each stage takes is told as a table.
    Raises:
        UserError: another process holds it, it was begun with another config, or it cannot be
            written.
    """
    run = Run(path, seed, cache, profiled)
    with ExitStack() as held:
        _take(run, description, held)
        try:
            yield run
        except (Exception, KeyboardInterrupt) as error:
            with suppress(UserError):  # of a full disk, which is what the error is of too
                _log_end(error)
            raise


@on_main
def _take(run: Run, description: dict[str, Any], held: ExitStack) -> None:
    """Holds the run for as long as `held` is not closed, and writes its log."""
    path = run.path
    held.enter_context(_held(path))
    with disk_errors(path):
        _sweep(path)
        _agree(path, description, len(run.done_rounds()))
    sink = logger.add(_to_log(path), format="{time} {level} {message}", catch=False)
    held.callback(logger.remove, sink)


def read_run(path: Path) -> dict[str, Any]:
    """The description of a run.

    Raises:
        UserError: there is none, or it is not what was written.
    """
    file = path / RUN_FILE
    if not file.is_file():
        raise UserError(
            f"{path} is not a run: there is no {RUN_FILE} in it; where it was lost, `steer-heal "
            "round` with the run's settings writes it again"
        )
    description = read_json(file)
    parts = (description, description.get("config")) if isinstance(description, dict) else ()
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{file} {NOT_AS_WRITTEN}; take it away to have it written again")
    return description


def _log_end(error: BaseException) -> None:
    """Says in the log alone why a run ends here: people are told by whoever catches the error."""
    log = logger.bind(**{IN_LOG_ALONE: True})
    if isinstance(error, KeyboardInterrupt):
        what = "SIGTERM" if isinstance(error, Terminated) else "Ctrl-C"
        log.info("stopped by {}; the same command goes on from there", what)
    elif isinstance(error, UserError):
        log.error("failed: {}", error)
    else:
        log.opt(exception=error).error("failed: {}: {}", type(error).__name__, error)


def has_failed(path: Path) -> bool:
    """Whether the last thing that a run's log says is an error that ended it."""
    try:
        log = (path / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    records = _RECORD.findall(log)
    return bool(records) and records[-1].startswith("ERROR failed: ")


def _to_log(path: Path) -> Callable[[str], None]:
    """A sink that holds no file open: one that fails on a full disk is not flushed again."""

    def write(line: str) -> None:
        with disk_errors(path / LOG_FILE), (path / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(line)

    return write


def _held(path: Path) -> AbstractContextManager[None]:
    return locked(path, f"run {path}", "run=NAME")


def _agree(path: Path, description: dict[str, Any], num_done: int) -> None:
    """Records a new run's description; refuses another config than an old run's."""
    if not (path / RUN_FILE).exists():
        write_json(path / RUN_FILE, description)
        return
    before, now = read_run(path), description
    _require_same(path, before, now)
    if before.get("code") != now["code"]:
        logger.warning("run {} was begun with another version of the code", path)
    rounds = max(now["config"]["rounds"], num_done)
    after = before | {"config": now["config"] | {"rounds": rounds}}
    if after != before:
        write_json(path / RUN_FILE, after)


def _require_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses what an older version wrote, and another config than a run was begun with."""
    if unknown := list(absent(before["config"], now["config"])):
        raise UserError(
            f"{path / RUN_FILE} was written by an older version of steer-heal, without "
            f"{', '.join(unknown)}; {WHAT_THEN}"
        )
    if changed := changes(before, now, free=FREE):
        raise UserError(
            f"run {path} was begun with another config ({'; '.join(changed)}); "
            "give this one a name of its own with run=NAME"
        )


def _sweep(path: Path) -> None:
    """Takes away what a killed process left half written."""
    for leftover in [*path.glob(".tmp-*"), *path.glob("round-*/.tmp-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
