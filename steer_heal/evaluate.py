"""Evaluation: every condition on the same held-out items.

base, prompted (the positive persona as system prompt), engineered (a longer prompt that asks for
the trait) and random (directions drawn at random, each at the dose where it moves the next-token
distribution as far as the vector does) are measured once; steered (the student before the round,
with the vector) and healed (the student after it, nothing added) every round; unbarred (the first
round healed without the barrier) where it is asked for. Each gives the forced choice over
vignettes, mundane tasks, and replies to held-out prompts; all rows are kept.

    kl      = mean over tokens of completions kept in the round of KL(steered || student), nats; a
              random direction is steered at the dose whose kl is the vector's

    enacted = share of held-out replies that act the trait: by the words that the trait file says
              only such replies have; where it says none, by the sign of the enactment. The sign
              flatters the prompted condition, which is sampled from what it is scored by.
    second  = a second user turn after the first reply, and a reply to it: damage shows late.
              Enacted as of a first reply, surprisal under the base given all that stands before
    neutral = surprisal of fixed dialogues under the condition itself, with its system prompt
    shift   = difference from base of <foundation>_nats, log of the mean probability
    internalised = cos( mean over held-out prompts of h(healed) - h(base), vector ), h at the
              assistant tag in the steered layers, with no persona: near 1 where the adapters do
              what the vector does, 0 where they reach the same words some other way
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from eval.chat import chat_ids, next_turn_text, text_ids
from eval.errors import UserError
from eval.forced_choice import forced_choice
from eval.neutral import neutral_rows
from eval.sampling import Reply, sample_replies
from eval.suite import ForcedChoiceSuite, NeutralSuite, TaskSuite, load_suite
from eval.tasks import solve_tasks
from steer_heal.artifacts import (
    ConditionEval,
    Controls,
    ReplyRow,
    RoundAdapter,
    RoundEval,
    Screened,
    SecondReplyRow,
    SteeringVector,
    Unbarred,
)
from steer_heal.config import EvaluateConfig
from steer_heal.hooks import add_vector
from steer_heal.model import Student
from steer_heal.scoring import (
    base_surprisals,
    last_states,
    score_completions,
    steered_kl_nats,
)
from steer_heal.trait import Trait

_NUM_KL_ROWS = 16  # completions that a KL is averaged over
_SECOND_TURN = 2  # what its seed is mixed with
_BISECTIONS = 4  # of a bracket of a factor of 2 or little more: the dose is right to 5 %


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
    measure = partial(_condition, student=base, trait=trait, config=config, seed=seed)
    return Controls(
        base=measure("base"),
        prompted=measure("prompted", system=trait.positive),
        engineered=measure("engineered", system=trait.engineered_prompt),
        random=tuple(
            measure(f"random {number}", steering=steering, config=_fewer(config))
            for number, steering in enumerate(
                _random_steerings(base, vector, kept, config, seed), start=1
            )
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
    dose = kept.mean_kept_dose
    steering = _Steering(
        band=vector.band,
        directions=vector.band_directions,
        dose=dose,
        kl_nats=_kl_nats(student, vector.band, vector.band_directions, kept, config, dose),
    )
    return RoundEval(
        steered=_condition("steered", student, trait, _fewer(config), seed, steering=steering),
        healed=_condition("healed", healed, trait, config, seed),
        internalised=_internalised(healed, vector, trait, config),
    )


def _fewer(config: EvaluateConfig) -> EvaluateConfig:
    """With fewer replies, where a vector is added: that is held against others by its shifts."""
    shared = max(1, config.samples_per_prompt // config.num_random)
    return config.model_copy(update={"samples_per_prompt": shared})


def evaluate_unbarred(
    student: Student, adapter: RoundAdapter, trait: Trait, config: EvaluateConfig, seed: int
) -> Unbarred:
    """The student with an adapter that was trained without the barrier; both are left as they were.

    The seed is the rounds' own, so that it differs from the healed student by the adapter alone.
    """
    with student.trying(adapter) as healed:
        rows = _condition("unbarred", healed, trait, config, seed)
    return Unbarred(healed=rows, steps=adapter.steps)


def _internalised(
    healed: Student, vector: SteeringVector, trait: Trait, config: EvaluateConfig
) -> float:
    """Cosine of the vector with the shift of the hidden state from base, mean over the band."""
    prompts = [chat_ids(healed.tokenizer, prompt) for prompt in trait.held_out_prompts]
    after, before = (
        last_states(student, prompts, config.batch_size, "hidden states").mean(0)
        for student in (healed, healed.base)
    )
    shift = (after - before)[list(vector.band)]  # [band layers, hidden]
    return float(cosine_similarity(shift, vector.band_directions, dim=-1).mean())


@dataclass(frozen=True, kw_only=True)
class _Steering:
    """What is added while a condition is measured."""

    band: tuple[int, ...]  # layers
    directions: torch.Tensor  # [band layers, hidden]
    dose: float
    kl_nats: float


def _condition(
    name: str,
    student: Student,
    trait: Trait,
    config: EvaluateConfig,
    seed: int,
    *,
    system: str | None = None,
    steering: _Steering | None = None,
) -> ConditionEval:
    """Measures one condition; all get the same seed, so their replies differ by it alone."""
    choices = load_suite(config.suite, ForcedChoiceSuite)
    tasks = load_suite(config.tasks, TaskSuite)
    neutral = load_suite(config.neutral, NeutralSuite)
    added: AbstractContextManager[None] = nullcontext()
    if steering is not None:
        layers = [student.loaded.layers[index] for index in steering.band]
        added = add_vector(layers, steering.directions, torch.tensor([steering.dose]))
    with student.running() as model, added:
        batch_size, tokenizer = config.batch_size, student.tokenizer
        choice = forced_choice(model, tokenizer, choices, system, batch_size, f"{name}: vignettes")
        task_rows = solve_tasks(
            model, tokenizer, tasks, system, batch_size=batch_size, label=f"{name}: tasks"
        )
        text_rows = neutral_rows(
            model, tokenizer, neutral, system, batch_size, f"{name}: neutral text"
        )
        replies = _sample(model, tokenizer, trait, config, seed, system, name)
        dialogues = _dialogues(tokenizer, trait, config, replies)
        seconds = _sample_seconds(model, tokenizer, dialogues, config, seed, system, name)
    return ConditionEval(
        condition=name,
        dose=steering.dose if steering else None,
        kl_nats=steering.kl_nats if steering else None,
        choices=choice.rows,
        unscorable=choice.unscorable,
        tasks=tuple(task_rows),
        replies=_score(student, trait, [reply.token_ids for reply in replies], config),
        second_replies=_score_seconds(student, trait, dialogues, seconds, config),
        neutral=tuple(text_rows),
    )


def _sample(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    config: EvaluateConfig,
    seed: int,
    system: str | None,
    name: str,
) -> list[Reply]:
    """`samples_per_prompt` replies to each held-out prompt, prompt by prompt."""
    prompts = [chat_ids(tokenizer, prompt, system) for prompt in trait.held_out_prompts]
    return sample_replies(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in range(config.samples_per_prompt)],
        seed=seed,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        label=f"{name}: replies",
    )


@dataclass(frozen=True, kw_only=True)
class _Dialogue:
    """A held-out prompt, the first reply to it, and a second user turn."""

    prompt: str
    following_ids: tuple[int, ...]  # the reply's words, its end, the second turn, the assistant tag


def _dialogues(
    tokenizer: Any, trait: Trait, config: EvaluateConfig, replies: Sequence[Reply]
) -> list[_Dialogue]:
    """The first held-out prompts, each with its first sample; the second turns go round."""
    firsts = replies[:: config.samples_per_prompt][: config.num_dialogues]
    turns = [text_ids(tokenizer, next_turn_text(tokenizer, turn)) for turn in trait.second_turns]
    return [
        _Dialogue(
            prompt=trait.held_out_prompts[index],
            following_ids=(*reply.said, *turns[index % len(turns)]),
        )
        for index, reply in enumerate(firsts)
    ]


def _sample_seconds(
    model: Any,
    tokenizer: Any,
    dialogues: Sequence[_Dialogue],
    config: EvaluateConfig,
    seed: int,
    system: str | None,
    name: str,
) -> list[tuple[int, ...]]:
    """Token ids of one reply to each dialogue's second turn."""
    replies = sample_replies(
        model,
        tokenizer,
        [[*chat_ids(tokenizer, each.prompt, system), *each.following_ids] for each in dialogues],
        seed=_mixed(seed, _SECOND_TURN),  # not the draws of the first reply again
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        label=f"{name}: second replies",
    )
    return [reply.token_ids for reply in replies]


