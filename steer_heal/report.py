"""The report: the saved files of a run -> report.html, drift.png, drift.svg, drift.csv.

Loads no model. The page is one file: what draws it and the data are in it, and nothing is fetched.
It is drawn of any run, whatever stage it is in; the figures for papers of one with a round done.
"""

from __future__ import annotations

import base64
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger

from eval.errors import UserError
from eval.files import write_bytes, write_text
from eval.processes import on_main
from eval.summary import fixed
from steer_heal.artifacts import ReplyRow
from steer_heal.browse import packed_completions
from steer_heal.chart import Chart
from steer_heal.charts import coherence_charts, foundation_charts
from steer_heal.config import resolve_config
from steer_heal.drift_map import drift_charts
from steer_heal.drift_table import drift_csv
from steer_heal.figures import FORMATS, Drift, FoundationDrift, draw_drift
from steer_heal.filter_charts import filter_charts
from steer_heal.gate import PMASS_GATE
from steer_heal.guards import RETENTION_GATE, Alarm, alarms
from steer_heal.page import fill_page
from steer_heal.palette import round_name
from steer_heal.progress import Progress, read_progress
from steer_heal.round_charts import dose_charts, heal_charts
from steer_heal.saved import SavedRun, early, late, share_fired
from steer_heal.summary import Summary, summarise
from steer_heal.verdict import judge_run
from steer_heal.watch import early_stop
from steer_heal.wording import percent

PAGE_FILE, TABLE_FILE = "report.html", "drift.csv"
NUM_DIARY_PROMPTS = 6
_REFERENCES = {  # heal.barrier_reference -> how people call it
    "previous": "the student before",
    "base": "base",
    "last_good": "the last coherent round",
}


@dataclass(frozen=True, kw_only=True)
class DiaryEntry:
    """One held-out prompt, answered down the rounds."""

    prompt: str
    replies: tuple[tuple[str, ReplyRow], ...]  # condition and its first reply


@on_main
def write_report(path: Path) -> Path:
    """Draws page, plots and table of a run, says what they show, returns the page's path.

    Raises:
        UserError: no run, or a file that is not what was written.
    """
    progress = read_progress(path)
    report = summarise(progress.saved) if progress.saved else None
    page = render_page(progress, report)
    if report is not None and report.rounds:
        drift = drift_of(report)
        for format in FORMATS:
            write_bytes(path / f"drift.{format}", draw_drift(drift, format))
        write_text(path / TABLE_FILE, drift_csv(report))
        logger.info(terminal_summary(report))
    elif progress.following:
        logger.info("no round is done yet; next: {}", progress.following)
    write_text(path / PAGE_FILE, page)
    logger.info("report: {}", path / PAGE_FILE)
    return path / PAGE_FILE


@on_main
def draw_page(path: Path) -> None:
    """Draws the page alone, of a run that goes on: one that cannot be written costs no more."""
    try:
        progress = read_progress(path)
        report = summarise(progress.saved) if progress.saved else None
        write_text(path / PAGE_FILE, render_page(progress, report))
    except UserError as error:
        logger.warning("the page could not be drawn, the run goes on: {}", error)


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


def render_page(progress: Progress, report: Summary | None) -> str:
    """The page as one file; model text is always escaped.

    Args:
        report: None where base and prompts are not measured yet.
    """
    done = early_stop(report) if report is not None and report.rounds else None
    found = alarms(report) if report is not None else []
    return fill_page(
        "report.html",
        charts_of(progress, report),
        progress=progress,
        following=None if done else progress.following,
        done=done,
        report=report,
        verdict=judge_run(report) if report is not None and report.rounds else None,
        warnings=[list(group) for _, group in itertools.groupby(found, _name)],
        diary=diary_of(progress.saved) if progress.saved else [],
        command=command_of(progress.description.config),
        settings=list(_flat(progress.description.config)),
        retention_gate=RETENTION_GATE,
        round_name=round_name,
        completions=packed_completions(progress.rounds),
        still=_still(report) if report is not None and report.rounds else None,
        reference=_REFERENCES[progress.description.config["heal"]["barrier_reference"]],
        early=early,
        late=late,
        share_fired=share_fired,
    )


def charts_of(progress: Progress, report: Summary | None) -> dict[str, list[Chart]]:
    """Section of the page -> its charts; none where there is nothing to draw yet."""
    base = report.base_enactment_nats.estimate if report is not None else None
    return {
        "drift": drift_charts(report) if report is not None else [],
        "foundations": foundation_charts(report) if report is not None else [],
        "coherence": coherence_charts(report) if report is not None else [],
        "doses": dose_charts(progress.rounds),
        "filter": filter_charts(progress.rounds, base),
        "heal": heal_charts(
            progress.rounds,
            has_teacher=progress.description.config["heal"]["soft_weight"] > 0,
        ),
    }


def diary_of(run: SavedRun) -> list[DiaryEntry]:
    """Held-out prompts, evenly spaced, with the first reply of every condition to each."""
    conditions = [("base", run.controls.base), ("persona prompt", run.controls.prompted)]
    for round in run.rounds:
        conditions.append((f"round {round.number}, steered", round.evaluation.steered))
        conditions.append((f"round {round.number}, healed", round.evaluation.healed))
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
    rounds = ", ".join(percent(round.healed.enacted.estimate) for round in report.rounds)
    return (
        f"enacted: base {percent(report.base.enacted.estimate)}, persona prompt "
        f"{percent(report.prompted.enacted.estimate)}, after each round {rounds}; after the last "
        f"pmass {fixed(last.pmass_share, 3)} of base's, mundane tasks {percent(last.mundane)} "
        f"(base {percent(report.base.mundane)})"
    )


def _still(report: Summary) -> str:
    """The figure for papers in base64, for who reads the page without its scripts."""
    return base64.b64encode(draw_drift(drift_of(report), "svg")).decode("ascii")


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
