"""The charts of drift: two foundations against each other, and the share of replies on trait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from eval.statistics import Interval
from eval.summary import fixed
from steer_heal import palette
from steer_heal.chart import (
    DOTTED,
    Chart,
    band,
    level,
    line,
    marker,
    panel,
    plain,
    rounds_axis,
    steered_points,
)
from steer_heal.saved import ConditionFigures
from steer_heal.summary import Summary
from steer_heal.wording import bounds, nats, percent, percent_bounds


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One of the two things that the drift map shows of a condition."""

    name: str
    title: str
    value: Callable[[ConditionFigures], Interval]
    says: Callable[[ConditionFigures], str]


def drift_charts(summary: Summary) -> list[Chart]:
    """The drift map, and the share of replies that act the trait."""
    return [_map(summary), _enacted(summary)]


def _map(summary: Summary) -> Chart:
    """Two intended foundations against each other: base -> steered -> healed, round after round."""
    across, up = _axes(summary)
    prompted = summary.prompted
    steps = [summary.base]
    for round in summary.rounds:
        steps += [round.steered, round.healed]
    path = go.Scatter(
        x=[across.value(each).estimate for each in steps],
        y=[up.value(each).estimate for each in steps],
        mode="lines",
        line={"color": palette.SOFT, "width": 1.2},
        hoverinfo="skip",
    )
    healed = [round.healed for round in summary.rounds]
    groups = [
        path,
        _points(summary.random, across, up, symbol="x-thin", color=palette.RANDOM, size=9),
        _points([prompted], across, up, symbol="star", color=palette.PROMPTED, size=14),
        _points(
            [summary.engineered], across, up, symbol="star-open", color=palette.PROMPTED, size=13
        ),
        _points([r.steered for r in summary.rounds], across, up, symbol="circle-open", size=9),
        _points(healed, across, up, symbol="circle", color=palette.HEALED, size=11, has_bars=True),
        _points([summary.base], across, up, symbol="diamond", color=palette.INK, size=11),
    ]
    if summary.unbarred is not None:
        groups.append(
            _points([summary.unbarred], across, up, symbol="square-open", color=palette.HEALED)
        )
    figure = panel(
        groups,
        height=440,
        xaxis_title_text=across.title,
        yaxis_title_text=up.title,
        hovermode="closest",
        shapes=[
            level(up.value(prompted).estimate, palette.PROMPTED),
            level(across.value(prompted).estimate, palette.PROMPTED, along="y"),
        ],
        annotations=[_mark(each, across, up) for each in _named(summary)],
    )
    last = healed[-1] if healed else summary.base
    return Chart(
        name="map",
        title=f"{up.name} against {across.name}".capitalize(),
        says=f"Drift map. Base: {_says(summary.base, across, up)}. {last.label}: "
        f"{_says(last, across, up)}. Persona prompt: {_says(prompted, across, up)}.",
        figure=figure,
    )


def _axes(summary: Summary) -> tuple[_Axis, _Axis]:
    """Across, then up: two intended foundations, or what there is instead of them."""
    names = summary.intended
    foundations = [_foundation_axis(summary, name) for name in names[:2]]
    others = _Axis(
        name="other foundations",
        title="others: mean |shift|, nats",
        value=lambda each: _point(each.others_shift_nats),
        says=lambda each: f"others {nats(each.others_shift_nats, False)} nats",
    )
    enacted = _Axis(
        name="replies",
        title="replies that act the trait, share",
        value=lambda each: each.enacted,
        says=lambda each: f"enacted {percent(each.enacted.estimate)}",
    )
    instead = [] if len(foundations) == 2 else [others] if foundations else [enacted, others]
    up, across = foundations + instead
    return across, up


def _foundation_axis(summary: Summary, name: str) -> _Axis:
    wanted = "up" if summary.run.trait.intended[name] > 0 else "down"
    label = name.replace("_", " ")
    return _Axis(
        name=label,
        title=plain(f"{label}, nats (wanted: {wanted})"),
        value=lambda each: each.shifts[name],
        says=lambda each: f"{label} {nats(each.shifts[name].estimate)} {bounds(each.shifts[name])}",
    )


def _point(value: float) -> Interval:
    return Interval(estimate=value, low=value, high=value)


