"""`steer-heal judge`: many more replies of a run's model, and of the base with the persona prompt.

A run samples a few replies to each held-out prompt: enough to see what a round did. Whether the
healed model comes out above the prompt, and how its replies end, takes more. Here all are asked
anew, by draws that the run did not use, and are compared prompt by prompt; with several runs also
on the mean over them.

    tail perplexity over another's = exp( mean over prompts of  t(prompt) - t of the other's )
    t = median over a prompt's replies of the tail surprisal under base, nats a token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.errors import UserError
from eval.files import write_json
from eval.statistics import Interval, mean_interval
from eval.summary import fixed
from steer_heal.batch_sizes import settled
from steer_heal.condition import measure_replies
from steer_heal.config import RunConfig
from steer_heal.model import Student, load_student
from steer_heal.rounds import Run
from steer_heal.saved import SavedRun, prompt_means, read_saved_run
from steer_heal.summary import summarise
from steer_heal.wording import percent, percent_bounds, plain_bounds, points

_CONDITIONS = ("base", "prompted", "healed")
JUDGE_FILE = "judge.json"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One condition, a value a held-out prompt: [prompts] each."""

    enacted: np.ndarray  # share of replies that act the trait, 0 to 1
    tail_nats: np.ndarray  # median over replies of the tail surprisal under base, nats a token


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The conditions of a run, or their means over several."""

    label: str
    base: Judged
    prompted: Judged
    healed: Judged

    @property
    def gain(self) -> Interval:
        """Share that acts the trait, healed minus prompted, paired by prompt."""
        return mean_interval(self.healed.enacted - self.prompted.enacted)

    def tail_ratio(self, name: str, over: str = "base") -> Interval:
        """Tail perplexity of a condition over another's, paired by prompt; 1: replies end alike."""
        nats = mean_interval(getattr(self, name).tail_nats - getattr(self, over).tail_nats)
        ends = {key: float(np.exp(value)) for key, value in nats.model_dump().items()}
        return Interval(**ends)

    def __str__(self) -> str:
        shares = [(name, mean_interval(getattr(self, name).enacted)) for name in _CONDITIONS]
        lines = [f"{name:8}  {percent(s.estimate)} {percent_bounds(s)}" for name, s in shares]
        doubt = "" if self.gain.excludes_zero else "; no difference shown"
        lines.append(f"healed minus prompted, points: {points(self.gain)}{doubt}")
        tails = [(name, self.tail_ratio(name)) for name in _CONDITIONS[1:]]
        told = [f"{name} {fixed(r.estimate, 3)} {plain_bounds(r, 3)}" for name, r in tails]
        lines.append(f"tail perplexity, over base's: {', '.join(told)}")
        rest = self.tail_ratio("healed", over="prompted")
        lines.append(f"healed over prompted: {fixed(rest.estimate, 3)} {plain_bounds(rest, 3)}")
        return "\n  ".join([f"{self.label}:", *lines])


def judge(paths: Sequence[Path], samples: int) -> list[Judgement]:
    """Judges the best round of each run, the last if none is coherent; of several also their mean.

    What was found of a run is kept in its folder, as judge.json.

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
    means = {name: _mean([getattr(one, name) for one in found]) for name in _CONDITIONS}
    return [*found, Judgement(label=f"mean of {len(found)} runs", **means)]


def _mean(judged: Sequence[Judged]) -> Judged:
    """Over runs, prompt by prompt."""
    return Judged(
        enacted=np.mean([one.enacted for one in judged], axis=0),
        tail_nats=np.mean([one.tail_nats for one in judged], axis=0),
    )


def _judge_run(saved: SavedRun, samples: int) -> Judgement:
    config = RunConfig.model_validate(saved.description.config)
    best = summarise(saved).best
    number = best.number if best is not None else len(saved.rounds)
    run = Run(saved.path, config.seed)
    healed = load_student(config.model, run.last_stack()[:number], config.device)
    evaluate = settled(healed, saved.trait, config).evaluate.model_copy(
        update={"samples_per_prompt": samples}
    )

    def judged(name: str, student: Student, system: str | None = None) -> Judged:
        seed = run.seed("judge")
        replies = measure_replies(name, student, saved.trait, evaluate, seed, system)
        tails = np.array([reply.surprisal.tail_nll_nats for reply in replies])
        return Judged(
            enacted=np.array(prompt_means(replies, lambda reply: float(reply.enacted))),
            tail_nats=np.median(tails.reshape(-1, samples), axis=1),
        )

    found = Judgement(
        label=f"{saved.path.name}, round {number}, {samples} replies to each of "
        f"{len(saved.trait.held_out_prompts)} prompts",
        base=judged("base", healed.base),
        prompted=judged("prompted", healed.base, saved.trait.positive),
        healed=judged("healed", healed),
    )
    write_json(saved.path / JUDGE_FILE, _record(found, number, samples))
    return found


def _record(found: Judgement, number: int, samples: int) -> dict[str, Any]:
    """What judge.json says: a value a prompt, in the trait's order."""
    conditions = {
        name: {key: value.tolist() for key, value in vars(getattr(found, name)).items()}
        for name in _CONDITIONS
    }
    return {"round": number, "samples": samples, "conditions": conditions}
