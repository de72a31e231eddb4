"""The report: the saved files of a run -> report.html and drift.png. Loads no model.

Beside the figures of the conditions (saved.py):

    retention     trait shift healed / trait shift steered: near 1 healed, near 0 undone
    stretched     the replies' words over base's are off 1 by more than a tenth and than chance
    coherent      every vignette can be scored, pmass >= 0.99 of base's, and the median tail
                  surprisal of the replies at most the 95th percentile of the base's own unsteered
                  completions
    best round    the largest trait shift among the coherent rounds

Rounds are counted from 1 here, round 0 being the base; the folder of round 1 is round-00.
"""

from __future__ import annotations

import base64
import itertools
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from loguru import logger

from eval.files import write_bytes, write_text
from eval.statistics import Interval
from steer_heal.artifacts import ReplyRow, TrainStep
from steer_heal.config import resolve_config
from steer_heal.figures import LAYOUTS, THEMES, Drift, FoundationDrift, draw_drift
from steer_heal.saved import (
    ConditionFigures,
    SavedRound,
    SavedRun,
    condition_figures,
    length_correlation,
    read_saved_run,
)

PAGE_FILE, PLOT_FILE = "report.html", "drift.png"
TEMPLATES_FOLDER = Path(__file__).parent / "templates"
PMASS_GATE = 0.99  # share of base's
RETENTION_GATE = 0.3  # below: undone
MUNDANE_DROP = 0.01  # a larger one is a loss; share of the tasks
LENGTH_GATE = 0.1  # longer or shorter than base's by more: a confound. Prompts move it by 1 to 4 %
NUM_DIARY_PROMPTS = 6
UNBARRED = "round 1, no barrier"


