"""Decoding on a CPU with keys and values in two parts, so that a token is not paid for in copies.

transformers' cache joins each new token to all that stand before it: at every step every layer's
keys and values are read and written anew, often into memory that the system hands out page by page.
Here the last few tokens stay apart from those before them and are joined once in `_MOST_NEW`:

    scores = [ q earlier_k^T, q new_k^T ] * scaling
    out    = softmax(scores) [ earlier_v ; new_v ]

which is attention over the joined ones up to the order of sums. q is that of one token, [rows, key
heads, queries a key head, width], so that no head's keys are repeated for the queries it serves.

A model decodes so where its attention takes keys and values from the cache as they are, by
transformers' AttentionInterface; that is tried once, on three tokens. All others decode as
transformers does, and so does a GPU, on which this was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [rows, key heads, tokens, width]

_NAME = "two_parts"
_MOST_NEW = 16  # tokens that stand apart: joining costs a pass over all, each apart a small product


class TwoPartLayer(DynamicLayer):
    """One decoder layer's: `keys` and `values` of the earlier tokens, and the new ones apart."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.new: _KeysValues | None = None
        self.was_read = False  # in two parts, by an attention

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> _KeysValues:
        """Takes in new tokens; one alone that follows others stands apart, and is returned so."""
        is_one = key_states.shape[-2] == 1 and self.get_seq_length() > 0
        if not is_one or self._num_new == _MOST_NEW:
            self.join()
        if not is_one:
            return super().update(key_states, value_states)
        added = (key_states, value_states)
        if self.new is not None:
            old = self.new
            added = (torch.cat([old[0], added[0]], -2), torch.cat([old[1], added[1]], -2))
        self.new = added
        return added

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self._num_new

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.new is not None:
            self.new = (self.new[0][beam_idx], self.new[1][beam_idx])

    def crop(self, tokens_to_remove: int) -> None:
        self.join()
        super().crop(tokens_to_remove)

    @property
    def _num_new(self) -> int:
        return 0 if self.new is None else self.new[0].shape[-2]

    def join(self) -> None:
        """Leaves nothing apart."""
        if self.new is not None:
            new, self.new = self.new, None
            super().update(*new)


def two_part_cache(model: Any) -> DynamicCache | None:
    """An empty cache for a batch that is decoded within `attending`; None: as transformers does."""
    if model.device.type != "cpu" or not getattr(model, "_supports_attention_backend", False):
        return None
    decoder = model.get_decoder()
    if decoder not in _known:
        _known[decoder] = _takes_part(model)
    return _empty(decoder.config) if _known[decoder] else None


@contextmanager
def attending(model: Any, cache: Any) -> Iterator[None]:
    """Lets the model attend to what stands apart in this cache; any other, or None, is let be."""
    layers = getattr(cache, "layers", ())
    if not any(isinstance(layer, TwoPartLayer) for layer in layers):
        yield
        return
    config = model.get_decoder().config
    before, token = config._attn_implementation, _layers.set(layers)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _layers.reset(token)


_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # decoder -> whether it takes part
_layers: ContextVar[Sequence[Any]] = ContextVar("layers of the cache in hand", default=())


class _OtherAttention(Exception):
    """An attention does not take what the cache gave it, or asks for another mask."""


def _empty(config: Any) -> DynamicCache:
    """transformers' cache, its layers that grow without a limit in two parts."""
    cache = DynamicCache(config=config)
    cache.layers = [
        TwoPartLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


@torch.inference_mode()
def _takes_part(model: Any) -> bool:
    """Whether all that stands apart is read, as it is."""
    config = model.get_decoder().config
    if config._attn_implementation != "sdpa":
        return False
    cache = _empty(config)
    try:
        with attending(model, cache):
            for ids in (torch.tensor([[0, 1]]), torch.tensor([[2]])):
                model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except _OtherAttention:
        return False
    ours = [layer for layer in cache.layers if isinstance(layer, TwoPartLayer)]
    return len(ours) > 0 and all(layer.was_read for layer in ours)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it: [rows, heads, 1, width] -> [rows, 1, ...]."""
    layers, at = _layers.get(), getattr(module, "layer_idx", None)
    layer = layers[at] if at is not None and at < len(layers) else None
    if not isinstance(layer, TwoPartLayer) or layer.new is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    as_given = key is layer.new[0] and value is layer.new[1] and query.shape[2] == 1
    plain = attention_mask is None or (
        attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    )
    if not (as_given and plain):
        raise _OtherAttention
    layer.was_read = True
    assert layer.keys is not None and layer.values is not None
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width)  # [rows, key heads, queries, width]
    grouped = grouped * (width**-0.5 if scaling is None else scaling)
    scores = torch.cat([grouped @ layer.keys.mT, grouped @ key.mT], -1)
    if attention_mask is not None:
        scores.masked_fill_(~attention_mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    num_earlier = layer.keys.shape[-2]
    out = weights[..., :num_earlier] @ layer.values + weights[..., num_earlier:] @ value
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
