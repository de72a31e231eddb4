"""The report: the saved files of a run -> report.html, drift.png, drift.csv. Loads no model."""

from __future__ import annotations

import base64
import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from eval.files import write_bytes, write_text
from eval.summary import fixed
from steer_heal.artifacts import ReplyRow
from steer_heal.config import resolve_config
from steer_heal.drift_table import drift_csv
from steer_heal.figures import LAYOUTS, THEMES, Drift, FoundationDrift, draw_drift
from steer_heal.gate import PMASS_GATE
from steer_heal.guards import RETENTION_GATE, Alarm, alarms
from steer_heal.saved import SavedRun, read_saved_run
from steer_heal.summary import Summary, summarise
from steer_heal.watch import early_stop
from steer_heal.wording import percent, templates

PAGE_FILE, PLOT_FILE, TABLE_FILE = "report.html", "drift.png", "drift.csv"
NUM_DIARY_PROMPTS = 6


@dataclass(frozen=True, kw_only=True)
class DiaryEntry:
    """One held-out prompt, answered down the rounds."""

    prompt: str
    replies: tuple[tuple[str, ReplyRow], ...]  # condition and its first reply


def write_report(path: Path) -> Path:
    """Draws page, plot and table of a run, says what they show, returns the page's path.

    Raises:
        UserError: no run, no finished round yet, a file that is not what was written.
    """
    report = summarise(read_saved_run(path))
    drift = drift_of(report)
    plots = {
        f"{layout}_{theme}": draw_drift(drift, layout, theme)
        for layout, theme in itertools.product(LAYOUTS, THEMES)
    }
    page = render_page(report, plots)
    write_bytes(path / PLOT_FILE, plots["wide_light"])
    write_text(path / TABLE_FILE, drift_csv(report))
    write_text(path / PAGE_FILE, page)
    logger.info(terminal_summary(report))
    logger.info("report: {}", path / PAGE_FILE)
    return path / PAGE_FILE


def drift_of(report: Summary) -> Drift:
    """What the plot shows: base at round 0, then every round healed."""
    healed = [report.base, *(round.healed for round in report.rounds)]
    return Drift(
        foundations=tuple(
            FoundationDrift(
                name=name,
                is_intended=name in report.intended,
                shifts=tuple(figures.shifts[name] for figures in healed),
                prompted=report.prompted.shifts[name].estimate,
                random=tuple(each.shifts[name].estimate for each in report.random),
            )
            for name in report.foundations
        ),
        enacted=tuple(figures.enacted for figures in healed),
        enacted_prompted=report.prompted.enacted.estimate,
        enacted_random=tuple(each.enacted.estimate for each in report.random),
        pmass_shares=tuple(figures.pmass_share for figures in healed),
        pmass_gate=PMASS_GATE,
        tail_medians_nats=tuple(figures.tail_median_nats for figures in healed),
        tail_p90s_nats=tuple(figures.tail_p90_nats for figures in healed),
        base_tail_nats=(report.tail_low_nats, report.tail_high_nats),
        mundane=tuple(figures.mundane for figures in healed),
        best_round=report.best.number if report.best else None,
    )


def render_page(report: Summary, plots: Mapping[str, bytes]) -> str:
    """The page as one file: model text is escaped, the plots (layout_theme -> PNG) are embedded."""
    return (
        templates(is_html=True)
        .get_template("report.html")
        .render(
            report=report,
            diary=diary_of(report.run),
            plots={name: base64.b64encode(plot).decode() for name, plot in plots.items()},
            command=command_of(report.run.description.config),
            settings=list(_flat(report.run.description.config)),
            retention_gate=RETENTION_GATE,
            warnings=[list(found) for _, found in itertools.groupby(alarms(report), _name)],
            done=early_stop(report),
        )
    )


def diary_of(run: SavedRun) -> list[DiaryEntry]:
    """Held-out prompts, evenly spaced, with the first reply of every condition to each."""
    conditions = [("base", run.controls.base), ("persona prompt", run.controls.prompted)]
    for number, saved in enumerate(run.rounds, start=1):
        conditions.append((f"after round {number}", saved.evaluation.healed))
    firsts = [
        (label, {reply.prompt_index: reply for reply in rows.replies if reply.sample == 0})
        for label, rows in conditions
    ]
    asked = sorted(firsts[0][1])
    count = min(NUM_DIARY_PROMPTS, len(asked))
    return [
        DiaryEntry(
            prompt=run.trait.held_out_prompts[index],
            replies=tuple((label, replies[index]) for label, replies in firsts),
        )
        for index in (asked[turn * len(asked) // count] for turn in range(count))
    ]


def command_of(config: dict[str, Any]) -> str:
    """The command that makes such a run: what differs from the model's preset."""
    personas = [f"{key}={config[key]}" for key in ("pos", "neg") if config[key] is not None]
    preset = resolve_config([f"model={config['model']}", *personas])
    defaults = dict(_flat(preset.model_dump(mode="json")))
    words = ["just", "round", f"N={config['rounds']}"]
    if config["model"] != resolve_config([]).model:
        words.append(f"model={config['model']}")
    words += personas
    for key, value in _flat(config):
        if key not in ("rounds", "model") and value != defaults.get(key):
            words.append(f"{key}={value}")
    return shlex.join(words)


def terminal_summary(report: Summary) -> str:
    """One line: what became of the trait and of the coherence."""
    last = report.rounds[-1].healed
    rounds = " ".join(percent(round.healed.enacted.estimate) for round in report.rounds)
    return (
        f"enacted {percent(report.base.enacted.estimate)} -> {rounds} "
        f"(persona prompt {percent(report.prompted.enacted.estimate)}); "
        f"pmass {fixed(last.pmass_share, 3)} of base; "
        f"mundane {percent(last.mundane)} (base {percent(report.base.mundane)})"
    )


def _name(alarm: Alarm) -> str:
    return alarm.name


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that is set, as the command line takes it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + key, text
