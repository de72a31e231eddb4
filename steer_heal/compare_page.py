"""compare.html: runs side by side on one page, self-contained, from their saved files alone.

Drift is that of every round from the run's own base; the paired differences are those that the
terminal's table gives; of the settings only those that differ are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from eval.files import write_text
from eval.statistics import Interval
from eval.summary import doubt_text, interval_text
from steer_heal.chart import Chart, band, level, line, panel, plain, rounds_axis
from steer_heal.compare import Comparison
from steer_heal.page import fill_page
from steer_heal.palette import INK, PALETTE
from steer_heal.saved import ConditionFigures, SavedRun
from steer_heal.summary import Summary, summarise
from steer_heal.wording import bounds, nats, percent, percent_bounds

PAGE_FILE = "compare.html"
_COLORS = ("healed", "steered", "prompted", "round-4", "round-1", "round-7", "round-3", "soft")
_SHARES = ("enacted", "flip rate", "pmass", "mundane")  # 0 to 1; all other figures are nats
_NAMES_ONLY = ("run", "folder")  # settings that say where a run is, and nothing of what it does


def write_page(comparison: Comparison, out: Path) -> None:
    """Writes the page of a comparison."""
    summaries = [summarise(run) for run in comparison.runs]
    charts = {"drift": _drift(summaries, comparison.names), "paired": _paired(comparison)}
    text = fill_page(
        PAGE_FILE,
        charts,
        names=comparison.names,
        colors=[_color_name(place) for place in range(len(comparison.runs))],
        figures=comparison.figures,
        pairs=comparison.differences,
        settings=list(_differing(comparison.runs)),
        interval_text=interval_text,
        doubt_text=doubt_text,
    )
    write_text(out, text)


def _color_name(place: int) -> str:
    return _COLORS[place % len(_COLORS)]


def _color(place: int) -> str:
    return PALETTE[_color_name(place)][0]


# -------------------------------------------------------------------------------------------- drift


def _drift(summaries: Sequence[Summary], names: Sequence[str]) -> list[Chart]:
    """Every foundation that a run means to move, and the replies, down the rounds."""
    wanted = dict.fromkeys(name for each in summaries for name in each.intended)
    charts = [_enacted(summaries, names)]
    return charts + [_foundation(summaries, names, name) for name in wanted]


def _enacted(summaries: Sequence[Summary], names: Sequence[str]) -> Chart:
    return _by_round(
        "enacted",
        "Replies that act the trait",
        summaries,
        names,
        lambda figures: figures.enacted,
        lambda interval: f"{percent(interval.estimate)} {percent_bounds(interval)}",
        yaxis_tickformat=".0%",
        yaxis_range=[-0.03, 1.03],
    )


def _foundation(summaries: Sequence[Summary], names: Sequence[str], foundation: str) -> Chart:
    return _by_round(
        f"drift-{foundation}",
        f"{foundation.replace('_', ' ').capitalize()}, shift from base, nats",
        summaries,
        names,
        lambda figures: figures.shifts[foundation],
        lambda interval: f"{nats(interval.estimate)} {bounds(interval)}",
        shapes=[level(0, INK, "solid", 1)],
    )


def _by_round(
    name: str,
    title: str,
    summaries: Sequence[Summary],
    names: Sequence[str],
    value: Callable[[ConditionFigures], Interval],
    told: Callable[[Interval], str],
    **layout: Any,
) -> Chart:
    """A line a run, from base to its last round, with intervals."""
    traces: list[go.Scatter] = []
    told_last = []
    for place, (summary, run) in enumerate(zip(summaries, names, strict=True)):
        healed = [value(each) for each in (summary.base, *(r.healed for r in summary.rounds))]
        rounds, color = list(range(len(healed))), _color(place)
        shade = band(rounds, healed, color)
        shade.opacity = 0.15
        cards = [
            f"<b>{plain(run)}</b><br>{f'round {at}' if at else 'base'}: {told(interval)}"
            for at, interval in enumerate(healed)
        ]
        heights = [interval.estimate for interval in healed]
        look = {"line": {"color": color, "width": 2}, "marker": {"color": color, "size": 7}}
        traces += [shade, line(rounds, heights, cards, **look)]
        told_last.append(f"{run}: {told(healed[-1])}")
    axis = rounds_axis(max(len(summary.rounds) for summary in summaries))
    figure = panel(traces, **axis, **layout)
    says = f"{title}, after the last round: {'; '.join(told_last)}."
    return Chart(name=name, title=title, says=says, figure=figure)


# ------------------------------------------------------------------------------------------- paired


def _paired(comparison: Comparison) -> list[Chart]:
    """Every difference from the first run with its interval, shares apart from nats."""
    names = dict.fromkeys(name for each in comparison.differences for name in each)
    shares = [name for name in names if name in _SHARES]
    others = [name for name in names if name not in _SHARES]
    return [
        _forest(comparison, "paired-shares", "Shares, 0 to 1", shares),
        _forest(comparison, "paired-nats", "Nats", others),
    ]


def _forest(comparison: Comparison, name: str, title: str, figures: Sequence[str]) -> Chart:
    """A line a figure, a point a run, with its interval."""
    first, *others = comparison.names
    traces = []
    for place, (run, found) in enumerate(zip(others, comparison.differences, strict=True), start=1):
        shown = [(figure, found[figure]) for figure in figures if figure in found]
        offset = 0.22 * (place - (len(others) + 1) / 2)
        traces.append(
            go.Scatter(
                x=[interval.estimate for _, interval in shown],
                y=[figures.index(figure) + offset for figure, _ in shown],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [each.high - each.estimate for _, each in shown],
                    "arrayminus": [each.estimate - each.low for _, each in shown],
                    "color": _color(place),
                    "thickness": 2,
                    "width": 0,
                },
                mode="markers",
                marker={"size": 9, "color": _color(place)},
                hovertext=[
                    f"<b>{plain(run)}</b> minus {plain(first)}<br>{figure} {interval_text(each)}"
                    for figure, each in shown
                ],
                hoverinfo="text",
            )
        )
    figure = panel(
        traces,
        height=70 + 34 * len(figures) + 8 * len(others) * len(figures),
        yaxis_tickvals=list(range(len(figures))),
        yaxis_ticktext=list(figures),
        yaxis_range=[len(figures) - 0.5, -0.5],
        xaxis_title_text=f"minus {plain(first)}",
        shapes=[level(0, INK, "solid", 1, along="y")],
    )
    says = f"Differences from {first} with 95 % intervals; the table below has the numbers."
    return Chart(name=name, title=title, says=says, figure=figure)


# ----------------------------------------------------------------------------------------- settings


def _differing(runs: Sequence[SavedRun]) -> Iterator[tuple[str, list[str]]]:
    """Every setting, and whatever else a run was made of, that is not the same in all: by run."""
    made = [_made_of(run) for run in runs]
    for key in dict.fromkeys(key for each in made for key in each):
        values = [each.get(key) for each in made]
        if any(value != values[0] for value in values):
            yield key, [_short(value) for value in values]


def _made_of(run: SavedRun) -> dict[str, Any]:
    about = run.description
    flat = dict(_flat(about.config))
    made = {key: value for key, value in flat.items() if key not in _NAMES_ONLY}
    made |= {f"trait file: {key}": value for key, value in about.trait.model_dump().items()}
    return made | {"model weights": about.model, "source code": about.code}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    many = isinstance(value, list | tuple)
    text = ", ".join(map(str, value)) if many else "" if value is None else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
