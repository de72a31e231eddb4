"""`steer-heal judge`: many more replies of a run's model, and of the base with the persona prompt.

A run samples a few replies to each held-out prompt: enough to see what a round did. Whether the
healed model comes out above the prompt takes more. Here both are asked anew, by draws that the run
did not use, and are compared prompt by prompt; with several runs also on the mean over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.errors import UserError
from eval.statistics import Interval, mean_interval
from steer_heal.condition import measure_replies
from steer_heal.config import RunConfig
from steer_heal.model import Student, load_student
from steer_heal.rounds import Run
from steer_heal.saved import SavedRun, prompt_means, read_saved_run
from steer_heal.summary import summarise
from steer_heal.wording import percent, percent_bounds, points

_CONDITIONS = ("base", "prompted", "healed")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Shares of replies that act the trait, 0 to 1, a held-out prompt each: [prompts]."""

    label: str
    base: np.ndarray
    prompted: np.ndarray
    healed: np.ndarray

    @property
    def gain(self) -> Interval:
        """Healed minus prompted, paired by prompt."""
        return mean_interval(self.healed - self.prompted)

    def __str__(self) -> str:
        shares = [(name, mean_interval(getattr(self, name))) for name in _CONDITIONS]
        lines = [f"{name:8}  {percent(s.estimate)} {percent_bounds(s)}" for name, s in shares]
        doubt = "" if self.gain.excludes_zero else "; no difference shown"
        lines.append(f"healed minus prompted, points: {points(self.gain)}{doubt}")
        return "\n  ".join([f"{self.label}:", *lines])


def judge(paths: Sequence[Path], samples: int) -> list[Judgement]:
    """Judges the best round of each run, the last if none is coherent; of several also their mean.

    Args:
        samples: replies to each held-out prompt, in each condition.
    Raises:
        UserError: no run, no finished round, a damaged file, or runs that were judged on other
            held-out prompts than the first.
    """
    runs = [read_saved_run(path) for path in paths]
    for run in runs[1:]:
        if run.trait.held_out_prompts != runs[0].trait.held_out_prompts:
            raise UserError(
                f"{run.path} has other held-out prompts than {runs[0].path}: judge them apart"
            )
    found = [_judge_run(run, samples) for run in runs]
    if len(found) == 1:
        return found
    means = {name: np.mean([getattr(one, name) for one in found], axis=0) for name in _CONDITIONS}
    return [*found, Judgement(label=f"mean of {len(found)} runs", **means)]


def _judge_run(saved: SavedRun, samples: int) -> Judgement:
    config = RunConfig.model_validate(saved.description.config)
    best = summarise(saved).best
    number = best.number if best is not None else len(saved.rounds)
    run = Run(saved.path, config.seed)
    healed = load_student(config.model, run.last_stack()[:number], config.device)
    evaluate = config.evaluate.model_copy(update={"samples_per_prompt": samples})

    def shares(name: str, student: Student, system: str | None = None) -> np.ndarray:
        seed = run.seed("judge")
        replies = measure_replies(name, student, saved.trait, evaluate, seed, system)
        return np.array(prompt_means(replies, lambda reply: float(reply.enacted)))

    return Judgement(
        label=f"{saved.path.name}, round {number}, {samples} replies to each of "
        f"{len(saved.trait.held_out_prompts)} prompts",
        base=shares("base", healed.base),
        prompted=shares("prompted", healed.base, saved.trait.positive),
        healed=shares("healed", healed),
    )
