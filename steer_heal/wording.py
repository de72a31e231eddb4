"""How figures are written for people, on the page and in the log."""

from __future__ import annotations

from eval.statistics import Interval
from eval.summary import fixed


def percent(share: float) -> str:
    """A share as `97.3 %`."""
    return f"{100 * share:.1f} %"


def percent_bounds(interval: Interval) -> str:
    """The ends of an interval of shares, as `[95.1, 98.8]`."""
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(difference: Interval) -> str:
    """A difference of shares with its ends, in percentage points: `+1.6 [-0.5, +3.8]`."""
    ends = (difference.estimate, difference.low, difference.high)
    estimate, low, high = (fixed(100 * value, 1, sign=True) for value in ends)
    return f"{estimate} [{low}, {high}]"


def nats(value: float, sign: bool = True) -> str:
    """A number of nats as `+0.42`, with a minus that is as wide as the plus."""
    return fixed(value, 2, sign).replace("-", "−")


def bounds(interval: Interval) -> str:
    """The ends of an interval of nats, as `[+0.31, +0.55]`."""
    return f"[{nats(interval.low)}, {nats(interval.high)}]"


def plain_bounds(interval: Interval, digits: int = 2) -> str:
    """The ends of an interval of ratios, as `[0.91, 1.02]`."""
    return f"[{fixed(interval.low, digits)}, {fixed(interval.high, digits)}]"


def visible(text: str) -> str:
    """Control characters, which no page can show, as their pictures."""
    return "".join(
        chr(0x2400 + ord(letter)) if ord(letter) < 32 and letter not in "\n\t" else letter
        for letter in text
    )
