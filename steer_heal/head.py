"""From hidden states to logits, at chosen positions alone, and in chunks of them.

A loss over the whole vocabulary needs several tensors of [positions, vocabulary] at once: 1 GiB
each for 8 rows of 256 tokens at a vocabulary of 128k, in fp32. Chunk by chunk, and made again in
the backward pass, there are never more than those of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**24  # a chunk's: 64 MiB in fp32

Chunk = tuple[torch.Tensor | None, ...]


def over_chunks(
    work: Callable[..., tuple[torch.Tensor, ...]], inputs: Chunk, size: int
) -> list[tuple[torch.Tensor, ...]]:
    """What `work` makes of every `size` positions; of all at once where there are no more.

    With several chunks, what a chunk's backward pass needs is made again in it.

    Args:
        inputs: [positions, ...] each, or None, which is handed on.
    """
    count = next(len(each) for each in inputs if each is not None)
    if count <= size:
        return [work(*inputs)]
    return [
        checkpoint(
            work,
            *(each if each is None else each[start : start + size] for each in inputs),
            use_reentrant=False,
        )
        for start in range(0, count, size)
    ]


def completion_logits(
    model: Any, base: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """fp32 logits at chosen positions only; no others are ever made: [N, V].

    Args:
        model, inputs, mask: as `completion_states` takes them.
        base: the causal LM inside, whose head projects.
    """
    return project(base, completion_states(model, inputs, mask)).float()


def completion_states(
    model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Hidden states after the final norm at chosen positions: [N, hidden].

    Args:
        model: what is called, with whatever is wrapped around it.
        inputs: input_ids and attention_mask, [rows, tokens] both.
        mask: where to, [rows, tokens - 1]: the last position predicts nothing that is known.
    """
    out = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
        output_hidden_states=[-1],  # after the final norm
        logits_to_keep=1,
    )
    return out.hidden_states[-1][:, :-1][mask]


def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits from hidden states after the final norm, with the family's own scale and soft cap."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    scales = (getattr(config, key, None) for key in _SCALES)
    scale = next((value for value in scales if value is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        inverse = config.model_type != "hyperclovax"  # Granite and MiniCPM3 divide by it
        scale = 1 / config.logits_scaling if inverse else config.logits_scaling
    if scale is not None:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
