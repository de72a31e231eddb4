"""The divergence and the barrier against torch.distributions and against sums written out."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from steer_heal.losses import (
    Aggregate,
    Direction,
    aggregate,
    barrier,
    guided,
    row_divergence,
    token_kl,
)


def logits(seed: int, tokens: int = 40, vocab: int = 300) -> torch.Tensor:
    return 3 * torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_token_kl_equals_torch_distributions_in_fp64(direction: Direction) -> None:
    student, reference = logits(0), logits(1)
    p, q = Categorical(logits=student.double()), Categorical(logits=reference.double())
    expected = kl_divergence(p, q) if direction == "reverse" else kl_divergence(q, p)
    torch.testing.assert_close(
        token_kl(student, reference, direction).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_the_two_directions_punish_opposite_errors() -> None:
    """Reverse is dear for an invented token, forward for a dropped one."""
    flat = torch.zeros(1, 2)
    sharp = torch.tensor([[0.0, -20.0]])
    log2 = math.log(2)
    assert token_kl(sharp, flat, "reverse").item() == pytest.approx(log2, abs=1e-4)
    assert token_kl(sharp, flat, "forward").item() == pytest.approx(10 - log2, abs=1e-4)
    assert token_kl(flat, sharp, "reverse").item() == pytest.approx(10 - log2, abs=1e-4)


def test_token_kl_computes_in_fp32_whatever_comes_in() -> None:
    student, reference = logits(0).bfloat16(), logits(1).bfloat16()
    expected = kl_divergence(
        Categorical(logits=student.double()), Categorical(logits=reference.double())
    )
    found = token_kl(student, reference, "reverse")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_aggregates_equal_numpy() -> None:
    kl = torch.rand(57, generator=torch.Generator().manual_seed(0)) * 4
    values = kl.double().numpy()
    expected = {
        "mean": values.mean(),
        "rmse": math.sqrt((values**2).mean()),
        "p95": np.quantile(values, 0.95),
        "max": values.max(),
    }
    found = {how: float(aggregate(kl, how)) for how in ("mean", "rmse", "p95", "max")}
    assert found == pytest.approx(expected, rel=1e-5)


def test_rows_are_aggregated_apart() -> None:
    kl = torch.tensor([1.0, 3.0, 10.0, 2.0, 2.0, 5.0])
    assert row_divergence(kl, [2, 1, 3], "mean").tolist() == pytest.approx([2.0, 10.0, 3.0])
    assert row_divergence(kl, [2, 1, 3], "max").tolist() == pytest.approx([3.0, 10.0, 5.0])


def test_a_loop_of_4_tokens_in_60_is_diluted_by_the_mean_alone() -> None:
    """Four broken tokens among 56 that hardly diverge: mean 0.38, rmse 1.5, max 8.1."""
    kl = torch.full((60,), 0.02)
    kl[30:34] = torch.tensor([8.1, 5.0, 4.5, 4.1])
    assert float(aggregate(kl, "mean")) == pytest.approx(0.38, abs=0.005)
    assert float(aggregate(kl, "rmse")) == pytest.approx(1.5, abs=0.05)
    assert float(aggregate(kl, "max")) == pytest.approx(8.1)
    assert float(aggregate(kl, "p95")) > 4


@pytest.mark.parametrize(
    ("how", "direction"), product(["rmse", "mean", "p95", "max"], ["reverse", "forward"])
)
def test_gradients_equal_fp64_autograd(how: Aggregate, direction: Direction) -> None:
    student = logits(2, 21, 30).requires_grad_(True)
    reference = logits(3, 21, 30)
    row_divergence(token_kl(student, reference, direction), [9, 12], how).sum().backward()

    slow = student.detach().double().requires_grad_(True)
    p, q = Categorical(logits=slow), Categorical(logits=reference.double())
    kl = kl_divergence(p, q) if direction == "reverse" else kl_divergence(q, p)
    one = {
        "rmse": lambda x: x.pow(2).mean().sqrt(),
        "mean": lambda x: x.mean(),
        "p95": lambda x: torch.quantile(x, 0.95),
        "max": lambda x: x.max(),
    }[how]
    (one(kl[:9]) + one(kl[9:])).backward()
    assert student.grad is not None and slow.grad is not None
    torch.testing.assert_close(student.grad.double(), slow.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["rmse", "mean", "p95", "max"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_gradient_is_finite_where_student_and_reference_are_equal(
    how: Aggregate, threshold: float
) -> None:
    """The first step of every round: B = 0. The root's slope at 0 is infinite."""
    student = logits(4, 12, 30).requires_grad_(True)
    kl = token_kl(student, student.detach().clone(), "reverse")
    barrier(row_divergence(kl, [5, 7], how), threshold).backward()
    assert float(kl.detach().abs().max()) == 0
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_barrier_is_what_exceeds_the_threshold_mean_over_rows() -> None:
    assert float(barrier(torch.tensor([0.2, 0.7, 1.5]), 0.5)) == pytest.approx((0.2 + 1.0) / 3)


def test_barrier_is_zero_and_without_slope_below_the_threshold() -> None:
    divergence = torch.tensor([0.2, 0.5], requires_grad=True)
    value = barrier(divergence, 0.5)
    value.backward()
    assert value.item() == 0
    assert divergence.grad is not None and divergence.grad.tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------ the teacher


def test_guidance_multiplies_what_steering_does_to_the_log_odds() -> None:
    plain, steered = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.5, 0.2, 0.3]])
    found = guided(steered.log(), plain.log(), 3.0).softmax(-1)[0]
    before, after = 0.2 / 0.5, 0.5 / 0.2
    assert float(found[0] / found[1]) == pytest.approx(before * (after / before) ** 3)


@pytest.mark.parametrize("guidance", [0.5, 1.0, 4.0])
def test_guidance_changes_nothing_where_steering_changes_nothing(guidance: float) -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    moved = logits + 3  # the same distribution
    found = guided(moved, logits, guidance).softmax(-1)
    assert torch.allclose(found, logits.softmax(-1), atol=1e-6)