def _says(figures: ConditionFigures, across: _Axis, up: _Axis) -> str:
    return f"{up.says(figures)}, {across.says(figures)}"


def _points(
    conditions: Sequence[ConditionFigures],
    across: _Axis,
    up: _Axis,
    *,
    symbol: str,
    color: str = palette.STEERED,
    size: int = 10,
    has_bars: bool = False,
) -> go.Scatter:
    """One kind of condition; what is known of each is said where it is pointed at."""
    bars = {
        f"error_{axis}": {
            "type": "data",
            "symmetric": False,
            "array": [value(each).high - value(each).estimate for each in conditions],
            "arrayminus": [value(each).estimate - value(each).low for each in conditions],
            "color": palette.HEALED_BAND,
            "thickness": 3,
            "width": 0,
        }
        for axis, value in (("x", across.value), ("y", up.value))
    }
    return line(
        [across.value(each).estimate for each in conditions],
        [up.value(each).estimate for each in conditions],
        [_card(each, across, up) for each in conditions],
        mode="markers",
        marker=marker(symbol, color, size),
        **(bars if has_bars else {}),
    )


def _card(figures: ConditionFigures, across: _Axis, up: _Axis) -> str:
    enacted = f"enacted {percent(figures.enacted.estimate)} {percent_bounds(figures.enacted)}"
    pmass = f"pmass {fixed(figures.pmass_share, 3)} of base's"
    tail = f"tail {nats(figures.tail_median_nats, False)} nats a token"
    lines = (up.says(figures), across.says(figures), enacted, pmass, tail)
    return "<br>".join([f"<b>{figures.label}</b>", *map(plain, dict.fromkeys(lines))])


def _named(summary: Summary) -> list[tuple[str, ConditionFigures, int]]:
    """What has a name on the map, and how far above it, pixels: what healing reaches is often where
    the prompt is, so their names are on two sides. Not every round: many may lie on one another.
    """
    marks = [("base", summary.base, -18), ("persona prompt", summary.prompted, -18)]
    best = summary.best
    if summary.rounds and (best is None or best.number > 1):
        marks.append(("1", summary.rounds[0].healed, 16))
    if best is not None:
        marks.append((f"{best.number}, best", best.healed, 16))
    return marks


def _mark(named: tuple[str, ConditionFigures, int], across: _Axis, up: _Axis) -> dict[str, object]:
    text, figures, above = named
    place = {"x": across.value(figures).estimate, "y": up.value(figures).estimate}
    return place | {
        "text": text,
        "showarrow": False,
        "yshift": above,
        "font": {"color": palette.INK},
    }


def _enacted(summary: Summary) -> Chart:
    rounds = [summary.base, *(round.healed for round in summary.rounds)]
    shares = [each.enacted for each in rounds]
    levels = [level(summary.prompted.enacted.estimate, palette.PROMPTED)]
    levels += [level(each.enacted.estimate, palette.RANDOM, DOTTED) for each in summary.random]
    says = [f"{percent(share.estimate)} {percent_bounds(share)}" for share in shares]
    figure = panel(
        [
            band(range(len(rounds)), shares, palette.HEALED_BAND),
            steered_points(summary, lambda each: each.enacted.estimate, _share_card),
            line(
                range(len(rounds)),
                [share.estimate for share in shares],
                [f"<b>{each.label}</b><br>{said}" for each, said in zip(rounds, says, strict=True)],
                line={"color": palette.HEALED, "width": 2.4},
            ),
        ],
        height=440,
        shapes=levels,
        yaxis_tickformat=".0%",
        yaxis_range=[-0.03, 1.03],
        yaxis_title_text="share of replies to held-out prompts",
        **rounds_axis(len(summary.rounds)),
    )
    down = ", ".join(percent(share.estimate) for share in shares)
    return Chart(
        name="enacted",
        title="Replies that act the trait",
        says=f"Share of replies that act the trait, base and then after each round: {down}; "
        f"persona prompt {percent(summary.prompted.enacted.estimate)}.",
        figure=figure,
    )


def _share_card(figures: ConditionFigures) -> str:
    return f"{percent(figures.enacted.estimate)} {percent_bounds(figures.enacted)}"
