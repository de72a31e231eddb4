"""The plot for papers: drift of the foundations over rounds, enactment, coherence below."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from eval.statistics import Interval

Format = Literal["png", "svg"]
FORMATS: tuple[Format, ...] = ("png", "svg")

DPI = 150
WIDTH_INCHES, HEIGHT_INCHES = 10.0, 7.0
# Left, bottom, width, height of the panels, inches; room for names is left at their right.
_PLACES = {
    "drift": (0.75, 3.25, 3.7, 3.2),
    "enacted": (6.65, 3.25, 2.0, 3.2),
    "pmass": (0.75, 0.6, 1.85, 1.6),
    "tail": (3.95, 0.6, 1.85, 1.6),
    "mundane": (7.25, 0.6, 1.85, 1.6),
}


@dataclass(frozen=True, kw_only=True)
class FoundationDrift:
    """Shift of one foundation from base, nats; a value a round, base (round 0) first."""

    name: str
    is_intended: bool
    shifts: tuple[Interval, ...]
    prompted: float
    random: tuple[float, ...]  # a value a direction


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What the plot shows; a value a round, base (round 0) first."""

    foundations: tuple[FoundationDrift, ...]
    enacted: tuple[Interval, ...]  # share of replies, 0 to 1
    enacted_prompted: float
    enacted_random: tuple[float, ...]  # a value a direction
    pmass_shares: tuple[float, ...]  # of base's
    pmass_gate: float
    tail_medians_nats: tuple[float, ...]
    tail_p90s_nats: tuple[float, ...]
    base_tail_nats: tuple[float, float]  # 5th and 95th percentile of base's own completions
    mundane: tuple[float, ...]  # share right, 0 to 1
    best_round: int | None


# Okabe and Ito's colours, told apart by the colour-blind.
_INK, _MUTED, _BAND = "#1d2329", "#727b85", "#e9ecef"
_ACCENTS = ("#c44e00", "#0067a5", "#007a5a", "#a8507f", "#8a6d00")
_STYLE: Any = {  # matplotlib types its keys one by one, in some versions
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "text.color": _INK,
    "axes.titlecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.hashsalt": "steer-heal",  # ids are drawn at random without one
}

_LINE_POINTS = 11.5  # height of a line of names
_LEAD_POINTS = 12  # from a panel's right edge to the names
_MARGIN_ROUNDS = 0.15  # from the last round to a panel's right edge, and from base to its left one


@dataclass(frozen=True, kw_only=True)
class _Label:
    """The name of one line, or of several that are alike."""

    text: str
    heights: tuple[float, ...]  # where the lines end, on the y axis
    color: str
    strong: bool = False

    @property
    def place(self) -> float:
        return sum(self.heights) / len(self.heights)


