"""What a row says next does not depend on the cache it was put beside, nor on what was cut off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from eval.batching import left_pad
from eval.caches import can_be_joined, joined, without_first
from eval.chat import chat_ids
from eval.two_parts import attending, two_part_cache
from tests.conftest import TinyModel

QUESTIONS = ["What colour is the grass on the other side?", "What is 12 plus 30?", "Hi."]
NEXT = [11, 12, 13]


def _read(tiny: TinyModel, questions: list[str], padding: int = 0) -> tuple[Any, torch.Tensor]:
    """The cache after these prompts, and their mask; with so much more padding on their left."""
    prompts = [chat_ids(tiny.tokenizer, question) for question in questions]
    inputs = {name: pad(each, (padding, 0)) for name, each in left_pad(prompts, 0, "cpu").items()}
    cache = two_part_cache(tiny.model)
    with torch.inference_mode(), attending(tiny.model, cache):
        out = tiny.model(**inputs, past_key_values=cache, use_cache=True)
    return out.past_key_values, inputs["attention_mask"]


@torch.inference_mode()
def _says_next(tiny: TinyModel, cache: Any, mask: torch.Tensor) -> torch.Tensor:
    """Logits after two more tokens of each row: [rows, vocab]."""
    logits = torch.empty(0)
    for ids in (NEXT, NEXT[::-1]):
        mask = pad(mask, (0, 1), value=1)
        with attending(tiny.model, cache):
            logits = tiny.model(
                input_ids=torch.tensor(ids[: len(mask)])[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
    return logits


@torch.inference_mode()
def _expected(tiny: TinyModel, questions: list[str]) -> torch.Tensor:
    """The same of each row by itself, read in one piece without a cache: [rows, vocab]."""
    rows = [
        [*chat_ids(tiny.tokenizer, question), one, two]
        for question, one, two in zip(questions, NEXT, NEXT[::-1], strict=True)
    ]
    found = [tiny.model(torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows]
    return torch.stack(found)


@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS[::-1]])
@pytest.mark.parametrize("num_first", [1, 2])
def test_rows_are_put_beside_others(tiny: TinyModel, num_first: int, questions: list[str]) -> None:
    """Longer and shorter ones; in Gemma's window of 16 tokens, too."""
    parts = [_read(tiny, questions[:num_first]), _read(tiny, questions[num_first:])]
    width = max(mask.shape[1] for _, mask in parts)
    mask = torch.cat([pad(each, (width - each.shape[1], 0)) for _, each in parts])
    cache = joined([each for each, _ in parts])
    assert {layer.get_seq_length() for layer in cache.layers} == {width}
    found = _says_next(tiny, cache, mask)
    assert torch.allclose(found, _expected(tiny, questions), atol=1e-4)


def test_rows_are_put_beside_others_that_went_on(tiny: TinyModel) -> None:
    """What stands apart of a cache in two parts is not lost."""
    cache, mask = _read(tiny, QUESTIONS[:1])
    before = _says_next(tiny, cache, mask)
    again, _ = _read(tiny, QUESTIONS[:1])
    _says_next(tiny, again, mask)
    more, more_mask = _read(tiny, QUESTIONS[1:])
    cache, mask = joined([again, more]), pad(mask, (0, 2), value=1)
    both = torch.cat([mask, pad(more_mask, (mask.shape[1] - more_mask.shape[1], 0))])
    found = _says_next(tiny, cache, both)
    ids = [*chat_ids(tiny.tokenizer, QUESTIONS[0]), NEXT[0], NEXT[2], NEXT[0], NEXT[2]]
    with torch.inference_mode():
        whole = tiny.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    assert torch.allclose(found[0], whole, atol=1e-4) and not torch.allclose(found[0], before[0])
    rest = _expected(tiny, [QUESTIONS[0], *QUESTIONS[1:]])[1:]
    assert torch.allclose(found[1:], rest, atol=1e-4)


@pytest.mark.parametrize("padding", [1, 9, 30])
def test_padding_is_taken_out(tiny: TinyModel, padding: int) -> None:
    cache, mask = _read(tiny, QUESTIONS, padding)
    without_first(cache, padding)
    assert {layer.get_seq_length() for layer in cache.layers} == {mask.shape[1] - padding}
    assert all(layer.keys.is_contiguous() for layer in cache.layers)
    found = _says_next(tiny, cache, mask[:, padding:])
    assert torch.allclose(found, _expected(tiny, QUESTIONS), atol=1e-4)


def test_rows_of_a_state_are_not_put_together(decoder: TinyModel) -> None:
    """Linear attention and Mamba have taken in whatever stood before."""
    ids = torch.tensor([chat_ids(decoder.tokenizer, QUESTIONS[0])])
    with torch.inference_mode():
        cache = getattr(decoder.model(ids, use_cache=True), "past_key_values", None)
    by_position = type(decoder.model).__name__ in (
        "Qwen3ForCausalLM",
        "LlamaForCausalLM",
        "Gemma3ForCausalLM",
    )
    assert can_be_joined(cache) == by_position
    assert not can_be_joined(DynamicCache())
