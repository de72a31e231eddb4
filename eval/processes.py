"""Several processes at one piece of work: rows are shared out, every process has all the results.

Each process runs the same program, on a model of its own and, where there are any, a GPU of its
own, and comes to the same values:

    spread     each works on its share of the rows, all get all of what was found
    on_main    the main process alone does it (files, the lock, the log), all get what it returns
    total      tensors of which each has a part, summed

Each of these begins with a meeting, in which every process says whether it is well. What failed in
one is raised in all of them. A process that fails between two meetings says so in its last one,
which the others take for their next. In a process on its own nothing of this is done.

Processes are started by `launch`, by torchrun or by `accelerate launch`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from eval.errors import UserError

if TYPE_CHECKING:  # torch takes a second to import
    import torch

Result = TypeVar("Result")
Given = ParamSpec("Given")

_STARTED_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # set by who starts them
_PATIENCE = timedelta(days=1)  # for a longer share: who is dead is noticed at once
_GRACE_S = 5.0  # in which whoever ended another process ends this one, too


@dataclass
class _Group:
    """The processes, as one of them knows them."""

    rank: int  # 0: the main one
    size: int
    by_itself: bool = False  # at work that the others have no part in
    is_over: bool = False  # no more meetings


@dataclass(frozen=True)
class _Failure:
    """What one process tells the others of its error."""

    text: str
    is_for_people: bool

    def as_error(self) -> Exception:
        return UserError(self.text) if self.is_for_people else RuntimeError(self.text)


_group = _Group(rank=0, size=1)


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return os.environ["RANK"] == "0" if is_to_join() else _group.rank == 0


def count() -> int:
    """Processes at work."""
    return _group.size


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Makes this process one of those that were started together; on its own it stays alone.

    Inside, every library sees one process and one GPU: none of them splits or wraps anything.

    Args:
        device: as `load_model` takes it.
    Raises:
        UserError: more processes than GPUs; and what failed in another process.
    """
    if not is_to_join():
        yield
        return
    _join(device)
    try:
        yield
    except Exception as error:
        if not _group.is_over:
            with suppress(Exception):  # it is this error that is raised
                _meet(partial(_raise, error))
        _wait_for_main()
        raise
    _meet(lambda: None)
    _leave()


def spread(
    work: Callable[[list[int]], Sequence[Result]], alike: Sequence[Hashable]
) -> list[Result]:
    """What `work` makes of every row, in the rows' order.

    Args:
        work: takes the indices of rows, gives a result for each.
        alike: of every row, what it shares work by: equal ones stay in one process.
    """
    if _is_alone():
        return list(work(list(range(len(alike)))))
    mine = _dealt(alike)
    parts = _meet(lambda: dict(zip(mine, work(mine), strict=True)) if mine else {})
    found = {row: result for part in parts for row, result in part.items()}
    return [found[row] for row in range(len(alike))]


def on_main(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """Decorates what the main process does for all; inside it, it is by itself."""

    @wraps(work)
    def done(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if _is_alone():
            return work(*args, **kwargs)
        made: list[Any] = [None]

        def make() -> None:
            _group.by_itself = True
            try:
                made[0] = work(*args, **kwargs)
            finally:
                _group.by_itself = False

        _meet(make if is_main() else lambda: None)
        import torch.distributed as dist

        with _noticing_the_dead():
            dist.broadcast_object_list(made, src=0)
        return made[0]

    return done


def total(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over the processes, in fp32; on its own a process gets its parts back as they are."""
    if _is_alone():
        return list(parts)
    import torch
    import torch.distributed as dist

    flat = torch.cat([part.detach().float().flatten() for part in parts])
    _meet(lambda: None)
    with _noticing_the_dead():
        dist.all_reduce(flat)
    sums = flat.split([part.numel() for part in parts])
    return [one.view_as(part).to(part.dtype) for one, part in zip(sums, parts, strict=True)]


def own(num_rows: int) -> list[int]:
    """This process's rows of a batch that all processes have."""
    return list(range(num_rows)) if _is_alone() else list(range(_group.rank, num_rows, _group.size))


def is_to_join() -> bool:
    """Whether others were started beside this process, and it has not joined them yet."""
    return all(name in os.environ for name in _STARTED_BY) and os.environ["WORLD_SIZE"] != "1"


def _is_alone() -> bool:
    return _group.size == 1 or _group.by_itself


def _join(device: str) -> None:
    import torch
    import torch.distributed as dist

    environment = os.environ
    _group.rank, _group.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local, beside = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()  # which does not start CUDA
    if 0 < num_gpus < beside:
        raise UserError(
            f"{beside} processes for {num_gpus} GPUs: each takes one of its own; take as many "
            "processes as there are GPUs, or device=cpu"
        )
    if num_gpus:
        known = environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = known.split(",")[local]
    backend = "cpu:gloo,cuda:nccl" if num_gpus else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    for name in _STARTED_BY:
        environment.pop(name, None)
    _end_with_parent()


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def _dealt(alike: Sequence[Hashable]) -> list[int]:
    """This process's rows: those that are alike together, dealt there and back as cards are.

    There and back, so that what takes turns in the rows (doses) does not all go to one process.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(alike):
        groups.setdefault(key, []).append(row)
    mine = []
    for number, rows in enumerate(groups.values()):
        turn, place = divmod(number, _group.size)
        if _group.rank == (place if turn % 2 == 0 else _group.size - 1 - place):
            mine += rows
    return mine


def _meet(work: Callable[[], Any]) -> list[Any]:
    """What each process's work came to, [processes]; what failed in any of them fails in all."""
    own_error: Exception | None = None
    try:
        outcome = work()
    except Exception as error:
        own_error, outcome = error, _failure(error)
    import torch.distributed as dist

    outcomes: list[Any] = [None] * _group.size
    with _noticing_the_dead():
        dist.all_gather_object(outcomes, outcome)
    failures = [each for each in outcomes if isinstance(each, _Failure)]
    if failures:
        _group.is_over = True
        raise own_error or failures[0].as_error()
    return outcomes


def _failure(error: Exception) -> _Failure:
    if isinstance(error, UserError | OSError):
        return _Failure(str(error), is_for_people=True)
    return _Failure("".join(traceback.format_exception(error)), is_for_people=False)


def _raise(error: Exception) -> None:
    raise error


@contextmanager
def _noticing_the_dead() -> Iterator[None]:
    """Around what waits for the others."""
    try:
        yield
    except RuntimeError as error:  # a connection that is closed
        _group.is_over = True
        time.sleep(_GRACE_S)
        raise UserError(
            "another process of this run has ended without a word (killed, or out of memory); the "
            "same command goes on from there"
        ) from error


def _wait_for_main() -> None:
    """Others end after the main process has spoken: who started them ends the rest at once."""
    if is_main():
        return
    import torch.distributed as dist

    with suppress(RuntimeError):
        dist.broadcast_object_list([None], src=0)  # it never sends: its end is what ends this


def _end_with_parent() -> None:
    """A process whose starter was killed ends, too: nobody would look after it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
