"""What a heal step is held to and taught: the reference and the steered teacher, read once.

Both are the student's own modules with other adapters acting, and neither changes while it trains.
So their hidden states at the kept completions' tokens are made before the first step, and a step is
one pass, the student's. Kept in main memory: two or three vectors of the hidden size a token, 0.8
GB for 192 completions of 128 tokens at a hidden size of 4,096 in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from eval.logits import completion_ends, end_states
from eval.processes import spread
from steer_heal.artifacts import Screened, SteeringVector
from steer_heal.config import HealConfig
from steer_heal.head import CHUNK_LOGITS, over_chunks, project
from steer_heal.hooks import add_vector
from steer_heal.losses import aggregate, auto_threshold, guided, token_kl
from steer_heal.model import Student

_MORE_ROWS = 8  # than a step has: nothing is kept for a gradient

Logits = Callable[[torch.Tensor], torch.Tensor]


class Targets(NamedTuple):
    """Final hidden states where completion tokens are predicted: [tokens, hidden] each."""

    reference: torch.Tensor
    steered: torch.Tensor | None = None  # the student before the round, at the completion's dose
    plain: torch.Tensor | None = None  # the same without the vector; None where it is the reference


def read_targets(
    student: Student,
    kept: Screened,
    vector: SteeringVector,
    reference: Sequence[str],
    config: HealConfig,
) -> list[Targets]:
    """Those of every kept completion, on the CPU; without the teacher where it is not asked.

    Args:
        student: as it was before the round.
        reference: names of the adapters that act in what the barrier holds the student to.
    """
    size = _MORE_ROWS * config.batch_size
    states = [_states(student.with_only(reference), kept, size)]
    if config.soft_weight != 0 or config.barrier_threshold_nats == "auto":
        states.append(_states(student, kept, size, vector))
        if list(reference) != student.names:
            states.append(_states(student, kept, size))
    return [Targets(*row) for row in zip(*states, strict=True)]


def _states(
    student: Student, kept: Screened, batch_size: int, vector: SteeringVector | None = None
) -> list[torch.Tensor]:
    """Of every kept completion, steered or not."""

    def read(numbers: list[int]) -> list[torch.Tensor]:
        rows = [kept.kept[number] for number in numbers]
        doses = [row.dose for row in rows]
        ends = completion_ends(
            [row.prompt_ids for row in rows],
            [row.token_ids for row in rows],
            kinds=None if vector is None else doses,  # a prompt is steered, too
        )

        def steering(some: list[int]) -> AbstractContextManager[None]:
            if vector is None:
                return nullcontext()
            layers = [student.loaded.layers[index] for index in vector.band]
            return add_vector(
                layers, vector.band_directions, torch.tensor([doses[at] for at in some])
            )

        found, pad_id = [torch.empty(0)] * len(rows), student.tokenizer.pad_token_id
        for at, states in end_states(
            model, ends, batch_size, pad_id, label="targets", around=steering
        ):
            found[at] = states[:-1].cpu()
        return found

    with student.running() as model:
        found = spread(read, [(row.dose, row.prompt_ids) for row in kept.kept])
    return [states.clone() for states in found]  # out of inference mode


def guided_logits(
    logits: Logits, held_to: torch.Tensor, targets: Targets, guidance: float
) -> torch.Tensor:
    """The guided teacher's: [tokens, vocabulary].

    Args:
        logits: from hidden states.
        held_to: logits of the reference.
    """
    assert targets.steered is not None
    plain = held_to if targets.plain is None else logits(targets.plain)
    return guided(logits(targets.steered), plain, guidance)


@torch.no_grad()
def barrier_threshold(student: Student, targets: Sequence[Targets], config: HealConfig) -> float:
    """Where the barrier begins, nats: as configured, or from how far the teacher itself goes."""
    if config.barrier_threshold_nats != "auto":
        return config.barrier_threshold_nats
    model = student.loaded.model

    def logits(states: torch.Tensor) -> torch.Tensor:
        return project(model, states.to(model.device)).float()

    def teacher_kl(*states: torch.Tensor) -> tuple[torch.Tensor]:
        row = Targets(*states)
        held_to = logits(row.reference)
        teacher = guided_logits(logits, held_to, row, config.guidance)
        return (token_kl(teacher, held_to, config.barrier_direction),)

    size = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)

    def divergence(rows: list[int]) -> list[torch.Tensor]:
        kls = [over_chunks(teacher_kl, targets[row], size) for row in rows]
        each = [torch.cat([kl for (kl,) in chunks]) for chunks in kls]
        return [aggregate(kl, config.barrier_aggregate).cpu() for kl in each]

    return auto_threshold(torch.stack(spread(divergence, range(len(targets)))))
