"""What every chart of the pages is made of: a plain panel, lines and levels, an axis of rounds."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from eval.statistics import Interval
from steer_heal import palette
from steer_heal.saved import ConditionFigures
from steer_heal.summary import Summary

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
        "gridcolor": palette.LINE,
        "linecolor": palette.LINE,
        "zeroline": False,
        "fixedrange": True,  # a finger on a chart is to scroll the page
        "automargin": True,
        "title_standoff": 8,
    }
    plain_layout = {
        "template": go.layout.Template(),
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": palette.CLEAR,
        "plot_bgcolor": palette.CLEAR,
        "showlegend": False,
        "dragmode": False,
        "font": {"color": palette.SOFT, "size": 12, "family": "system-ui, sans-serif"},
        "hoverlabel": {
            "bgcolor": palette.PANEL,
            "bordercolor": palette.LINE,
            "font_color": palette.INK,
            "align": "left",
        },
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
    return place | {"layer": "below", "line": {"width": 0}, "fillcolor": palette.BASE_BAND}


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
        marker=marker("circle-open", palette.STEERED, 8),
    )
