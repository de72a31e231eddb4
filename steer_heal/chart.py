"""What every chart of the page is made of: named colours, a plain panel, an axis of rounds.

Charts are made in the light colours. The page knows each by its name, and puts the reader's own
theme in its place.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from eval.statistics import Interval
from steer_heal.saved import ConditionFigures
from steer_heal.summary import Summary

# Name -> light, dark. After Okabe and Ito, told apart by the colour-blind; brighter on dark.
PALETTE = {
    "ink": ("#1d2329", "#e4e7ea"),
    "soft": ("#5a636d", "#a3abb4"),
    "line": ("#dde1e6", "#333a42"),
    "panel": ("#f5f7f9", "#1f252b"),
    "healed": ("#0067a5", "#62b6ef"),
    "healed-band": ("rgba(0,103,165,0.16)", "rgba(98,182,239,0.2)"),
    "steered": ("#c44e00", "#ff9248"),
    "prompted": ("#007a5a", "#3ecf9f"),
    "random": ("#8b6f9c", "#b9a0c9"),
    "base-band": ("rgba(90,99,109,0.13)", "rgba(163,171,180,0.17)"),
    "kept": ("#00805f", "#35c497"),
    "surplus": ("#a9d5c6", "#2f6e5a"),
    "round-1": ("#d98a00", "#ffc04d"),
    "round-2": ("#c85a17", "#ff9457"),
    "round-3": ("#b0304f", "#ff7f96"),
    "round-4": ("#8f2f80", "#e88fdc"),
    "round-5": ("#6440a8", "#b9a0ff"),
    "round-6": ("#3a58b4", "#8caeff"),
    "round-7": ("#1c7599", "#5cc4ea"),
    "round-8": ("#16806f", "#56d3bd"),
}
_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
INK, SOFT, LINE, PANEL = (_LIGHT[name] for name in ("ink", "soft", "line", "panel"))
HEALED, HEALED_BAND, STEERED = (_LIGHT[name] for name in ("healed", "healed-band", "steered"))
PROMPTED, RANDOM, BASE_BAND = (_LIGHT[name] for name in ("prompted", "random", "base-band"))
KEPT, SURPLUS = _LIGHT["kept"], _LIGHT["surplus"]
ROUNDS = [light for name, light in _LIGHT.items() if name.startswith("round-")]
CLEAR = "rgba(0,0,0,0)"
DASHED, DOTTED = "6px,4px", "2px,3px"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart and what stands beside it on the page."""

    name: str  # its id
    title: str
    says: str  # what it shows, in a sentence, for who cannot see it
    figure: go.Figure


def panel(traces: Sequence[Any], height: int = 230, **layout: Any) -> go.Figure:
    """A figure with nothing on it but axes, as wide as the page gives it.

    Args:
        height: CSS pixels.
        layout: Plotly's own, on top.
    """
    axis = {
        "gridcolor": LINE,
        "linecolor": LINE,
        "zeroline": False,
        "fixedrange": True,  # a finger on a chart is to scroll the page
        "automargin": True,
        "title_standoff": 8,
    }
    plain_layout = {
        "template": go.layout.Template(),
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "showlegend": False,
        "dragmode": False,
        "font": {"color": SOFT, "size": 12, "family": "system-ui, sans-serif"},
        "hoverlabel": {"bgcolor": PANEL, "bordercolor": LINE, "font_color": INK, "align": "left"},
        "xaxis": axis,
        "yaxis": axis,
    }
    return go.Figure(list(traces), plain_layout | layout)


def line(
    x: Sequence[float], y: Sequence[float | None], says: Sequence[str], **given: Any
) -> go.Scatter:
    """Points on a line, each with what is said of it."""
    style = {"mode": "lines+markers", "marker": {"size": 7}} | given
    return go.Scatter(x=list(x), y=list(y), hovertext=list(says), hoverinfo="text", **style)


def marker(symbol: str, color: str, size: int) -> dict[str, Any]:
    """The look of a point: an open one is a ring of its colour."""
    return {"symbol": symbol, "color": color, "size": size, "line": {"width": 2, "color": color}}


def band(x: Sequence[float], intervals: Sequence[Interval], color: str) -> go.Scatter:
    """The area between the ends of intervals."""
    lows, highs = [each.low for each in intervals], [each.high for each in intervals]
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*highs, *reversed(lows)],
        fill="toself",
        fillcolor=color,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
    )


def level(
    value: float, color: str, dash: str = DASHED, width: float = 1.4, along: str = "x"
) -> dict[str, Any]:
    """A line from edge to edge, along an axis."""
    other = "y" if along == "x" else "x"
    ends = {f"{along}ref": "paper", f"{along}0": 0, f"{along}1": 1}
    place = {"type": "line", f"{other}0": value, f"{other}1": value, "layer": "between"}
    return place | ends | {"line": {"color": color, "width": width, "dash": dash}}


def stripe(low: float, high: float) -> dict[str, Any]:
    """A stripe across the whole panel: what base does by itself."""
    place = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high}
    return place | {"layer": "below", "line": {"width": 0}, "fillcolor": BASE_BAND}


def rounds_axis(num_rounds: int) -> dict[str, Any]:
    """An x axis of base and rounds, with so many numbers as find room."""
    step = 1 + num_rounds // 9
    ticks = list(range(0, num_rounds + 1, step))
    return {
        "xaxis_tickvals": ticks,
        "xaxis_ticktext": ["base", *map(str, ticks[1:])],
        "xaxis_range": [-0.25, max(1, num_rounds) + 0.25],
        "xaxis_title_text": "after round",
    }


def round_name(number: int, num_rounds: int) -> str:
    """The name of a round's colour, from the first to the last."""
    if num_rounds > len(ROUNDS):
        number = 1 + (number - 1) * (len(ROUNDS) - 1) // (num_rounds - 1)
    return f"round-{number}"


def round_color(number: int, num_rounds: int) -> str:
    """A round's colour."""
    return _LIGHT[round_name(number, num_rounds)]


def plain(text: str) -> str:
    """Text as Plotly shows it: it takes tags for formatting."""
    return html.escape(text, quote=False)


def steered_points(
    summary: Summary,
    value: Callable[[ConditionFigures], float],
    says: Callable[[ConditionFigures], str],
) -> go.Scatter:
    """What steering alone did in each round."""
    steered = [round.steered for round in summary.rounds]
    return line(
        [round.number for round in summary.rounds],
        [value(each) for each in steered],
        [f"<b>{each.label}</b><br>{plain(says(each))}" for each in steered],
        mode="markers",
        marker=marker("circle-open", STEERED, 8),
    )
