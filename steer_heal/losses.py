"""The heal step's tensor functions: divergence, the barrier on it, and the guided teacher.

    barrier = mean over rows of relu(D - threshold),  D = aggregate over a row's tokens of KL[token]
    guided  = plain + guidance * (steered - plain),  in log-probability

Shapes: N completion tokens of the whole batch, V vocabulary. All values in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Aggregate = Literal["rmse", "mean", "p95", "max"]
Direction = Literal["reverse", "forward"]

_EPS = 1e-12  # student == reference at the first step: the root's slope at 0 is infinite


def token_kl(student: torch.Tensor, reference: torch.Tensor, direction: Direction) -> torch.Tensor:
    """Full-vocabulary KL a token, nats: logits [N, V], [N, V] -> [N].

    reverse: KL(student || reference), dear where the student says what the reference would not.
    forward: KL(reference || student), dear where the student gives up what the reference says.
    """
    student, reference = student.float().log_softmax(-1), reference.float().log_softmax(-1)
    if direction == "forward":
        student, reference = reference, student
    return (student.exp() * (student - reference)).sum(-1)


def aggregate(kl: torch.Tensor, how: Aggregate) -> torch.Tensor:
    """One row's divergence from its tokens': [tokens] -> [].

    The mean dilutes: a loop of 4 tokens in 60 has mean 0.38, rmse 1.5, max 8.1.
    """
    if how == "mean":
        return kl.mean()
    if how == "rmse":
        return (kl.square().mean() + _EPS).sqrt()
    if how == "p95":
        return torch.quantile(kl, 0.95)
    return kl.max()


def row_divergence(kl: torch.Tensor, tokens_a_row: list[int], how: Aggregate) -> torch.Tensor:
    """Divergence a row: [N] split into rows -> [rows]."""
    return torch.stack([aggregate(row, how) for row in kl.split(tokens_a_row)])


def barrier(divergence: torch.Tensor, threshold_nats: float) -> torch.Tensor:
    """Mean over rows of what exceeds the threshold: [rows] -> []."""
    return F.relu(divergence - threshold_nats).mean()


def guided(steered: torch.Tensor, plain: torch.Tensor, guidance: float) -> torch.Tensor:
    """Goes `guidance` times as far as steering goes, in log-probability: logits [N, V] -> [N, V].

    1 is the steered model itself, 0 the plain one. Where the trait is decided the steered model is
    of two minds still; beyond it the odds are clear, and where steering changes nothing nothing is
    changed. Classifier-free guidance with the steering in the place of the condition (Ho and
    Salimans 2022; for language models Sanchez et al. 2023).
    """
    return torch.lerp(plain.float().log_softmax(-1), steered.float().log_softmax(-1), guidance)
