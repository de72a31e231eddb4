"""How far a piece of work is: a bar in a terminal, however narrow; plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from tqdm import tqdm

from eval.processes import is_main

# a narrow terminal cuts at the right: what is asked most stands first
_FORMAT = "{percentage:3.0f}% {remaining} left  {desc} {n_fmt}/{total_fmt} {bar}"
_LINE_S = 30.0  # where there is no terminal; what takes less says nothing


class Bar(Protocol):
    """Something that is told of progress."""

    def update(self, done: int, /) -> Any: ...


def progress_bar(
    total: int, label: str | None, initial: int = 0, line_s: float = _LINE_S
) -> AbstractContextManager[Bar]:
    """A bar on stderr, gone at its end.

    Args:
        label: None draws none; nor does any process but the main one, which tells of its share.
        initial: how many of them are done already.
        line_s: seconds from one plain line to the next.
    """
    if label is None or not is_main():
        return nullcontext(_Silent())
    if not sys.stderr.isatty():
        return nullcontext(_Lines(total, label, initial, line_s))
    return tqdm(
        total=total,
        desc=label,
        initial=initial,
        leave=False,
        dynamic_ncols=True,
        bar_format=_FORMAT,
    )


def duration_text(seconds: float) -> str:
    """A time as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


class _Silent:
    def update(self, done: int, /) -> None:
        pass


class _Lines:
    """Says now and then, in a line without control characters, how far it is."""

    def __init__(self, total: int, label: str, initial: int, line_s: float) -> None:
        self._total, self._label, self._line_s = total, label, line_s
        self._initial = self._done = initial
        self._begun = self._said = time.monotonic()

    def update(self, done: int, /) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._said < self._line_s or self._done >= self._total:
            return
        self._said = now
        left_s = (now - self._begun) / (self._done - self._initial) * (self._total - self._done)
        said = f"{self._label}: {self._done} of {self._total}, {duration_text(left_s)} left"
        print(said, file=sys.stderr, flush=True)
