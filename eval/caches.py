"""Rows of a key-value cache, put together with their ends aligned.

    earlier rows    a a a a a        left of a row that is shorter stands padding,
    later rows      . . b b b        which the attention mask hides

Which layers can: those that keep keys and values by position. A state that has taken in what stood
before it, as of linear attention, cannot be told from padding afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eval.two_parts import TwoPartLayer

_BY_POSITION = (DynamicLayer, DynamicSlidingWindowLayer, TwoPartLayer)


def can_be_joined(cache: Any) -> bool:
    """Whether rows can be put beside those of this cache; an empty one answers as a full one."""
    layers = getattr(cache, "layers", ())
    return len(layers) > 0 and all(type(layer) in _BY_POSITION for layer in layers)


def joined(caches: Sequence[Any]) -> Any:
    """One cache of the rows of several, whose ends are aligned; the first is written to.

    Args:
        caches: of one model, each of which `can_be_joined`.
    """
    if len(caches) == 1:
        return caches[0]
    width = max(cache.get_seq_length() for cache in caches)
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        both = [_kept(each) for each in (layer, *others)]
        kept = width
        if isinstance(layer, DynamicSlidingWindowLayer):
            kept, layer.cumulative_length = min(width, layer.sliding_window - 1), width
        layer.keys, layer.values = (
            torch.cat([pad(part, (0, 0, kept - part.shape[-2], 0)) for part in parts])
            for parts in zip(*both, strict=True)
        )
    return caches[0]


def without_first(cache: Any, num_tokens: int) -> None:
    """Takes the first tokens out, which are padding in every row; the cache `can_be_joined`."""
    width = cache.get_seq_length() - num_tokens
    for layer in cache.layers:
        keys, values = _kept(layer)
        start = max(keys.shape[-2] - width, 0)  # a window has them no more
        # a copy: what is packed is faster to read
        layer.keys, layer.values = (part[..., start:, :].contiguous() for part in (keys, values))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = width


def _kept(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens that the layer has."""
    if isinstance(layer, TwoPartLayer):
        layer.join()
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values