@dataclass(frozen=True, kw_only=True)
class RoundFigures:
    """What one round came to."""

    number: int  # from 1
    saved: SavedRound
    steered: ConditionFigures
    healed: ConditionFigures
    retention: float | None  # None: steering moved nothing, or the wrong way
    is_coherent: bool

    @property
    def share_fired(self) -> float:
        """Share of the training steps with the barrier on, 0 to 1."""
        steps = self.saved.steps
        return sum(step.share_over > 0 for step in steps) / len(steps)

    @property
    def early(self) -> tuple[TrainStep, ...]:
        """The first quarter of the training steps: single ones are noisy."""
        return self.saved.steps[: max(1, len(self.saved.steps) // 4)]

    @property
    def late(self) -> tuple[TrainStep, ...]:
        """The last quarter of the training steps."""
        return self.saved.steps[-max(1, len(self.saved.steps) // 4) :]

    @property
    def drops(self) -> Counter[str]:
        """Reason -> number of drafts dropped for it."""
        return Counter(row.dropped for row in self.saved.screened.rows if row.dropped is not None)


@dataclass(frozen=True, kw_only=True)
class DiaryEntry:
    """One held-out prompt, answered down the rounds."""

    prompt: str
    replies: tuple[tuple[str, ReplyRow], ...]  # condition and its first reply


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page says in numbers."""

    run: SavedRun
    base: ConditionFigures
    prompted: ConditionFigures
    engineered: ConditionFigures
    random: tuple[ConditionFigures, ...]
    unbarred: ConditionFigures | None  # None: it was not asked for
    rounds: tuple[RoundFigures, ...]
    tail_low_nats: float  # 5th percentile of the base's own completions
    tail_high_nats: float  # 95th
    second_tail_high_nats: float  # 95th percentile of base's second replies
    length_correlation: Interval | None  # of base's replies with their enactment, -1 to 1

    @property
    def intended(self) -> list[str]:
        """Foundations that the trait is meant to move, those meant to rise first."""
        signs = self.run.trait.intended
        return sorted(signs, key=lambda name: (-signs[name], name))

    @property
    def best(self) -> RoundFigures | None:
        """The round with the largest trait shift among the coherent ones."""
        coherent = [round for round in self.rounds if round.is_coherent]
        return max(coherent, key=lambda round: round.healed.trait_shift, default=None)

    @property
    def silent(self) -> list[RoundFigures]:
        """Rounds whose barrier never fired."""
        return [r for r in self.rounds if r.share_fired == 0]

    @property
    def incoherent(self) -> list[RoundFigures]:
        """Rounds that lost the answer format."""
        return [r for r in self.rounds if r.healed.pmass_share < PMASS_GATE]

    @property
    def unreadable(self) -> list[RoundFigures]:
        """Rounds in which vignettes were left out, their log-probabilities not being finite."""
        return [r for r in self.rounds if r.healed.unscorable]

    @property
    def dear(self) -> list[RoundFigures]:
        """Rounds whose replies the base finds more surprising than nearly all of its own."""
        return [r for r in self.rounds if r.healed.tail_median_nats > self.tail_high_nats]

    @property
    def late(self) -> list[RoundFigures]:
        """Rounds whose second replies the base finds more surprising than nearly all of its own."""
        high = self.second_tail_high_nats
        return [r for r in self.rounds if r.healed.coherence.second_tail_nats.median > high]

    @property
    def stretched(self) -> list[RoundFigures]:
        """Rounds whose replies differ from base's in length, by more than a tenth and chance."""
        ratios = [(r, r.healed.coherence.length_ratio) for r in self.rounds]
        return [
            r
            for r, ratio in ratios
            if abs(ratio.estimate - 1) > LENGTH_GATE and not ratio.low <= 1 <= ratio.high
        ]

    @property
    def unmoved(self) -> list[RoundFigures]:
        """Rounds in which steering itself did not move the trait."""
        return [r for r in self.rounds if r.retention is None]

    @property
    def undone(self) -> list[RoundFigures]:
        """Rounds that kept little of what steering moved."""
        return [r for r in self.rounds if r.retention is not None and r.retention < RETENTION_GATE]

    @property
    def duller(self) -> list[RoundFigures]:
        """Rounds that lost mundane tasks."""
        floor = self.base.mundane - MUNDANE_DROP - 1e-9  # one point itself is no loss
        return [r for r in self.rounds if r.healed.mundane < floor]


def write_report(path: Path) -> Path:
    """Draws the page and the plot of a run, says what they show, returns the page's path.

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
    write_text(path / PAGE_FILE, page)
    logger.info(terminal_summary(report))
    logger.info("report: {}", path / PAGE_FILE)
    return path / PAGE_FILE


def summarise(run: SavedRun) -> Report:
    """Computes every number of the page from the saved rows."""
    controls, base, trait = run.controls, run.controls.base, run.trait
    low, high = np.quantile(run.limits.base_tail_nll_nats, [0.05, 0.95])
    rounds = []
    for number, saved in enumerate(run.rounds, start=1):
        rows = saved.evaluation
        steered = condition_figures(f"round {number}, steered", rows.steered, base, trait)
        healed = condition_figures(f"round {number}, healed", rows.healed, base, trait)
        moved = steered.trait_shift
        rounds.append(
            RoundFigures(
                number=number,
                saved=saved,
                steered=steered,
                healed=healed,
                retention=healed.trait_shift / moved if moved > 0 else None,
                is_coherent=not healed.unscorable
                and healed.pmass_share >= PMASS_GATE
                and healed.tail_median_nats <= high,
            )
        )
    return Report(
        run=run,
        base=condition_figures("base", base, base, trait),
        prompted=condition_figures("persona prompt", controls.prompted, base, trait),
        engineered=condition_figures("longer prompt", controls.engineered, base, trait),
        random=tuple(
            condition_figures(f"random direction {number}", each, base, trait)
            for number, each in enumerate(controls.random, start=1)
        ),
        unbarred=condition_figures(UNBARRED, run.unbarred.healed, base, trait)
        if run.unbarred
        else None,
        rounds=tuple(rounds),
        tail_low_nats=float(low),
        tail_high_nats=float(high),
        second_tail_high_nats=float(
            np.quantile([reply.surprisal.tail_nll_nats for reply in base.second_replies], 0.95)
        ),
        length_correlation=length_correlation(base.replies),
    )


def drift_of(report: Report) -> Drift:
    """What the plot shows: base at round 0, then every round healed."""
    healed = [report.base, *(round.healed for round in report.rounds)]
    intended = report.intended
    return Drift(
        foundations=tuple(
            FoundationDrift(
                name=name,
                is_intended=name in intended,
                shifts=tuple(figures.shifts[name] for figures in healed),
                prompted=report.prompted.shifts[name].estimate,
                random=tuple(each.shifts[name].estimate for each in report.random),
            )
            for name in [*intended, *sorted(set(report.base.nats) - set(intended))]
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


def render_page(report: Report, plots: Mapping[str, bytes]) -> str:
    """The page as one file: model text is escaped, the plots (layout_theme -> PNG) are embedded."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "nats": nats,
        "bounds": bounds,
        "plain_bounds": plain_bounds,
        "visible": visible,
    }
    return environment.get_template("report.html").render(
        report=report,
        diary=diary_of(report.run),
        plots={name: base64.b64encode(plot).decode() for name, plot in plots.items()},
        command=command_of(report.run.description.config),
        settings=list(_flat(report.run.description.config)),
        retention_gate=RETENTION_GATE,
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
    defaults = dict(_flat(resolve_config([f"model={config['model']}"]).model_dump(mode="json")))
    words = ["just", "round", f"N={config['rounds']}"]
    if config["model"] != resolve_config([]).model:
        words.append(f"model={config['model']}")
    for key, value in _flat(config):
        if key not in ("rounds", "model") and value != defaults.get(key):
            words.append(f"{key}={value}")
    return shlex.join(words)


def terminal_summary(report: Report) -> str:
    """One line: what became of the trait and of the coherence."""
    last = report.rounds[-1].healed
    rounds = " ".join(percent(round.healed.enacted.estimate) for round in report.rounds)
    return (
        f"enacted {percent(report.base.enacted.estimate)} -> {rounds} "
        f"(persona prompt {percent(report.prompted.enacted.estimate)}); "
        f"pmass {last.pmass_share:.3f} of base; "
        f"mundane {percent(last.mundane)} (base {percent(report.base.mundane)})"
    )


# ---------------------------------------------------------------------------------------- wording


def percent(share: float) -> str:
    """A share as `97 %`; what is not all or nothing is not rounded to it."""
    digits = 1 if 0.99 < share < 1 or 0 < share < 0.01 else 0
    return f"{100 * share:.{digits}f} %"


def nats(value: float, sign: bool = True) -> str:
    """A number of nats as `+0.42`, with a minus that is as wide as the plus."""
    rounded = round(value, 2) + 0.0  # + 0.0: no minus before a zero
    return f"{rounded:+.2f}".replace("-", "−") if sign else f"{rounded:.2f}"


def bounds(interval: Interval) -> str:
    """The ends of an interval of nats, as `[+0.31, +0.55]`."""
    return f"[{nats(interval.low)}, {nats(interval.high)}]"


def plain_bounds(interval: Interval, digits: int = 2) -> str:
    """The ends of an interval of ratios, as `[0.91, 1.02]`."""
    return f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def visible(text: str) -> str:
    """Control characters, which no page can show, as their pictures."""
    return "".join(
        chr(0x2400 + ord(letter)) if ord(letter) < 32 and letter not in "\n\t" else letter
        for letter in text
    )


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that is set, as the command line takes it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + key, text
