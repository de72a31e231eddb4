"""One condition, measured: the forced choice, the tasks, the neutral text, the replies.

    enacted = share of held-out replies that act the trait: by the words that the trait file says
              only such replies have; where it says none, by the sign of the enactment. The sign
              flatters the prompted condition, which is sampled from what it is scored by.
    second  = a second user turn after the first reply, and a reply to it: damage shows late.
              Enacted as of a first reply, surprisal under the base given all that stands before
    neutral = surprisal of fixed dialogues under the condition itself, with its system prompt

All rows are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.chat import chat_ids, next_turn_text, text_ids
from eval.coherence import Surprisal
from eval.forced_choice import forced_choice
from eval.neutral import neutral_rows
from eval.sampling import Reply, sample_replies
from eval.suite import ForcedChoiceSuite, NeutralSuite, TaskSuite, load_suite
from eval.tasks import solve_tasks
from steer_heal.artifacts import ConditionEval, ReplyRow, SecondReplyRow
from steer_heal.config import EvaluateConfig
from steer_heal.hooks import add_vector
from steer_heal.model import Student
from steer_heal.scoring import base_surprisals, score_completions
from steer_heal.steering import Steering
from steer_heal.trait import Trait


def measure_condition(
    name: str,
    student: Student,
    trait: Trait,
    config: EvaluateConfig,
    seed: int,
    *,
    system: str | None = None,
    steering: Steering | None = None,
    with_enactment: bool = False,
) -> ConditionEval:
    """Measures one condition; all get the same seed, so their replies differ by it alone.

    Args:
        system: the system prompt it stands under.
        steering: what is added to the student.
        with_enactment: keeps the enactment of the replies also where the trait's words decide.
    """
    choices = load_suite(config.suite, ForcedChoiceSuite)
    tasks = load_suite(config.tasks, TaskSuite)
    neutral = load_suite(config.neutral, NeutralSuite)
    added: AbstractContextManager[None] = nullcontext()
    if steering is not None:
        layers = [student.loaded.layers[index] for index in steering.band]
        added = add_vector(layers, steering.directions, torch.tensor([steering.dose]))
    with student.running() as model, added:
        batch_size, tokenizer = config.rows_at_a_time, student.tokenizer
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
        replies=_score(
            student, trait, [reply.token_ids for reply in replies], config, with_enactment
        ),
        second_replies=_score_seconds(student, trait, dialogues, seconds, config),
        neutral=tuple(text_rows),
    )


def measure_replies(
    name: str,
    student: Student,
    trait: Trait,
    config: EvaluateConfig,
    seed: int,
    system: str | None = None,
) -> tuple[ReplyRow, ...]:
    """Replies to the held-out prompts alone: what `measure_condition` samples first, judged."""
    with student.running() as model:
        replies = _sample(model, student.tokenizer, trait, config, seed, system, name)
    ids = [reply.token_ids for reply in replies]
    return _score(student, trait, ids, config, with_enactment=False)


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
        batch_size=config.rows_at_a_time,
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
        seed=_second_seed(seed),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.rows_at_a_time,
        label=f"{name}: second replies",
    )
    return [reply.token_ids for reply in replies]


def _second_seed(seed: int) -> int:
    """Not the draws of the first reply again."""
    return int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0])


def _score(
    student: Student,
    trait: Trait,
    replies: list[tuple[int, ...]],
    config: EvaluateConfig,
    with_enactment: bool,
) -> tuple[ReplyRow, ...]:
    samples = config.samples_per_prompt
    turns = [prompt for prompt in trait.held_out_prompts for _ in range(samples)]
    judged = _judge(student, trait, turns, replies, config.rows_at_a_time, None, with_enactment)
    return tuple(
        ReplyRow(
            prompt_index=row // samples,
            sample=row % samples,
            text=one.text,
            enactment_nats=one.enactment_nats,
            enacted=one.enacted,
            surprisal=one.surprisal,
        )
        for row, one in enumerate(judged)
    )


def _score_seconds(
    student: Student,
    trait: Trait,
    dialogues: Sequence[_Dialogue],
    replies: Sequence[tuple[int, ...]],
    config: EvaluateConfig,
) -> tuple[SecondReplyRow, ...]:
    prompts = [each.prompt for each in dialogues]
    followings = [each.following_ids for each in dialogues]
    judged = _judge(student, trait, prompts, replies, config.rows_at_a_time, followings)
    return tuple(
        SecondReplyRow(
            prompt_index=index, text=one.text, enacted=one.enacted, surprisal=one.surprisal
        )
        for index, one in enumerate(judged)
    )


@dataclass(frozen=True, kw_only=True)
class _Judged:
    text: str
    enacted: bool
    enactment_nats: float | None  # a token; None: the trait's words decided without it
    surprisal: Surprisal


def _judge(
    student: Student,
    trait: Trait,
    prompts: Sequence[str],
    replies: Sequence[tuple[int, ...]],
    batch_size: int,
    followings: Sequence[Sequence[int]] | None = None,
    with_enactment: bool = False,
) -> list[_Judged]:
    texts = [student.tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
    by_words = [trait.enacts(text) for text in texts]
    enactments: list[float | None]
    if trait.acts and not with_enactment:  # two thirds of the cost are not needed
        surprisals = base_surprisals(student, prompts, replies, batch_size, followings)
        enactments = [None] * len(replies)
    else:
        scores = score_completions(student, trait, prompts, replies, batch_size, followings)
        surprisals = [score.surprisal for score in scores]
        enactments = [score.enactment_nats for score in scores]
    rows = zip(texts, by_words, enactments, surprisals, strict=True)
    return [
        _Judged(
            text=text,
            enacted=said if said is not None else nats is not None and nats > 0,
            enactment_nats=nats,
            surprisal=surprisal,
        )
        for text, said, nats, surprisal in rows
    ]
