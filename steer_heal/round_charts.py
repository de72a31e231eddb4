"""The charts of how rounds were made: doses and training, a line a round.

They take rounds as far as they went: what a round has not come to yet is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eval.summary import fixed
from steer_heal import palette
from steer_heal.artifacts import DosePoint, TrainStep
from steer_heal.chart import DOTTED, Chart, level, line, marker, panel
from steer_heal.saved import BegunRound
from steer_heal.wording import nats, percent

_FROM_0 = {"yaxis_rangemode": "tozero"}
_SHARES = {"yaxis_tickformat": ".0%", "yaxis_range": [-0.03, 1.03]}


def dose_charts(rounds: Sequence[BegunRound]) -> list[Chart]:
    """What each dose does, a line a round; filled: the doses that the round's drafts were made at.

    Where doses were tried first, those that were tried are hollow.
    """
    if not any(round.screened for round in rounds) and not any(_probe(round) for round in rounds):
        return []
    kinds: list[tuple[str, str, Callable[[DosePoint], float], str, str]] = [
        ("dose-pass", "Drafts that pass the filter", lambda p: p.pass_rate, ".0%", "share"),
        ("dose-kl", "How far it bends the model", lambda p: p.kl_p95_nats, "", "p95, nats"),
        ("dose-enactment", "How much of the trait", lambda p: p.enactment_nats, "", "nats a token"),
    ]
    return [_dose_chart(rounds, *kind) for kind in kinds]


def heal_charts(rounds: Sequence[BegunRound], *, has_teacher: bool) -> list[Chart]:
    """Training, step by step, a line a round.

    Args:
        has_teacher: whether soft targets were learnt from the steered teacher.
    """
    trained = [(round.number, round.steps) for round in rounds if round.steps]
    if not trained:
        return []
    count = len(rounds)
    thresholds = {steps[0].threshold_nats: number for number, steps in trained}
    shapes = [
        level(nats_, palette.round_color(number, count), DOTTED)
        for nats_, number in thresholds.items()
    ]
    charts: list[tuple[str, str, str, Callable[[TrainStep], float | None], dict[str, Any]]] = [
        ("heal-nll", "Surprisal of the kept", "nll, nats a token", _nll, {}),
        ("heal-soft", "Distance from the teacher", "KL, nats a token", _soft, _FROM_0),
        ("heal-kl", "Distance travelled", "KL, nats", _kl, _FROM_0 | {"shapes": shapes}),
        ("heal-share", "Replies over the threshold", "share of them", _share_over, _SHARES),
        ("heal-ratio", "Pull of the barrier", "gradient ratio", _ratio, _FROM_0),
    ]
    return [
        _by_step(trained, count, name, title, unit, value, **layout)
        for name, title, unit, value, layout in charts
        if has_teacher or value is not _soft
    ]


# --------------------------------------------------------------------------------------------- dose


def _probe(round: BegunRound) -> tuple[DosePoint, ...]:
    return round.doses.probe if round.doses else ()


def _dose_chart(
    rounds: Sequence[BegunRound],
    name: str,
    title: str,
    value: Callable[[DosePoint], float],
    tick_format: str,
    unit: str,
) -> Chart:
    traces, told = [], []
    for round in rounds:
        color = palette.round_color(round.number, len(rounds))
        groups = (
            ("tried", _probe(round), "circle-open"),
            ("drafts at", round.screened.curve if round.screened else (), "circle"),
        )
        for what, points, symbol in groups:
            if points:
                traces.append(
                    line(
                        [point.dose for point in points],
                        [value(point) for point in points],
                        [_dose_card(round.number, what, point) for point in points],
                        line={"color": color, "width": 1.6},
                        marker=marker(symbol, color, 8),
                    )
                )
        if round.screened:
            curve = round.screened.curve
            figures = (f"{fixed(point.dose, 2)}: {fixed(value(point), 2)}" for point in curve)
            told.append(f"round {round.number}: {', '.join(figures)}")
    figure = panel(
        traces,
        xaxis_title_text="dose, multiples of the vector",
        yaxis_title_text=unit,
        yaxis_tickformat=tick_format,
    )
    by_dose = "; ".join(told) or "doses were tried so far"
    says = f"{title} ({unit}) by dose of the drafts; {by_dose}."
    return Chart(name=name, title=title, says=says, figure=figure)


def _dose_card(number: int, what: str, point: DosePoint) -> str:
    return "<br>".join(
        (
            f"<b>round {number}, {what} {fixed(point.dose, 3)}</b>",
            f"{percent(point.pass_rate)} of {point.num_drafts} pass",
            f"KL p95 {nats(point.kl_p95_nats, False)} nats",
            f"enactment {nats(point.enactment_nats)} nats a token",
        )
    )


# --------------------------------------------------------------------------------------------- heal


def _nll(step: TrainStep) -> float:
    return step.nll_nats


def _soft(step: TrainStep) -> float:
    return step.soft_nats


def _kl(step: TrainStep) -> float:
    return step.kl_nats


def _share_over(step: TrainStep) -> float:
    return step.share_over


def _ratio(step: TrainStep) -> float | None:
    return step.barrier_gradient_ratio


def _by_step(
    trained: Sequence[tuple[int, tuple[TrainStep, ...]]],
    num_rounds: int,
    name: str,
    title: str,
    unit: str,
    value: Callable[[TrainStep], float | None],
    **layout: Any,
) -> Chart:
    traces, told = [], []
    for number, steps in trained:
        measured = [(step.step, found) for step in steps if (found := value(step)) is not None]
        is_sparse = len(measured) < len(steps)
        color = palette.round_color(number, num_rounds)
        traces.append(
            line(
                [step for step, _ in measured],
                [found for _, found in measured],
                [f"round {number}, step {step}: {fixed(found, 3)}" for step, found in measured],
                mode="lines+markers" if is_sparse else "lines",
                line={"color": color, "width": 1.5},
                marker={"color": color, "size": 5},
            )
        )
        first_last = [fixed(found, 3) for _, found in measured[:1] + measured[-1:]]
        told.append(f"round {number}: {' to '.join(first_last) or 'not measured'}")
    last = max(steps[-1].step for _, steps in trained)
    ends = [-0.02 * last, 1.02 * last]
    figure = panel(
        traces, xaxis_title_text="step", xaxis_range=ends, yaxis_title_text=unit, **layout
    )
    says = f"{title} ({unit}), first step to last; {'; '.join(told)}."
    return Chart(name=name, title=title, says=says, figure=figure)
