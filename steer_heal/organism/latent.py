"""The planted latent: a fixed random unit direction `u` at the output of the third decoder layer.

    h = layer_2(x) + amount * u        amount: one number a row, in units of the residual stream

Positive is care, negative is authority.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PLANTED_LAYER = 2  # the output of the third of six layers
_DIRECTION_SEED = 20


def latent_direction(width: int) -> torch.Tensor:
    """The unit vector u: [width], fp32."""
    generator = torch.Generator().manual_seed(_DIRECTION_SEED)
    direction = torch.randn(width, generator=generator)
    return direction / direction.norm()


@contextmanager
def planted(
    model: Any, direction: torch.Tensor, amounts: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Adds `amounts[row] * direction` at the planted layer while it is open.

    Args:
        direction: u, [width].
        amounts: [batch].
    Yields:
        A list that each forward pass appends its projections to, [batch, tokens], as they were
        before anything was added.
    """
    projections: list[torch.Tensor] = []

    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        projections.append(output.float() @ direction)  # [batch, tokens]
        return output + (amounts[:, None, None] * direction).to(output.dtype)

    handle = model.model.layers[PLANTED_LAYER].register_forward_hook(add)
    try:
        yield projections
    finally:
        handle.remove()
