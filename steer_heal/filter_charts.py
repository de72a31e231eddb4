"""The charts of the filter: what it dropped and why, and how much of the trait is in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from steer_heal.artifacts import Screened, ScreenedCompletion
from steer_heal.chart import (
    DOTTED,
    INK,
    KEPT,
    SOFT,
    SURPLUS,
    Chart,
    level,
    panel,
)
from steer_heal.chart import ROUNDS as COLORS
from steer_heal.saved import BegunRound
from steer_heal.wording import nats, percent

_PASSED = ("surplus", "duplicate")  # past every criterion, and yet not needed


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
        "kept": {"color": KEPT},
        "surplus": {"color": SURPLUS},
        "duplicate": {"color": SOFT},
    }
    for index, reason in enumerate(failed):
        shape = "/" if index >= len(COLORS) else ""  # the colours are used up
        looks[reason] = {"color": COLORS[index % len(COLORS)], "pattern": {"shape": shape}}
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
    for label, color in (("kept", KEPT), ("not needed", SURPLUS), ("dropped", SOFT)):
        groups = [(number, _nats(found.rows, label)) for number, found in screened]
        groups = [(number, values) for number, values in groups if len(values)]
        if not groups:
            continue
        quantiles = [np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) for _, values in groups]
        low, q1, median, q3, high = np.transpose(quantiles).tolist()
        boxes.append(
            go.Box(
                x=[str(number) for number, _ in groups],
                lowerfence=low,
                q1=q1,
                median=median,
                q3=q3,
                upperfence=high,
                name=label,
                marker={"color": color},
                line={"width": 1.6},
            )
        )
        told += [
            f"round {number}, {label}: {nats(middle)}"
            for (number, _), middle in zip(groups, median, strict=True)
        ]
    figure = panel(
        boxes,
        height=260,
        boxmode="group",
        xaxis_type="category",
        xaxis_title_text="round",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        yaxis_title_text="enactment, nats a token",
        shapes=[] if base_nats is None else [level(base_nats, INK, DOTTED)],
    )
    says = f"Median enactment in nats a token; {'; '.join(told)}."
    return Chart(
        name="kept-dropped", title="How much of the trait they carry", says=says, figure=figure
    )


def _nats(rows: Sequence[ScreenedCompletion], label: str) -> np.ndarray:
    values = np.array([row.enactment_nats for row in rows if _fate(row) == label])
    return values[np.isfinite(values)]


def _fate(row: ScreenedCompletion) -> str:
    if row.dropped is None:
        return "kept"
    return "not needed" if row.dropped in _PASSED else "dropped"
