"""Steered completions: sampled, and how far the steering bent what came next.

    h_l <- h_l + dose * v[l]   for l in the vector's band, at every position of prompt and reply

A dose a row, all doses in one batch. No repetition penalty, top-k or nucleus: they would hide from
the filter what it must see. A row that has become a loop is ended there: the filter drops it for
that. Beside the first completions of every dose stands what the steering did to them: the 95th
percentile over their tokens of KL(steered || student), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from eval.chat import chat_ids
from eval.coherence import is_loop
from eval.sampling import Reply, sample_replies
from steer_heal.artifacts import Completion, SteeringVector
from steer_heal.config import GenerateConfig
from steer_heal.hooks import add_vector
from steer_heal.losses import aggregate
from steer_heal.model import Student
from steer_heal.scoring import steered_kl_nats
from steer_heal.trait import Trait

_KL_DRAFTS = 32  # a dose, whose KL is measured


def sample_steered(
    student: Student,
    vector: SteeringVector,
    trait: Trait,
    prompt_indices: Sequence[int],
    doses: Sequence[float],
    config: GenerateConfig,
    seed: int,
    label: str,
) -> tuple[Completion, ...]:
    """A completion a row.

    Args:
        prompt_indices: in the trait's prompts, [rows].
        doses: multiples of the raw vector, [rows].
        label: of the progress bar.
    """
    prompts = [chat_ids(student.tokenizer, trait.prompts[index]) for index in prompt_indices]
    replies = steered_replies(student, vector, prompts, doses, config, seed, label)
    ids = [reply.token_ids for reply in replies]
    kl = _kl_p95_nats(student, vector, prompts, ids, doses, config.rows_at_a_time)
    return tuple(
        Completion(
            prompt_index=index,
            prompt=trait.prompts[index],
            prompt_ids=tuple(prompts[row]),
            token_ids=ids[row],
            text=student.tokenizer.decode(ids[row], skip_special_tokens=True),
            dose=doses[row],
            seed=seed,
            finished=replies[row].finished,
            kl_p95_nats=kl.get(row),
        )
        for row, index in enumerate(prompt_indices)
    )


def steered_replies(
    student: Student,
    vector: SteeringVector,
    prompts: Sequence[Sequence[int]],
    doses: Sequence[float],
    config: GenerateConfig,
    seed: int,
    label: str | None,
) -> list[Reply]:
    """A reply a row, each prompt and reply steered at the row's own dose.

    Args:
        prompts: token ids up to the assistant tag, [rows][tokens].
    """
    with student.running() as model:
        return sample_replies(
            model,
            student.tokenizer,
            prompts,
            seed=seed,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            batch_size=config.rows_at_a_time,
            around_batch=lambda rows: _steered(student, vector, [doses[row] for row in rows]),
            kinds=doses,  # a prompt is steered, too: its cache is that of a dose
            give_up=is_loop,
            label=label,
        )


def _kl_p95_nats(
    student: Student,
    vector: SteeringVector,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    doses: Sequence[float],
    batch_size: int,
) -> dict[int, float]:
    """Of the first rows of every dose, by row: their median is the dose's, at a small cost."""
    measured = sorted(
        row
        for dose in set(doses)
        for row in [row for row, other in enumerate(doses) if other == dose][:_KL_DRAFTS]
    )
    kl = steered_kl_nats(
        student,
        vector.band,
        vector.band_directions,
        [prompts[row] for row in measured],
        [completions[row] for row in measured],
        [doses[row] for row in measured],
        batch_size,
        "dose curve",
    )
    return {row: float(aggregate(each, "p95")) for row, each in zip(measured, kl, strict=True)}


def _steered(
    student: Student, vector: SteeringVector, doses: Sequence[float]
) -> AbstractContextManager[None]:
    layers = [student.loaded.layers[index] for index in vector.band]
    return add_vector(layers, vector.band_directions, torch.tensor(doses))
