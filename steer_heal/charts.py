"""The charts of foundations and of coherence over rounds: small multiples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eval.statistics import Interval
from eval.summary import fixed
from steer_heal import palette
from steer_heal.chart import (
    DOTTED,
    Chart,
    band,
    level,
    line,
    panel,
    plain,
    rounds_axis,
    steered_points,
    stripe,
)
from steer_heal.gate import PMASS_GATE
from steer_heal.saved import ConditionFigures
from steer_heal.summary import Summary
from steer_heal.wording import bounds, nats, percent, plain_bounds


def foundation_charts(summary: Summary) -> list[Chart]:
    """A small chart a foundation, all on one scale: its shift from base over rounds."""
    healed = [summary.base, *(round.healed for round in summary.rounds)]
    shown = [*healed, summary.prompted, *summary.random]
    bands = [shift for each in healed for shift in each.shifts.values()]
    levels = [shift.estimate for each in shown for shift in each.shifts.values()]
    low = min(levels + [shift.low for shift in bands])
    high = max(levels + [shift.high for shift in bands])
    margin = 0.06 * (high - low or 1)
    return [
        _foundation(summary, name, healed, [low - margin, high + margin])
        for name in summary.foundations
    ]


def coherence_charts(summary: Summary) -> list[Chart]:
    """Five small charts of how whole the text is, over rounds."""
    return [
        _whole(
            summary,
            "pmass",
            "Answers in the asked format",
            lambda each: each.pmass_share,
            lambda each: f"pmass {fixed(each.pmass_share, 3)} of base's",
            shapes=[level(PMASS_GATE, palette.STEERED, DOTTED)],
            range=_pmass_range(summary),
            yaxis_title_text="pmass, share of base's",
        ),
        _whole(
            summary,
            "tail",
            "Surprisal of the replies' ends",
            lambda each: each.tail_median_nats,
            lambda each: (
                f"tail {nats(each.tail_median_nats, False)} nats a token, "
                f"a tenth above {nats(each.tail_p90_nats, False)}"
            ),
            shapes=[stripe(summary.tail_low_nats, summary.tail_high_nats)],
            yaxis_title_text="nats a token, median",
            yaxis_rangemode="tozero",
        ),
        _whole(
            summary,
            "loops",
            "Loops",
            lambda each: each.coherence.repetition,
            lambda each: f"{percent(each.coherence.repetition)} of 3-grams repeated",
            yaxis_title_text="3-grams repeated",
            yaxis_tickformat=".1%",
            yaxis_rangemode="tozero",
        ),
        _whole(
            summary,
            "length",
            "Length of the replies",
            lambda each: each.coherence.length_ratio.estimate,
            lambda each: (
                f"{fixed(each.coherence.length_ratio.estimate, 2)} "
                f"{plain_bounds(each.coherence.length_ratio)} times base's words"
            ),
            intervals=lambda each: each.coherence.length_ratio,
            yaxis_title_text="words, of base's",
        ),
        _whole(
            summary,
            "mundane",
            "Mundane tasks",
            lambda each: each.mundane,
            lambda each: f"{percent(each.mundane)} right",
            yaxis_title_text="share right",
            yaxis_tickformat=".0%",
            range=[min(0.88, *(each.mundane for each in _all(summary))) - 0.01, 1.01],
        ),
    ]


def _all(summary: Summary) -> list[ConditionFigures]:
    rounds = [figures for round in summary.rounds for figures in (round.steered, round.healed)]
    return [summary.base, summary.prompted, *rounds]


def _pmass_range(summary: Summary) -> list[float]:
    shares = [each.pmass_share for each in _all(summary)]
    lowest = min(shares)
    return [min(0.985, lowest - 0.1 * (1 - lowest)), max(1.003, max(shares) * 1.002)]


def _foundation(
    summary: Summary, name: str, healed: Sequence[ConditionFigures], range_: Sequence[float]
) -> Chart:
    shifts = [each.shifts[name] for each in healed]
    label = name.replace("_", " ")
    sign = summary.run.trait.intended.get(name)
    wanted = "" if sign is None else f" (wanted {'up' if sign > 0 else 'down'})"
    prompted = summary.prompted.shifts[name].estimate
    cards = [
        f"<b>{each.label}</b><br>{nats(shift.estimate)} {bounds(shift)} nats"
        for each, shift in zip(healed, shifts, strict=True)
    ]
    figure = panel(
        [
            band(range(len(healed)), shifts, palette.HEALED_BAND),
            line(
                range(len(healed)),
                [shift.estimate for shift in shifts],
                cards,
                line={
                    "color": palette.HEALED if sign else palette.SOFT,
                    "width": 2.4 if sign else 1.6,
                },
            ),
        ],
        height=200,
        shapes=[level(0, palette.INK, "solid", 1), level(prompted, palette.PROMPTED)]
        + [level(each.shifts[name].estimate, palette.RANDOM, DOTTED) for each in summary.random],
        yaxis_range=list(range_),
        **rounds_axis(len(summary.rounds)),
    )
    return Chart(
        name=f"foundation-{name}",
        title=f"{label}{wanted}",
        says=f"{label}{wanted}: shift from base after each round "
        f"{', '.join(nats(shift.estimate) for shift in shifts[1:]) or 'not known yet'} nats; "
        f"persona prompt {nats(prompted)} nats.",
        figure=figure,
    )


def _whole(
    summary: Summary,
    name: str,
    title: str,
    value: Callable[[ConditionFigures], float],
    says: Callable[[ConditionFigures], str],
    *,
    intervals: Callable[[ConditionFigures], Interval] | None = None,
    shapes: Sequence[dict[str, object]] = (),
    range: Sequence[float] | None = None,
    **layout: Any,
) -> Chart:
    """One figure of the text, over rounds: steered, healed, and the persona prompt as a level."""
    healed = [summary.base, *(round.healed for round in summary.rounds)]
    numbers = list(map(float, [0, *(round.number for round in summary.rounds)]))
    traces = [band(numbers, list(map(intervals, healed)), palette.HEALED_BAND)] if intervals else []
    cards = [f"<b>{each.label}</b><br>{plain(says(each))}" for each in healed]
    traces += [
        steered_points(summary, value, says),
        line(
            numbers,
            [value(each) for each in healed],
            cards,
            line={"color": palette.HEALED, "width": 2},
        ),
    ]
    if range is not None:
        layout["yaxis_range"] = list(range)
    figure = panel(
        traces,
        shapes=[level(value(summary.prompted), palette.PROMPTED), *shapes],
        **rounds_axis(len(summary.rounds)),
        **layout,
    )
    last = healed[-1]
    return Chart(
        name=name,
        title=title,
        says=f"{title}. Base: {says(summary.base)}. {last.label}: {says(last)}. "
        f"Persona prompt: {says(summary.prompted)}.",
        figure=figure,
    )
