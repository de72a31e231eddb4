"""Losses over chunks of positions are those over all of them, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from steer_heal.head import over_chunks
from steer_heal.losses import token_kl


@pytest.mark.parametrize("size", [1, 7, 20, 100])
def test_chunks_give_the_values_and_gradients_of_the_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head, student, reference = (
        torch.randn(*shape, generator=generator) for shape in ((50, 8), (20, 8), (20, 8))
    )
    seen: list[int] = []

    def losses(
        states: torch.Tensor, held_to: torch.Tensor, nothing: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert nothing is None
        seen.append(len(states))
        logits = F.linear(states, head)
        return logits.logsumexp(-1).sum(), token_kl(logits, F.linear(held_to, head), "reverse")

    found = []
    for each in (10**6, size):
        states = student.clone().requires_grad_()
        seen.clear()
        chunks = over_chunks(losses, (states, reference, None), each)
        total = torch.stack([chunk[0] for chunk in chunks]).sum()
        kl = torch.cat([chunk[1] for chunk in chunks])
        (total + kl.square().mean()).backward()
        assert states.grad is not None
        found.append((total.detach(), kl.detach(), states.grad))
    assert max(seen) == min(size, 20)
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
