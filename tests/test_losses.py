"""The divergence and the barrier against torch.distributions and against sums written out."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from steer_heal.losses import (
    LEAST_NATS,
    Aggregate,
    Direction,
    aggregate,
    auto_threshold,
    barrier,
    guided,
    row_divergence,
    spectral_norms,
    token_kl,
    token_losses,
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


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("is_taught", [True, False])
def test_what_a_heal_step_asks_and_its_gradients_equal_autograd(
    direction: Direction, is_taught: bool
) -> None:
    """Each of the three by torch's own functions, in fp64, with weights of its own a token."""
    student, reference, teacher = (logits(seed, 12, 50).double() for seed in range(3))
    student.requires_grad_()
    given = student.clone(), reference.clone(), teacher.clone()
    labels = torch.arange(12) % 5
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(9)).double()
    target = teacher if is_taught else None
    found = token_losses(student, labels, reference, target, direction)
    p, q, t = (Categorical(logits=each) for each in given)
    expected = (
        -p.log_prob(labels),
        kl_divergence(t, p) if is_taught else torch.zeros(12).double(),
        kl_divergence(p, q) if direction == "reverse" else kl_divergence(q, p),
    )
    gradients = []
    for values in (found, expected):
        total = sum((w * each).sum() for w, each in zip(weights, values, strict=True))
        gradients.append(torch.autograd.grad(total, student, retain_graph=True)[0])
    for ours, theirs in zip([*found, gradients[0]], [*expected, gradients[1]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(student, given[0]) and torch.equal(reference, given[1])
    assert torch.equal(teacher, given[2])
    again = torch.autograd.grad(found[2].sum(), student)[0]  # a graph that was kept is as it was
    wanted = torch.autograd.grad(expected[2].sum(), student)[0]
    torch.testing.assert_close(again, wanted, rtol=1e-10, atol=1e-10)


def test_of_equal_logits_the_divergence_is_0_and_without_slope() -> None:
    student = logits(0, 6, 30).requires_grad_()
    nll, soft, kl = token_losses(
        student, torch.zeros(6).long(), student.detach(), student.detach(), "reverse"
    )
    assert torch.equal(kl, torch.zeros(6)) and torch.equal(soft, torch.zeros(6))
    (slope,) = torch.autograd.grad((soft + kl).sum(), student, retain_graph=True)
    assert float(slope.abs().max()) < 1e-6
    (slope,) = torch.autograd.grad(nll.sum(), student)
    assert float(slope.abs().max()) > 0.1


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


# ------------------------------------------------------------------------- the threshold from data


def test_the_automatic_threshold_is_half_of_the_median_of_the_rows_that_move() -> None:
    moved = np.array([0.2, 0.9, 0.5, 0.1])
    still = np.array([0.0, 1e-6, 5e-4])
    expected = 0.5 * float(np.median(moved))
    for rows in (moved, np.concatenate([still, moved, still])):
        assert auto_threshold(torch.tensor(rows)) == pytest.approx(expected, rel=1e-6)


def test_the_automatic_threshold_scales_with_the_teacher() -> None:
    rows = torch.rand(31, generator=torch.Generator().manual_seed(0)) + 0.1
    assert auto_threshold(7 * rows) == pytest.approx(7 * auto_threshold(rows), rel=1e-6)


@pytest.mark.parametrize("rows", [[0.0, 0.0], [1e-6] * 5, [1.1e-3, 1.2e-3]])
def test_where_the_teacher_stays_the_threshold_is_the_least(rows: list[float]) -> None:
    assert auto_threshold(torch.tensor(rows)) == LEAST_NATS > 0


# -------------------------------------------------------------------------------- the update's size


def factors(seed: int, *shapes: tuple[int, int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [rank, in] and B [out, rank] of modules of shapes (out, rank, in)."""
    drawn = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank, width, generator=drawn), torch.randn(out, rank, generator=drawn))
        for out, rank, width in shapes
    ]


def start(rank: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rank, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 2, 16])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e4])
def test_spectral_norms_are_the_largest_singular_values(rank: int, scale: float) -> None:
    modules = [(a, scale * b) for a, b in factors(3, (40, rank, 64), (64, rank, 24), (8, rank, 8))]
    exact = [float(torch.linalg.svdvals(b.double() @ a.double())[0]) for a, b in modules]
    assert spectral_norms(modules, start(rank)).tolist() == pytest.approx(exact, rel=2e-3)


def test_the_gradient_of_a_spectral_norm_is_that_of_the_singular_value() -> None:
    a, b = (factor.requires_grad_(True) for factor in factors(5, (12, 3, 9))[0])
    spectral_norms([(a, b)], start(3)).sum().backward()
    slow_a, slow_b = (factor.detach().double().requires_grad_(True) for factor in (a, b))
    torch.linalg.svdvals(slow_b @ slow_a)[0].backward()
    for fast, slow in ((a, slow_a), (b, slow_b)):
        assert fast.grad is not None and slow.grad is not None
        torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=2e-2, atol=2e-2)


def test_a_spectral_norm_and_its_gradient_are_0_at_b_0() -> None:
    modules = [
        (a.requires_grad_(True), torch.zeros_like(b).requires_grad_(True))
        for a, b in factors(7, (12, 4, 9), (5, 4, 6))
    ]
    found = spectral_norms(modules, start(4))
    found.sum().backward()
    assert found.tolist() == [0, 0]
    assert all(p.grad is not None and not p.grad.any() for pair in modules for p in pair)


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
