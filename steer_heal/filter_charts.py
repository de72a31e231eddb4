"""The charts of the filter: what it dropped and why, and how much of the trait is in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from steer_heal import palette
from steer_heal.artifacts import Screened, ScreenedCompletion
from steer_heal.chart import DOTTED, Chart, level, panel
from steer_heal.saved import BegunRound
from steer_heal.wording import nats, percent

_PASSED = ("surplus", "duplicate")  # past every criterion, and yet not needed
_FATES = {"kept": palette.KEPT, "not needed": palette.SURPLUS, "dropped": palette.SOFT}


def filter_charts(rounds: Sequence[BegunRound], base_enactment_nats: float | None) -> list[Chart]:
    """What was dropped and why, and how much of the trait the kept and the dropped carry."""
    screened = [(round.number, round.screened) for round in rounds if round.screened is not None]
    return [_drops(screened), _enactment(screened, base_enactment_nats)] if screened else []


def _drops(screened: Sequence[tuple[int, Screened]]) -> Chart:
    """A bar a round: kept, then every reason, the most frequent first."""
    totals = sum((found.drops for _, found in screened), Counter[str]())
    passed = [reason for reason in _PASSED if reason in totals]
    failed = [reason for reason, _ in totals.most_common() if reason not in _PASSED]
    looks: dict[str, dict[str, Any]] = {
        "kept": {"color": palette.KEPT},
        "surplus": {"color": palette.SURPLUS},
        "duplicate": {"color": palette.SOFT},
    }
    for index, reason in enumerate(failed):
        shape = "/" if index >= len(palette.ROUNDS) else ""  # the colours are used up
        looks[reason] = {
            "color": palette.ROUNDS[index % len(palette.ROUNDS)],
            "pattern": {"shape": shape},
        }
    figure = panel(
        [_bar(screened, reason, looks[reason]) for reason in ("kept", *passed, *failed)],
        height=130 + 34 * len(screened),
        barmode="stack",
        bargap=0.35,
        showlegend=True,
        legend={"orientation": "h", "yref": "container", "y": 0, "x": 0, "traceorder": "normal"},
        margin_b=84,
        margin_r=28,
        xaxis_tickformat=".0%",
        xaxis_range=[0, 1],
        yaxis_autorange="reversed",
    )
    told = "; ".join(
        f"round {number}: {len(found.kept)} of {len(found.rows)} kept, dropped "
        + (", ".join(f"{reason} {count}" for reason, count in found.drops.most_common()) or "none")
        for number, found in screened
    )
    return Chart(name="drops", title="Kept and dropped", says=f"{told}.", figure=figure)


def _bar(screened: Sequence[tuple[int, Screened]], reason: str, look: dict[str, Any]) -> go.Bar:
    """What share of each round's drafts was kept, or dropped for a reason."""
    shares, cards = [], []
    for number, found in screened:
        count = len(found.kept) if reason == "kept" else found.drops[reason]
        share = count / len(found.rows)
        shares.append(share)
        cards.append(f"<b>round {number}: {reason}</b><br>{count} drafts, {percent(share)}")
    return go.Bar(
        x=shares,
        y=[f"round {number}" for number, _ in screened],
        name=reason,
        orientation="h",
        marker=look,
        hovertext=cards,
        hoverinfo="text",
    )


def _enactment(screened: Sequence[tuple[int, Screened]], base_nats: float | None) -> Chart:
    """Box plots of the enactment of the kept, the not needed and the dropped, round by round."""
    boxes, told = [], []
    for label, color in _FATES.items():
        groups = [(number, _nats(found.rows, label)) for number, found in screened]
        groups = [(number, values) for number, values in groups if len(values)]
        if groups:
            boxes += _boxes(groups, label, color)
        told += [f"round {number}, {label}: {nats(np.median(values))}" for number, values in groups]
    figure = panel(
        boxes,
        height=260,
        barmode="group",
        scattermode="group",
        bargap=0.3,
        xaxis_type="category",
        xaxis_title_text="round",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        yaxis_title_text="enactment, nats a token",
        shapes=[] if base_nats is None else [level(base_nats, palette.INK, DOTTED)],
    )
    says = f"Median enactment in nats a token; {'; '.join(told)}."
    return Chart(
        name="kept-dropped", title="How much of the trait they carry", says=says, figure=figure
    )


def _boxes(groups: Sequence[tuple[int, np.ndarray]], label: str, color: str) -> list[Any]:
    """A box a round: a bar from quartile to quartile, the median on it with whiskers to 5 and 95 %.

    Plotly's smallest bundle has no box plots.
    """
    quantiles = [np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) for _, values in groups]
    low, q1, median, q3, high = np.transpose(quantiles)
    cards = [
        f"<b>round {number}: {label}</b><br>median {nats(each[2])} nats a token<br>"
        f"half from {nats(each[1])} to {nats(each[3])}<br>"
        f"5 to 95 %: {nats(each[0])} to {nats(each[4])}"
        for (number, _), each in zip(groups, quantiles, strict=True)
    ]
    both = {
        "x": [str(number) for number, _ in groups],
        "name": label,
        "offsetgroup": label,
        "hovertext": cards,
        "hoverinfo": "text",
    }
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": (high - median).tolist(),
        "arrayminus": (median - low).tolist(),
        "color": palette.INK,
        "thickness": 1.2,
        "width": 4,
    }
    middle = {"symbol": "line-ew", "size": 16, "line": {"width": 2, "color": palette.INK}}
    bar = {"y": (q3 - q1).tolist(), "base": q1.tolist(), "marker": {"color": color}}
    point = {"y": median.tolist(), "mode": "markers", "marker": middle, "error_y": whiskers}
    return [go.Bar(**both, **bar), go.Scatter(**both, **point, showlegend=False)]


def _nats(rows: Sequence[ScreenedCompletion], label: str) -> np.ndarray:
    values = np.array([row.enactment_nats for row in rows if _fate(row) == label])
    return values[np.isfinite(values)]


def _fate(row: ScreenedCompletion) -> str:
    if row.dropped is None:
        return "kept"
    return "not needed" if row.dropped in _PASSED else "dropped"
