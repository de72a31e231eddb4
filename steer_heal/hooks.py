"""The only place that registers hooks: record hidden states, add a vector to them.

A decoder layer returns its hidden states [batch, tokens, hidden] as a tensor, or first in a tuple
(Falcon, Bloom, GPT-J). Both are handled; anything of another rank is refused (Gemma 3n returns
four dimensions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from eval.errors import UserError


@contextmanager
def record_last(layers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Records the hidden state of the last position of every layer, as the layers run.

    Yields:
        A list that a forward pass fills with one [batch, hidden] tensor a layer, in fp32 on the
        CPU. With left padding the last position is each row's last token.
    """
    states: list[torch.Tensor] = [torch.empty(0)] * len(layers)

    def keep(index: int):
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            states[index] = _hidden(out)[:, -1].float().cpu()

        return hook

    with _hooked(layers, [keep(index) for index in range(len(layers))]):
        yield states


@contextmanager
def add_vector(
    layers: Sequence[nn.Module], directions: torch.Tensor, doses: torch.Tensor
) -> Iterator[None]:
    """Adds `dose * direction` to the output of every layer, at every position.

    Args:
        directions: one direction a layer, [layers, hidden].
        doses: one dose a row of the batch, [batch], or [1] for all rows.
    """

    def add(direction: torch.Tensor):
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            hidden = _hidden(out)
            if doses.shape[0] not in (1, hidden.shape[0]):
                raise ValueError(f"{doses.shape[0]} doses for {hidden.shape[0]} rows")
            steered = hidden + doses.to(hidden)[:, None, None] * direction.to(hidden)
            return (steered, *out[1:]) if isinstance(out, tuple) else steered

        return hook

    with _hooked(layers, [add(direction) for direction in directions]):
        yield


@contextmanager
def _hooked(layers: Sequence[nn.Module], hooks: Sequence[Any]) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for layer, hook in zip(layers, hooks, strict=True):
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(out: Any) -> torch.Tensor:
    hidden = out[0] if isinstance(out, tuple) else out
    if hidden.dim() != 3:
        raise UserError(
            f"a decoder layer returned {tuple(hidden.shape)}; [batch, tokens, hidden] is needed: "
            "this family keeps several streams side by side (as Gemma 3n does) and cannot be "
            "steered here; take a model of another family"
        )
    return hidden
