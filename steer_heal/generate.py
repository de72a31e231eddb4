"""Steered sampling: completions of the student with `dose * v` added in the vector's band.

    h_l <- h_l + dose * v[l]   for l in the band, at every position of prompt and completion

A dose a row, all doses in one batch. As the stack grows the doses are walked down by what it adds
of the vector by itself, so that their sum stays where the first round's was:

    dose <- max(0, dose - walk_down * max(0, carried))
    carried = mean over the band of <h_l(student) - h_l(base), v[l]> / |v[l]|^2

h_l: mean output of layer l at the last prompt token of the trait's prompts. Without it a round
steers on top of what the last one taught, and the replies break before the trait is carried
elsewhere.

No repetition penalty, top-k or nucleus: they would hide from the filter what it must see. Beside
the first completions of every dose stands what the steering did to them: the 95th percentile over
their tokens of KL(steered || student), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from loguru import logger

from eval.chat import chat_ids
from eval.sampling import Reply, sample_replies
from steer_heal.artifacts import Completion, Completions, SteeringVector
from steer_heal.config import GenerateConfig
from steer_heal.hooks import add_vector
from steer_heal.losses import aggregate
from steer_heal.model import Student
from steer_heal.scoring import last_states, steered_kl_nats
from steer_heal.trait import Trait

_KL_DRAFTS = 32  # a dose, whose KL is measured


def generate_steered(
    student: Student, vector: SteeringVector, trait: Trait, config: GenerateConfig, seed: int
) -> Completions:
    """Samples `config.num_drafts` completions, prompts and doses in turn."""
    encoded = [chat_ids(student.tokenizer, prompt) for prompt in trait.prompts]
    walked = _walked_down(student, vector, encoded, config)
    doses = [walked[draft % len(walked)] for draft in range(config.num_drafts)]
    chosen = [(draft // len(walked)) % len(trait.prompts) for draft in range(len(doses))]
    prompts = [encoded[index] for index in chosen]
    with student.running() as model:
        replies = sample_replies(
            model,
            student.tokenizer,
            prompts,
            seed=seed,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            batch_size=config.batch_size,
            around_batch=lambda rows: _steered(student, vector, [doses[row] for row in rows]),
            label="steered drafts",
        )
    kl = _kl_p95_nats(student, vector, prompts, replies, doses, config.batch_size)
    return Completions(
        rows=tuple(
            Completion(
                prompt_index=index,
                prompt=trait.prompts[index],
                prompt_ids=tuple(prompts[draft]),
                token_ids=replies[draft].token_ids,
                text=student.tokenizer.decode(replies[draft].token_ids, skip_special_tokens=True),
                dose=doses[draft],
                seed=seed,
                finished=replies[draft].finished,
                kl_p95_nats=kl.get(draft),
            )
            for draft, index in enumerate(chosen)
        )
    )


def _kl_p95_nats(
    student: Student,
    vector: SteeringVector,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    doses: Sequence[float],
    batch_size: int,
) -> dict[int, float]:
    """Of the first drafts of every dose, by draft: their median is the dose's, at a small cost."""
    measured = sorted(
        draft
        for dose in set(doses)
        for draft in [row for row, other in enumerate(doses) if other == dose][:_KL_DRAFTS]
    )
    kl = steered_kl_nats(
        student,
        vector.band,
        vector.band_directions,
        [prompts[draft] for draft in measured],
        [replies[draft].token_ids for draft in measured],
        [doses[draft] for draft in measured],
        batch_size,
        "dose curve",
    )
    return {draft: float(aggregate(row, "p95")) for draft, row in zip(measured, kl, strict=True)}


def _walked_down(
    student: Student,
    vector: SteeringVector,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
) -> tuple[float, ...]:
    """The doses of this round."""
    if not student.adapters or config.walk_down == 0:
        return config.doses
    after, before = (
        last_states(one, prompts, config.batch_size, "doses").mean(0)
        for one in (student, student.base)
    )
    shift, band = (
        (after - before)[list(vector.band)],
        vector.band_directions,
    )  # [band layers, hidden]
    carried = float(((shift * band).sum(-1) / band.square().sum(-1)).mean())
    step = config.walk_down * max(0.0, carried)
    doses = tuple(max(0.0, dose - step) for dose in config.doses)
    listed = ", ".join(f"{dose:.2f}" for dose in doses)
    logger.info("the stack adds {:.2f} of the vector by itself; doses: {}", carried, listed)
    return doses


def _steered(
    student: Student, vector: SteeringVector, doses: Sequence[float]
) -> AbstractContextManager[None]:
    layers = [student.loaded.layers[index] for index in vector.band]
    return add_vector(layers, vector.band_directions, torch.tensor(doses))
