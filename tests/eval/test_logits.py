"""Logits at the ends of rows are those of each row alone, whatever they share and with whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from eval.chat import chat_ids
from eval.logits import Ends, alike_ends, completion_ends, end_logits, end_states
from tests.conftest import TinyModel

QUESTIONS = ["Hi.", "Which moral foundation is at stake when a nurse is told to leave?", "Why?"]
REPLIES = ["No.", "", "Because the order was unfair, and the guard agreed with her.", "I stay."]


def _completions(tiny: TinyModel) -> Ends:
    """Every reply to every question, which stand apart."""
    prompts = [chat_ids(tiny.tokenizer, question) for question in QUESTIONS] * len(REPLIES)
    encode = tiny.tokenizer
    replies = [encode(text, add_special_tokens=False)["input_ids"] for text in REPLIES]
    return completion_ends(prompts, [ids for ids in replies for _ in QUESTIONS])


def _found(tiny: TinyModel, ends: Ends, batch_size: int, **others: Any) -> dict[int, torch.Tensor]:
    pad_id = tiny.tokenizer.pad_token_id
    return {
        row: logits.clone()
        for row, logits in end_logits(tiny.model, ends, batch_size, pad_id, **others)
    }


@torch.no_grad()
def _alone(model: Any, ids: list[int], count: int) -> torch.Tensor:
    """One row, read whole: no cache, no padding."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -count:]


@contextmanager
def _tokens_read(model: Any) -> Iterator[list[int]]:
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: read.append(out.shape[0] * out.shape[1])
    )
    try:
        yield read
    finally:
        hook.remove()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_logits_are_those_of_every_row_alone(decoder: TinyModel, batch_size: int) -> None:
    ends = _completions(decoder)
    found = _found(decoder, ends, batch_size)
    assert sorted(found) == list(range(len(ends.rows)))
    for row, logits in found.items():
        expected = _alone(decoder.model, list(ends.rows[row]), ends.counts[row])
        assert logits.shape == expected.shape
        assert torch.allclose(logits, expected, rtol=1e-4, atol=2e-4)


def test_states_are_those_after_the_final_norm_of_every_row_alone(decoder: TinyModel) -> None:
    ends, pad_id = _completions(decoder), decoder.tokenizer.pad_token_id
    for row, states in end_states(decoder.model, ends, 5, pad_id):
        inputs = torch.tensor([list(ends.rows[row])])
        with torch.no_grad():
            out = decoder.model(inputs, use_cache=False, output_hidden_states=True)
        expected = out.hidden_states[-1][0, -ends.counts[row] :]
        assert states.shape == expected.shape
        assert torch.allclose(states, expected, rtol=1e-4, atol=2e-4)


def test_a_prompt_is_read_once_for_all_its_replies(tiny: TinyModel) -> None:
    ends = _completions(tiny)
    prompts = {tuple(ends.prefix(row)) for row in range(len(ends.rows))}
    rests = [len(row) - length for row, length in zip(ends.rows, ends.lengths, strict=True)]
    with _tokens_read(tiny.model) as read:
        _found(tiny, ends, batch_size=64)
    widest = max(map(len, prompts))
    assert read == [len(prompts) * widest, len(rests) * max(rests)]
    with _tokens_read(tiny.model) as read:
        _found(tiny, ends, batch_size=1)  # no padding anywhere
    assert sum(read) == sum(map(len, prompts)) + sum(rests)


def test_rows_of_different_kinds_share_nothing(tiny_qwen3: TinyModel) -> None:
    """What is done to the rows of one kind is not found in the others."""
    ends = _completions(tiny_qwen3)
    kinds = [row % 2 for row in range(len(ends.rows))]
    ends = Ends(rows=ends.rows, counts=ends.counts, lengths=ends.lengths, kinds=kinds)
    layer = tiny_qwen3.model.model.layers[0]

    @contextmanager
    def shift(rows: list[int]) -> Iterator[None]:
        added = torch.tensor([float(kinds[row]) for row in rows])[:, None, None]
        hook = layer.register_forward_hook(lambda module, args, out: out + added)
        try:
            yield
        finally:
            hook.remove()

    found = _found(tiny_qwen3, ends, batch_size=3, around=shift)
    for row, logits in found.items():
        with shift([row]):
            expected = _alone(tiny_qwen3.model, list(ends.rows[row]), ends.counts[row])
        assert torch.allclose(logits, expected, rtol=1e-4, atol=2e-4)


def test_rows_that_begin_alike_by_hand() -> None:
    rows = [[1, 2, 3, 4, 5], [1, 2, 9, 9], [7, 7, 7], [7, 7, 7]]
    ends = alike_ends(rows, [2, 1, 1, 2], 2)
    assert ends.lengths == [2, 2, 1, 1]  # of [7, 7, 7] one token is left to each count
    assert ends.sharing() == {0: [0, 1], 2: [2, 3]}
    assert alike_ends(rows, [2, 1, 1, 2], 4).lengths == [0] * 4


def test_rows_that_share_nothing_are_read_whole(tiny_qwen3: TinyModel) -> None:
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    with _tokens_read(tiny_qwen3.model) as read:
        found = _found(tiny_qwen3, Ends(rows=rows, counts=[1, 2, 3], lengths=[1, 0, 1]), 8)
    assert read == [12]
    assert [found[row].shape[0] for row in range(3)] == [1, 2, 3]