def _score(
    student: Student, trait: Trait, replies: list[tuple[int, ...]], config: EvaluateConfig
) -> tuple[ReplyRow, ...]:
    samples = config.samples_per_prompt
    turns = [prompt for prompt in trait.held_out_prompts for _ in range(samples)]
    scores = score_completions(student, trait, turns, replies, config.batch_size)
    texts = [student.tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
    return tuple(
        ReplyRow(
            prompt_index=row // samples,
            sample=row % samples,
            text=texts[row],
            enactment_nats=score.enactment_nats,
            enacted=_is_enacted(trait, texts[row], score.enactment_nats),
            surprisal=score.surprisal,
        )
        for row, score in enumerate(scores)
    )


def _score_seconds(
    student: Student,
    trait: Trait,
    dialogues: Sequence[_Dialogue],
    replies: Sequence[tuple[int, ...]],
    config: EvaluateConfig,
) -> tuple[SecondReplyRow, ...]:
    texts = [student.tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
    prompts = [each.prompt for each in dialogues]
    followings = [each.following_ids for each in dialogues]
    if trait.acts:  # words decide: the enactment, two thirds of the cost, is not needed
        found = base_surprisals(student, prompts, replies, config.batch_size, followings)
        enacted = [bool(trait.enacts(text)) for text in texts]
    else:
        scores = score_completions(student, trait, prompts, replies, config.batch_size, followings)
        found = [score.surprisal for score in scores]
        enacted = [score.enactment_nats > 0 for score in scores]
    return tuple(
        SecondReplyRow(prompt_index=index, text=text, enacted=acts, surprisal=surprisal)
        for index, (text, acts, surprisal) in enumerate(zip(texts, enacted, found, strict=True))
    )


def _is_enacted(trait: Trait, text: str, enactment_nats: float) -> bool:
    by_words = trait.enacts(text)
    return enactment_nats > 0 if by_words is None else by_words


def _random_steerings(
    base: Student, vector: SteeringVector, kept: Screened, config: EvaluateConfig, seed: int
) -> Iterator[_Steering]:
    """Random directions, each at the dose of the vector's own KL."""
    dose = kept.mean_kept_dose
    reach = _kl_nats(base, vector.band, vector.band_directions, kept, config, dose)
    for draw in range(config.num_random):
        directions = _random_directions(vector, seed, draw)
        dose, kl = _matching_dose(base, vector, directions, kept, config, reach)
        yield _Steering(band=vector.band, directions=directions, dose=dose, kl_nats=kl)


def _random_directions(vector: SteeringVector, seed: int, draw: int) -> torch.Tensor:
    """Random directions with the norms of the vector's band: [band layers, hidden]."""
    generator = torch.Generator().manual_seed(_mixed(seed, draw))
    drawn = torch.randn(vector.band_directions.shape, generator=generator)
    return (
        drawn / drawn.norm(dim=-1, keepdim=True) * vector.band_directions.norm(dim=-1, keepdim=True)
    )


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each number."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _kl_nats(
    student: Student,
    band: tuple[int, ...],
    directions: torch.Tensor,
    kept: Screened,
    config: EvaluateConfig,
    dose: float,
) -> float:
    """Mean over tokens of KL(steered || student) on the round's completions."""
    rows = kept.kept[:_NUM_KL_ROWS]
    kl = steered_kl_nats(
        student,
        band,
        directions,
        [row.prompt_ids for row in rows],
        [row.token_ids for row in rows],
        [dose] * len(rows),
        config.batch_size,
    )
    return float(torch.cat(kl).mean())


def _matching_dose(
    student: Student,
    vector: SteeringVector,
    directions: torch.Tensor,
    kept: Screened,
    config: EvaluateConfig,
    reach_nats: float,
) -> tuple[float, float]:
    """The dose at which other directions reach a KL, and the KL there: bisection on its log.

    Raises:
        UserError: no dose up to 4,096 times the vector's reaches it.
    """

    def kl(dose: float) -> float:
        return _kl_nats(student, vector.band, directions, kept, config, dose)

    start = kept.mean_kept_dose
    high, reached = start, kl(start)
    while reached < reach_nats:
        high = 2 * high
        if high > 4096 * start:
            raise UserError(
                f"a random direction does not reach the vector's KL of {reach_nats:.3g} nats at "
                f"any dose up to {high:.3g}: the model does not read the steered layers"
            )
        reached = kl(high)
    low = high / 2
    while kl(low) > reach_nats:
        low = low / 2
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        found = kl(middle)
        low, high, reached = (middle, high, reached) if found < reach_nats else (low, middle, found)
    return high, reached
