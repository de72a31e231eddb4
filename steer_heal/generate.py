"""Steered sampling: completions of the student with `dose * v` added in the vector's band.

    h_l <- h_l + dose * v[l]   for l in the band, at every position of prompt and completion

A dose a row, all doses in one batch. No repetition penalty, top-k or nucleus: they would hide from
the filter what it must see. Beside each completion stands what the steering did to it: the 95th
percentile over its tokens of KL(steered || student), in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from eval.batching import batches
from eval.chat import chat_ids
from eval.sampling import Reply, sample_replies
from steer_heal.artifacts import Completion, Completions, SteeringVector
from steer_heal.config import GenerateConfig
from steer_heal.hooks import add_vector
from steer_heal.losses import token_kl
from steer_heal.model import Student
from steer_heal.trait import Trait


def generate_steered(
    student: Student, vector: SteeringVector, trait: Trait, config: GenerateConfig, seed: int
) -> Completions:
    """Samples `config.num_drafts` completions, prompts and doses in turn."""
    doses = [config.doses[draft % len(config.doses)] for draft in range(config.num_drafts)]
    chosen = [(draft // len(config.doses)) % len(trait.prompts) for draft in range(len(doses))]
    encoded = [chat_ids(student.tokenizer, prompt) for prompt in trait.prompts]
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
    kl = _kl_p95(student, vector, prompts, replies, doses, config.batch_size)
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
                kl_p95_nats=kl[draft],
            )
            for draft, index in enumerate(chosen)
        )
    )


def _steered(
    student: Student, vector: SteeringVector, doses: Sequence[float]
) -> AbstractContextManager[None]:
    layers = [student.loaded.layers[index] for index in vector.band]
    return add_vector(layers, vector.band_directions, torch.tensor(doses))


@torch.inference_mode()
def _kl_p95(
    student: Student,
    vector: SteeringVector,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    doses: Sequence[float],
    batch_size: int,
) -> list[float]:
    """95th percentile over each completion's tokens of KL(steered || student), nats."""
    rows = [[*prompt, *reply.token_ids] for prompt, reply in zip(prompts, replies, strict=True)]
    result = [0.0] * len(rows)
    pad_id = student.tokenizer.pad_token_id
    with student.running() as model:
        for batch in batches(rows, batch_size, pad_id, model.device, "dose curve"):
            lengths = [len(replies[row].token_ids) for row in batch.rows]
            keep = {"logits_to_keep": max(lengths) + 1, "use_cache": False}
            plain = model(**batch.inputs, **keep).logits[:, :-1]  # [batch, longest, vocab]
            with _steered(student, vector, [doses[row] for row in batch.rows]):
                steered = model(**batch.inputs, **keep).logits[:, :-1]
            for index, (row, length) in enumerate(zip(batch.rows, lengths, strict=True)):
                kl = token_kl(steered[index, -length:], plain[index, -length:], "reverse")
                result[row] = float(torch.quantile(kl, 0.95))
    return result