@lru_cache(maxsize=len(FORMATS))  # it is in the page, and a file beside it
def draw_drift(drift: Drift, format: Format) -> bytes:
    """Draws the plot as a picture; the same bytes for the same numbers."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI)
        FigureCanvasAgg(figure)
        for name, (left, bottom, width, height) in _PLACES.items():
            place = (
                *(left / WIDTH_INCHES, bottom / HEIGHT_INCHES),
                *(width / WIDTH_INCHES, height / HEIGHT_INCHES),
            )
            panel = figure.add_axes(place)
            labels = _PANELS[name](panel, drift)
            _number_rounds(panel, len(drift.enacted), drift.best_round)
            _label_right(panel, labels, height)
        buffer = io.BytesIO()
        undated = {"png": {"Software": None}, "svg": {"Date": None}}
        figure.savefig(buffer, format=format, metadata=undated[format])
    return buffer.getvalue()


def _draw_foundations(axes: Axes, drift: Drift) -> list[_Label]:
    note = "shaded: 95 % intervals"
    if any(foundation.is_intended for foundation in drift.foundations):
        note += " · ×: random directions, same KL"
    _title(axes, "What the model finds at stake", note)
    axes.set_ylabel("shift of log probability from base, nats")
    rounds = range(len(drift.enacted))
    axes.axhline(0, color=_INK, linewidth=1)
    accents = iter(_ACCENTS * 2)
    labels = []
    for foundation in sorted(drift.foundations, key=lambda foundation: foundation.is_intended):
        estimates = [shift.estimate for shift in foundation.shifts]
        lows = [shift.low for shift in foundation.shifts]
        highs = [shift.high for shift in foundation.shifts]
        color = next(accents) if foundation.is_intended else _MUTED
        strong = foundation.is_intended
        axes.fill_between(rounds, lows, highs, color=color, alpha=0.2 if strong else 0.08, lw=0)
        axes.plot(rounds, estimates, color=color, lw=2.4 if strong else 1.1, marker="o", ms=4)
        name = foundation.name.replace("_", " ")
        labels.append(_Label(text=name, heights=(estimates[-1],), color=color, strong=strong))
        if strong:
            axes.axhline(foundation.prompted, color=color, lw=1.3, ls=(0, (5, 3)))
            prompted = (foundation.prompted,)
            labels.append(_Label(text=f"{name}, prompted", heights=prompted, color=color))
            ones = [1] * len(foundation.random)
            axes.plot(ones, foundation.random, color=color, marker="x", ms=8, mew=2, ls="none")
    return labels


def _draw_enacted(axes: Axes, drift: Drift) -> list[_Label]:
    _title(axes, "Replies that act the trait out", "shaded: 95 % intervals")
    axes.set_ylabel("share of held-out replies")
    rounds = range(len(drift.enacted))
    color = _ACCENTS[2]
    axes.fill_between(
        rounds,
        [share.low for share in drift.enacted],
        [share.high for share in drift.enacted],
        color=color,
        alpha=0.2,
        lw=0,
    )
    axes.plot(rounds, [share.estimate for share in drift.enacted], color=color, lw=2.4, marker="o")
    base = drift.enacted[0].estimate
    axes.axhline(base, color=_INK, lw=1)
    axes.axhline(drift.enacted_prompted, color=color, lw=1.3, ls=(0, (5, 3)))
    for share in drift.enacted_random:
        axes.axhline(share, color=_MUTED, lw=1.3, ls=(0, (1, 2)))
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return [
        _Label(text="healed", heights=(drift.enacted[-1].estimate,), color=color, strong=True),
        _Label(text="persona prompt", heights=(drift.enacted_prompted,), color=color),
        _Label(text="base", heights=(base,), color=_INK),
        _Label(text="random", heights=drift.enacted_random, color=_MUTED),
    ]


def _draw_pmass(axes: Axes, drift: Drift) -> list[_Label]:
    _title(axes, "Answers in the asked format", "pmass; below the gate: incoherent")
    axes.set_ylabel("share of base's")
    axes.axhline(drift.pmass_gate, color=_ACCENTS[0], lw=1.3, ls=(0, (5, 3)))
    axes.plot(range(len(drift.pmass_shares)), drift.pmass_shares, color=_INK, marker="o")
    lowest, highest = min(drift.pmass_shares), max(drift.pmass_shares)
    axes.set_ylim(min(0.978, lowest - 0.1 * (1 - lowest)), max(1.004, highest * 1.002))
    axes.ticklabel_format(axis="y", useOffset=False)
    return [
        _Label(text="gate", heights=(drift.pmass_gate,), color=_ACCENTS[0]),
        _Label(text="healed", heights=drift.pmass_shares[-1:], color=_INK),
    ]


def _draw_tail(axes: Axes, drift: Drift) -> list[_Label]:
    note = "under base · grey: base's own, 5 to 95 %"
    _title(axes, "Surprisal of the replies' ends", note)
    axes.set_ylabel("nats a token")
    rounds = range(len(drift.tail_medians_nats))
    low, high = drift.base_tail_nats
    axes.axhspan(low, high, color=_BAND, lw=0)
    axes.plot(rounds, drift.tail_medians_nats, color=_INK, marker="o")
    axes.plot(rounds, drift.tail_p90s_nats, color=_MUTED, marker="o", ms=4, lw=1.1)
    axes.set_ylim(0, max(high, *drift.tail_p90s_nats) * 1.12)
    return [
        _Label(text="90 %", heights=drift.tail_p90s_nats[-1:], color=_MUTED),
        _Label(text="median", heights=drift.tail_medians_nats[-1:], color=_INK),
    ]


def _draw_mundane(axes: Axes, drift: Drift) -> list[_Label]:
    _title(axes, "Mundane tasks", "must not be touched by the trait")
    axes.set_ylabel("share right")
    axes.axhline(drift.mundane[0], color=_MUTED, lw=1.1)
    axes.plot(range(len(drift.mundane)), drift.mundane, color=_INK, marker="o")
    lowest = min(*drift.mundane, 0.88)
    axes.set_ylim(lowest - 0.1 * (1 - lowest), 1.01)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))  # whole percents
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return [
        _Label(text="healed", heights=drift.mundane[-1:], color=_INK),
        _Label(text="base", heights=drift.mundane[:1], color=_MUTED),
    ]


def _title(axes: Axes, title: str, note: str) -> None:
    """A heading and, below it, how to read the panel."""
    axes.set_title(title, pad=18)
    axes.annotate(
        note,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=8,
        color=_MUTED,
    )


def _number_rounds(axes: Axes, count: int, best: int | None) -> None:
    """The x axis: base, then the rounds; the best one is marked."""
    axes.set_xlim(-_MARGIN_ROUNDS, count - 1 + _MARGIN_ROUNDS)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: "base" if x == 0 else f"{x:.0f}")
    axes.set_xlabel("after round" + (f" (best: {best})" if best is not None else ""))
    if best is not None:
        axes.axvline(best, color=_BAND, lw=5, zorder=0)


def _label_right(axes: Axes, labels: Sequence[_Label], height_inches: float) -> None:
    """Names lines at their right ends, pushed apart until none overlaps another.

    A thin lead runs from each name to every line that it is of: lines may lie on one another.
    """
    (low, high), (_, edge) = axes.get_ylim(), axes.get_xlim()
    points = height_inches * 72 / (high - low)  # a unit of the y axis
    ordered = sorted(labels, key=lambda label: label.place)
    places = _spread([label.place for label in ordered], _LINE_POINTS / points)
    for place, label in zip(places, ordered, strict=True):
        for index, height in enumerate(label.heights):
            axes.plot([edge - _MARGIN_ROUNDS, edge], [height] * 2, color=label.color, lw=0.7)
            axes.annotate(
                label.text if index == 0 else "",
                (1, height),
                xycoords=axes.get_yaxis_transform(),
                xytext=(_LEAD_POINTS, (place - height) * points),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                fontweight="bold" if label.strong else "normal",
                color=label.color,
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": label.color,
                    "lw": 0.7,
                    "relpos": (0, 0.5),
                    "shrinkA": 2,
                    "shrinkB": 0,
                },
            )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to the wanted (ascending) ones that are at least `gap` apart."""
    groups: list[list[float]] = []  # labels that touch, each by what its first place would be
    for rank, value in enumerate(wanted):
        groups.append([value - rank * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    starts = [float(np.mean(group)) for group in groups for _ in group]
    return [start + rank * gap for rank, start in enumerate(starts)]


_PANELS = {
    "drift": _draw_foundations,
    "enacted": _draw_enacted,
    "pmass": _draw_pmass,
    "tail": _draw_tail,
    "mundane": _draw_mundane,
}
