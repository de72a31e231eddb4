"""How much of a trait a model has already, before anything is done to it.

Replies are sampled to held-out prompts under the positive persona, under no persona and under the
negative one, and each is scored by its enactment (`scoring.py`), nats a token:

    gap   = enactment(positive) - enactment(none)        what there is left to teach
    span  = enactment(positive) - enactment(negative)    what the personas do to the model
    share = 1 - gap / span                               near 1: the model has the trait already

In expectation the span is a sum of two KL divergences and above 0, but for personas that the model
does not heed it is hardly so.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from eval.chat import chat_ids
from eval.sampling import sample_replies
from eval.statistics import Interval, mean_interval
from steer_heal.model import Student
from steer_heal.scoring import score_completions
from steer_heal.trait import Trait


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """Mean enactment of a model's replies, nats a token."""

    positive_nats: float  # under the positive persona
    neutral_nats: float  # under none
    negative_nats: float
    gap_nats: Interval  # positive - neutral, paired over prompts

    @property
    def span_nats(self) -> float:
        """What the personas do to the model."""
        return self.positive_nats - self.negative_nats

    @property
    def share(self) -> float:
        """How far the model without a persona is from the negative pole to the positive one."""
        return (self.neutral_nats - self.negative_nats) / self.span_nats


def measure_headroom(
    student: Student,
    trait: Trait,
    *,
    num_prompts: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Headroom:
    """One reply a persona to each of so many held-out prompts.

    Raises:
        UserError: a log-probability is not finite.
    """
    count = min(num_prompts, len(trait.held_out_prompts))
    turns = random.Random(seed).sample(trait.held_out_prompts, count)

    def enactments(persona: str | None, label: str) -> np.ndarray:
        prompts = [chat_ids(student.tokenizer, turn, persona) for turn in turns]
        with student.running() as model:
            replies = sample_replies(
                model,
                student.tokenizer,
                prompts,
                seed=seed,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                label=f"{label}: replies",
            )
        said = [reply.token_ids for reply in replies]
        scores = score_completions(student, trait, turns, said, batch_size)
        return np.array([score.enactment_nats for score in scores])

    positive = enactments(trait.positive, "positive")
    neutral = enactments(None, "no persona")
    negative = enactments(trait.negative, "negative")
    return Headroom(
        positive_nats=float(positive.mean()),
        neutral_nats=float(neutral.mean()),
        negative_nats=float(negative.mean()),
        gap_nats=mean_interval((positive - neutral).tolist()),
    )
