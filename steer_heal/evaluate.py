"""Evaluation: every condition on the same held-out items.

base, prompted (the positive persona as system prompt), engineered (a longer prompt that asks for
the trait) and random (directions drawn at random, each at the dose where it moves the next-token
distribution as far as the vector does) are measured once; steered (the student before the round,
with the vector) and healed (the student after it, nothing added) every round. Each gives the forced
choice over vignettes, mundane tasks, and replies to held-out prompts; all rows are kept.

    shift   = difference from base of <foundation>_nats, log of the mean probability
    internalised = cos( mean over held-out prompts of h(healed) - h(base), vector ), h at the
              assistant tag in the steered layers, with no persona: near 1 where the adapters do
              what the vector does, 0 where they reach the same words some other way
"""

from __future__ import annotations

from functools import partial

from loguru import logger
from torch.nn.functional import cosine_similarity

from eval.chat import chat_ids
from steer_heal.artifacts import (
    Controls,
    RoundEval,
    Screened,
    SteeringVector,
)
from steer_heal.condition import measure_condition
from steer_heal.config import EvaluateConfig
from steer_heal.model import Student
from steer_heal.scoring import last_states
from steer_heal.steering import random_steerings, vector_steering
from steer_heal.trait import Trait


def evaluate_controls(
    student: Student,
    vector: SteeringVector,
    kept: Screened,
    trait: Trait,
    config: EvaluateConfig,
    seed: int,
) -> Controls:
    """Base, both prompts and random directions, on the first round's student, the base."""
    base = student.base
    directions = random_steerings(
        base, vector, kept, config.rows_at_a_time, config.num_random, seed
    )

    measure = partial(measure_condition, student=base, trait=trait, config=config, seed=seed)

    def told(number: int, name: str) -> str:
        logger.info("controls: {} of {}, {}", number, 3 + config.num_random, name)
        return name

    return Controls(
        base=measure(told(1, "base"), with_enactment=True),
        prompted=measure(told(2, "prompted"), system=trait.positive),
        engineered=measure(told(3, "engineered"), system=trait.engineered_prompt),
        random=tuple(
            measure(told(3 + number, f"random {number}"), steering=steering, config=_fewer(config))
            for number, steering in enumerate(directions, start=1)
        ),
    )


def evaluate_round(
    student: Student,
    healed: Student,
    vector: SteeringVector,
    kept: Screened,
    trait: Trait,
    config: EvaluateConfig,
    seed: int,
) -> RoundEval:
    """The student before the round, steered, and the student after it."""
    steering = vector_steering(student, vector, kept, config.rows_at_a_time)
    return RoundEval(
        steered=measure_condition(
            "steered", student, trait, _fewer(config), seed, steering=steering
        ),
        healed=measure_condition("healed", healed, trait, config, seed),
        internalised=_internalised(healed, vector, trait, config),
    )


def _fewer(config: EvaluateConfig) -> EvaluateConfig:
    """With fewer replies, where a vector is added: that is held against others by its shifts."""
    shared = max(1, config.samples_per_prompt // config.num_random)
    return config.model_copy(update={"samples_per_prompt": shared})


def _internalised(
    healed: Student, vector: SteeringVector, trait: Trait, config: EvaluateConfig
) -> float:
    """Cosine of the vector with the shift of the hidden state from base, mean over the band."""
    prompts = [chat_ids(healed.tokenizer, prompt) for prompt in trait.held_out_prompts]
    after, before = (
        last_states(student, prompts, config.rows_at_a_time, "hidden states").mean(0)
        for student in (healed, healed.base)
    )
    shift = (after - before)[list(vector.band)]  # [band layers, hidden]
    return float(cosine_similarity(shift, vector.band_directions, dim=-1).mean())
