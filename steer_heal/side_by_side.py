"""The same work done two ways, side by side in one process.

    ratio = CPU seconds a unit of the other way / CPU seconds a unit of ours

The two ways take turns; a row is the median over the turns, with the smallest and the largest. CPU
seconds are those of this process, so that others on the machine count for less than in wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from loguru import logger

Work = Callable[[], int]  # does it; gives how much was done, in one unit for both ways


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """What a row came to: how many times as fast as the other way, in every turn."""

    what: str
    against: str
    asked: float | None  # at least; None: nothing was asked for
    values: tuple[float, ...]

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        asked = "" if self.asked is None else f"{self.asked:.2f}x"
        reached = f"**{statistics.median(self.values):.2f}x** | {low:.2f} to {high:.2f}"
        return f"| {self.what} | {self.against} | {reached} | {asked} |"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row that can be measured."""

    name: str
    what: str
    against: str
    asked: float | None  # the least ratio that was asked for
    ways: Callable[[], tuple[Work, Work]]  # ours and the other, for one turn; making them is free

    def measure(self, repeats: int) -> Ratio:
        values = []
        for _ in range(repeats):
            ours, other = self.ways()
            other_s = cpu_s(other)
            values.append(other_s / cpu_s(ours))
        row = Ratio(what=self.what, against=self.against, asked=self.asked, values=tuple(values))
        logger.info("{}: {}", self.name, row)
        return row


def cpu_s(work: Work) -> float:
    """CPU seconds a unit."""
    start = time.process_time()
    done = work()
    return (time.process_time() - start) / done
