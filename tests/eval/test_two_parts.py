"""Decoding in two parts is decoding, for each family that takes part; others are let be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from eval import decoding
from eval.batching import left_pad
from eval.chat import chat_ids
from eval.sampling import sample_replies
from eval.two_parts import (
    _MOST_NEW,
    TwoPartLayer,
    attending,
    two_part_cache,
)
from tests.conftest import TinyModel

QUESTIONS = ["What is 12 plus 30?", "Hi.", "What colour is the grass on the other side?"]


def _prompts(tiny: TinyModel) -> list[list[int]]:
    return [chat_ids(tiny.tokenizer, question) for question in QUESTIONS]


@torch.no_grad()
def _whole(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits after the last token, everything read anew, without cache or padding: [vocab]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


@torch.inference_mode()
def _step(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits after one more token of each row: [rows, vocab]."""
    positions = (mask.sum(1) - 1)[:, None]
    with attending(model, cache):
        return model(
            input_ids=ids[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def test_every_token_is_as_if_all_were_read_anew(tiny: TinyModel) -> None:
    """Padded rows over several joins; a row leaves half way."""
    model, rows = tiny.model, _prompts(tiny)
    cache, inputs = two_part_cache(model), left_pad(rows, 0, "cpu")
    with torch.inference_mode(), attending(model, cache):
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
    mask = inputs["attention_mask"]
    for step in range(2 * _MOST_NEW + 3):
        expected = torch.stack([_whole(model, row) for row in rows])
        assert torch.allclose(logits, expected, atol=1e-4), step
        if step == _MOST_NEW + 5:
            cache.reorder_cache(torch.tensor([2, 0]))
            rows, mask, logits = [rows[2], rows[0]], mask[[2, 0]], logits[[2, 0]]
        ids = logits.argmax(-1)
        rows = [[*row, token] for row, token in zip(rows, ids.tolist(), strict=True)]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = _step(model, cache, ids, mask)
    ours = [layer for layer in cache.layers if isinstance(layer, TwoPartLayer)]
    assert ours and all(layer.was_read for layer in ours)
    lengths = {layer.get_seq_length() for layer in ours}
    assert lengths == {mask.shape[1]}  # what stands apart counts


def test_in_bf16_it_is_as_near_as_transformers_own(tiny_qwen3: TinyModel) -> None:
    """By the size of the difference that bf16 itself makes."""
    ids = _prompts(tiny_qwen3)[2]
    exact = _whole(tiny_qwen3.model, [*ids, 7, 8])
    model = type(tiny_qwen3.model).from_pretrained(tiny_qwen3.folder, dtype=torch.bfloat16).eval()
    theirs = _whole(model, [*ids, 7, 8]).float()
    cache, inputs = two_part_cache(model), left_pad([ids], 0, "cpu")
    with torch.inference_mode(), attending(model, cache):
        model(**inputs, past_key_values=cache, use_cache=True)
    mask = inputs["attention_mask"]
    for token in (7, 8):
        mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
        logits = _step(model, cache, torch.tensor([token]), mask)
    assert (logits[0] - exact).abs().max() < 3 * (theirs - exact).abs().max()


def test_new_tokens_stand_apart_and_are_joined_now_and_then() -> None:
    layer = TwoPartLayer()
    for count, kept in ((5, 5), (1, 5), (1, 5)):
        states = torch.randn(2, 3, count, 4)
        given = layer.update(states, states)
        assert layer.keys is not None and layer.keys.shape[-2] == kept
    assert given[0].shape[-2] == 2 and layer.get_seq_length() == 7
    whole = torch.cat([layer.keys, given[0]], -2)
    for _ in range(_MOST_NEW - 1):
        layer.update(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4))
    assert layer.keys.shape[-2] == 5 + _MOST_NEW and layer.get_seq_length() == 6 + _MOST_NEW
    assert torch.equal(layer.keys[..., :7, :], whole)
    layer.crop(-_MOST_NEW)
    assert torch.equal(layer.keys, whole[..., :6, :]) and layer.get_seq_length() == 6


def test_several_at_once_are_joined(tiny_qwen3: TinyModel) -> None:
    """A text that goes on after a reply, as a second turn does."""
    model, ids = tiny_qwen3.model, _prompts(tiny_qwen3)[0]
    more = [*ids, 11, 12, 13, 14, 15]
    cache = two_part_cache(model)
    with torch.inference_mode(), attending(model, cache):
        for start, end in ((0, len(ids)), (len(ids), len(ids) + 1), (len(ids) + 1, len(more))):
            part = torch.tensor([more[start:end]])
            logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0, -1]
    assert torch.allclose(logits, _whole(model, more), atol=1e-4)


def test_layers_that_grow_without_a_limit_take_part(tiny: TinyModel) -> None:
    cache = two_part_cache(tiny.model)
    parts = [isinstance(layer, TwoPartLayer) for layer in cache.layers]
    assert parts == ([False, True, False] if tiny.family == "gemma3" else [True, True])


def _gptj() -> Any:
    """Attends by itself, not by way of the interface."""
    config = GPTJConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)
    return GPTJForCausalLM(config).eval()


def test_others_are_let_be(tiny_qwen3: TinyModel) -> None:
    assert two_part_cache(_gptj()) is None
    before = tiny_qwen3.model.config._attn_implementation
    with attending(tiny_qwen3.model, None):
        assert tiny_qwen3.model.config._attn_implementation == before


def test_an_eager_attention_stays_eager(tiny_qwen3: TinyModel) -> None:
    eager = type(tiny_qwen3.model).from_pretrained(tiny_qwen3.folder, attn_implementation="eager")
    assert two_part_cache(eager.eval()) is None


def test_keys_that_are_changed_after_the_cache_are_noticed(
    tiny_qwen3: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy stands for what some family may do with them."""
    model = type(tiny_qwen3.model).from_pretrained(tiny_qwen3.folder).eval()
    plain = TwoPartLayer.update

    def update(self: TwoPartLayer, *states: torch.Tensor, **kwargs: Any) -> Any:
        return tuple(each.clone() for each in plain(self, *states))

    monkeypatch.setattr(TwoPartLayer, "update", update)
    assert two_part_cache(model) is None


def test_the_attention_is_put_back_whatever_happens(tiny_qwen3: TinyModel) -> None:
    config = tiny_qwen3.model.get_decoder().config
    before = config._attn_implementation
    with pytest.raises(RuntimeError), attending(tiny_qwen3.model, two_part_cache(tiny_qwen3.model)):
        assert config._attn_implementation != before
        raise RuntimeError
    assert config._attn_implementation == before


def test_replies_are_sampled_in_two_parts(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are what they are without."""
    made: list[Any] = []

    def noted(model: Any) -> Any:
        made.append(two_part_cache(model))
        return made[-1]

    def replies() -> list[tuple[int, ...]]:
        prompts = _prompts(tiny) * 2
        found = sample_replies(tiny.model, tiny.tokenizer, prompts, seed=4, max_new_tokens=40)
        return [reply.token_ids for reply in found]

    monkeypatch.setattr(decoding, "two_part_cache", noted)
    ours = replies()
    assert any(getattr(layer, "was_read", False) for cache in made for layer in cache.layers)
    monkeypatch.setattr(decoding, "two_part_cache", lambda model: None)
    assert replies() == ours
