from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from eval.chat import chat_ids
from eval.sampling import Reply, sample_replies, stop_token_ids
from tests.conftest import TinyModel

QUESTIONS = [
    "What is 12 plus 30?",
    "Hi.",
    "Which moral foundation is at stake when a nurse is told to leave a patient alone?",
    "What colour is grass?",
    "Count to 5.",
]


def _prompts(tiny: TinyModel) -> list[list[int]]:
    return [chat_ids(tiny.tokenizer, question) for question in QUESTIONS]


@torch.no_grad()
def _greedy(model: Any, prompt: list[int], num_tokens: int, stops: list[int]) -> list[int]:
    """Greedy decoding of one row, the whole row again for every token: no cache, no padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + num_tokens:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@contextmanager
def _generation_config(model: Any, **settings: Any) -> Iterator[None]:
    own = model.generation_config
    model.generation_config = GenerationConfig(**settings)
    try:
        yield
    finally:
        model.generation_config = own


def test_batched_greedy_is_one_by_one_greedy(tiny: TinyModel) -> None:
    prompts = _prompts(tiny)
    stops = stop_token_ids(tiny.model, tiny.tokenizer)
    expected = [_greedy(tiny.model, prompt, 12, stops) for prompt in prompts]
    replies = sample_replies(
        tiny.model,
        tiny.tokenizer,
        prompts,
        seed=0,
        max_new_tokens=12,
        temperature=0.0,
        batch_size=3,
    )
    assert [list(reply.token_ids) for reply in replies] == expected
    assert [reply.finished for reply in replies] == [ids[-1] in stops for ids in expected]
    assert len({tuple(ids) for ids in expected}) == len(prompts)  # prompts do matter


def test_end_of_turn_is_kept_and_nothing_after_it(tiny: TinyModel) -> None:
    """A token that greedy decoding reaches half way is declared an end of turn."""
    prompts = _prompts(tiny)
    endless = [_greedy(tiny.model, prompt, 12, stops=[]) for prompt in prompts]
    stop = endless[0][5]
    pad = tiny.tokenizer.pad_token_id
    with _generation_config(tiny.model, eos_token_id=[stop], pad_token_id=pad):
        stops = stop_token_ids(tiny.model, tiny.tokenizer)
        replies = sample_replies(
            tiny.model, tiny.tokenizer, prompts, seed=0, max_new_tokens=12, temperature=0.0
        )
    assert stops == sorted({stop, tiny.tokenizer.eos_token_id})
    first = replies[0]
    assert first.finished and first.token_ids[-1] == stop
    assert list(first.token_ids) == endless[0][: endless[0].index(stop) + 1]
    for reply, ids in zip(replies, endless, strict=True):
        ends = [index for index, token in enumerate(ids) if token in stops]
        cut = ids[: ends[0] + 1] if ends else ids
        assert reply == Reply(token_ids=tuple(cut), finished=bool(ends))


def test_stops_are_the_tokenizers_and_the_models(tiny: TinyModel) -> None:
    names = {
        "qwen3": ["<|im_end|>"],
        "llama": ["<|eot_id|>"],
        "gemma3": ["<eos>", "<end_of_turn>"],
    }[tiny.family]
    expected = sorted(tiny.tokenizer.convert_tokens_to_ids(name) for name in names)
    assert stop_token_ids(tiny.model, tiny.tokenizer) == expected
    with _generation_config(tiny.model, eos_token_id=7):
        eos = tiny.tokenizer.eos_token_id
        assert stop_token_ids(tiny.model, tiny.tokenizer) == sorted([7, eos])


def test_the_models_own_settings_are_not_used(tiny: TinyModel) -> None:
    prompts = _prompts(tiny)

    def replies(temperature: float) -> list[Reply]:
        return sample_replies(
            tiny.model,
            tiny.tokenizer,
            prompts,
            seed=4,
            max_new_tokens=12,
            temperature=temperature,
        )

    eos = stop_token_ids(tiny.model, tiny.tokenizer)
    pad = tiny.tokenizer.pad_token_id
    with _generation_config(tiny.model, eos_token_id=eos, pad_token_id=pad):
        plain = [replies(0.0), replies(1.0)]
    with _generation_config(
        tiny.model,
        eos_token_id=eos,
        pad_token_id=pad,
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        typical_p=0.1,
        repetition_penalty=3.0,
        no_repeat_ngram_size=2,
        min_length=500,
        return_dict_in_generate=True,
    ):
        assert [replies(0.0), replies(1.0)] == plain
    assert plain[0] != plain[1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_models_distribution(tiny: TinyModel, temperature: float) -> None:
    prompt = chat_ids(tiny.tokenizer, "Hi.")
    with torch.no_grad():
        logits = tiny.model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    expected = (logits.double() / temperature).softmax(-1)
    count = 2000
    replies = sample_replies(
        tiny.model,
        tiny.tokenizer,
        [prompt] * count,
        seed=1,
        max_new_tokens=1,
        temperature=temperature,
        batch_size=500,
    )
    drawn = torch.tensor([reply.token_ids[0] for reply in replies])
    shares = drawn.bincount(minlength=len(expected)) / count
    for token in expected.topk(8).indices.tolist():
        deviation = float((expected[token] * (1 - expected[token]) / count).sqrt())
        assert abs(float(shares[token] - expected[token])) < 4 * deviation
    unlikely = expected.argsort()[:200]  # a top-k or nucleus would leave these at zero
    assert int((shares[unlikely] > 0).sum()) > 0


def test_a_seed_gives_the_same_replies_again(tiny: TinyModel) -> None:
    prompts = _prompts(tiny)

    def replies(seed: int) -> list[Reply]:
        return sample_replies(
            tiny.model, tiny.tokenizer, prompts, seed=seed, max_new_tokens=10, batch_size=2
        )

    first = replies(3)
    torch.manual_seed(12345)  # whatever the caller's state is
    assert replies(3) == first
    assert replies(4) != first


def test_no_batch_repeats_the_draw_of_another_seeds_batch(tiny_qwen3: TinyModel) -> None:
    prompts = [chat_ids(tiny_qwen3.tokenizer, "Hi.")] * 4

    def replies(seed: int) -> list[Reply]:
        return sample_replies(
            tiny_qwen3.model,
            tiny_qwen3.tokenizer,
            prompts,
            seed=seed,
            max_new_tokens=10,
            batch_size=1,
        )

    drawn = {reply.token_ids for seed in range(4) for reply in replies(seed)}
    assert len(drawn) == 16


def test_the_callers_random_state_is_left_alone(tiny: TinyModel) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    sample_replies(tiny.model, tiny.tokenizer, _prompts(tiny), seed=0, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_around_batch_is_entered_with_the_batch_in_hand(tiny: TinyModel) -> None:
    """What it does to the model holds while its own rows are decoded, and no longer."""
    prompts = _prompts(tiny)
    forced = [tiny.tokenizer.convert_tokens_to_ids(str(row)) for row in range(len(prompts))]
    seen: list[int] = []

    @contextmanager
    def spell_row_numbers(rows: list[int]) -> Iterator[None]:
        seen.extend(rows)

        def force(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            logits = logits.clone()  # [batch, tokens, vocab]
            for index, row in enumerate(rows):
                logits[index, :, forced[row]] += 1000.0
            return logits

        hook = tiny.model.get_output_embeddings().register_forward_hook(force)
        try:
            yield
        finally:
            hook.remove()

    replies = sample_replies(
        tiny.model,
        tiny.tokenizer,
        prompts,
        seed=0,
        max_new_tokens=3,
        batch_size=2,
        around_batch=spell_row_numbers,
    )
    assert [set(reply.token_ids) for reply in replies] == [{token} for token in forced]
    lengths = [len(prompts[row]) for row in seen]
    assert sorted(seen) == list(range(len(prompts))) and lengths == sorted(lengths, reverse=True)
    assert not tiny.model.get_output_embeddings()._forward_hooks


def test_what_was_said_is_the_reply_without_its_end() -> None:
    assert Reply(token_ids=(5, 6, 2), finished=True).said == (5, 6)
    assert Reply(token_ids=(5, 6, 2), finished=False).said == (5, 6, 2)
