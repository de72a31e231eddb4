"""How figures are written for people, on the page, on a model card and in the log."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.statistics import Interval
from eval.summary import fixed

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


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
    """What no page can show, or what would reorder the text around it, as something to be seen.

    Control characters as their pictures; marks that turn the direction of writing, separators that
    are no line end, and halves of characters by their numbers.
    """
    return _UNSEEN.sub(lambda found: _picture(ord(found[0])), text)


def script_json(value: Any) -> str:
    """JSON that can stand in a `<script>` whatever texts are in it; NaN becomes null."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_line(text: str) -> str:
    """A text as a terminal can show it in a line: nothing in it moves the cursor."""
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> list[str]:
    """Lines of a table, their columns two spaces apart.

    Args:
        rows: cells, the same number in each.
        right: columns whose cells stand at the right, as numbers do.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def fenced(text: str, language: str = "") -> str:
    """Markdown: a code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def code(text: str) -> str:
    """Markdown: a code span of one line, whatever backticks are in it."""
    ticks = "`" * (_longest_ticks(text) + 1)
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{edge}{' '.join(text.split())}{edge}{ticks}"


@cache
def templates(*, is_html: bool) -> Environment:
    """The templates, with the functions above as filters.

    Args:
        is_html: whether what is filled in is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_html,
    )
    numbers = (percent, percent_bounds, points, fixed, nats, bounds, plain_bounds)
    texts = (visible, fenced, code)
    environment.filters |= {function.__name__: function for function in (*numbers, *texts)}
    return environment


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _picture(number: int) -> str:
    if number < 32:
        return chr(0x2400 + number)
    return "␡" if number == 0x7F else f"⟨U+{number:04X}⟩"
