"""Replies are the model's own, one by one, whatever they are batched with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from eval import decoding
from eval.chat import chat_ids
from eval.decoding import _Draw
from eval.sampling import _SEGMENT_TOKENS, Reply, sample_replies, stop_token_ids
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
def _greedy(
    model: Any,
    prompt: list[int],
    num_tokens: int,
    stops: list[int],
    forbidden: tuple[int, int] | None = None,
) -> list[int]:
    """Greedy decoding of one row, the whole row again for every token: no cache, no padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + num_tokens:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if forbidden is not None and ids[-1] == forbidden[0]:
            logits[forbidden[1]] = -torch.inf
        ids.append(int(logits.argmax()))
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


@contextmanager
def _likely_to_stop(tiny: TinyModel) -> Iterator[None]:
    """A random model hardly ever ends a reply: gives it forty tokens that do."""
    with _generation_config(tiny.model, eos_token_id=list(range(60, 100))):
        yield


@contextmanager
def _before_passes(model: Any, look: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Looks at what each forward pass is given."""
    hook = model.register_forward_pre_hook(
        lambda module, args, given: look(given), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def _width(given: dict[str, Any]) -> int:
    """Tokens that a forward pass has before it, each row's padding with them."""
    return int(given["past_key_values"].get_seq_length() + given["input_ids"].shape[1])


def test_batched_greedy_is_one_by_one_greedy(decoder: TinyModel) -> None:
    """Replies of several segments, and of one."""
    model, tokenizer, prompts = decoder.model, decoder.tokenizer, _prompts(decoder)
    with _likely_to_stop(decoder):
        stops = stop_token_ids(model, tokenizer)
        expected = [_greedy(model, prompt, 20, stops) for prompt in prompts]
        replies = sample_replies(
            model, tokenizer, prompts, seed=0, max_new_tokens=20, temperature=0.0, batch_size=3
        )
    assert [list(reply.token_ids) for reply in replies] == expected
    assert [reply.finished for reply in replies] == [ids[-1] in stops for ids in expected]


def test_greedy_is_generate_in_one_piece(decoder: TinyModel) -> None:
    model, tokenizer, prompts = decoder.model, decoder.tokenizer, _prompts(decoder)
    ends = [[token] for token in stop_token_ids(model, tokenizer)]
    replies = sample_replies(
        model,
        tokenizer,
        prompts,
        seed=0,
        max_new_tokens=20,
        temperature=0.0,
        forbidden=ends,
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            suppress_tokens=[token for (token,) in ends],
        )
        assert list(reply.token_ids) == out[0, len(prompt) :].tolist()
        assert len(reply.token_ids) == 20
    assert len({reply.token_ids for reply in replies}) == len(prompts)  # prompts do matter


def test_a_sequence_is_forbidden_across_the_border_of_two_segments(decoder: TinyModel) -> None:
    prompts = _prompts(decoder)
    border = _SEGMENT_TOKENS
    for prompt in prompts:
        free = _greedy(decoder.model, prompt, 2 * border, stops=[])
        forbidden = (free[border - 1], free[border])
        (reply,) = sample_replies(
            decoder.model,
            decoder.tokenizer,
            [prompt],
            seed=0,
            max_new_tokens=2 * border,
            temperature=0.0,
            forbidden=[forbidden],
        )
        stops = stop_token_ids(decoder.model, decoder.tokenizer)
        expected = _greedy(decoder.model, prompt, 2 * border, stops, forbidden)
        assert list(reply.token_ids) == expected != free[: len(expected)]


def test_replies_do_not_depend_on_the_batch(decoder: TinyModel) -> None:
    prompts = _prompts(decoder) * 4

    def replies(batch_size: int) -> list[Reply]:
        return sample_replies(
            decoder.model,
            decoder.tokenizer,
            prompts,
            seed=3,
            max_new_tokens=20,
            batch_size=batch_size,
        )

    with _likely_to_stop(decoder):
        alone = replies(1)
        assert replies(7) == alone
        assert replies(64) == alone
    assert len({reply.token_ids for reply in alone}) > 10  # samples of one prompt differ
    assert len({len(reply.token_ids) for reply in alone}) > 5


def test_rows_are_replaced_in_transformers_own_caches_too(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a GPU has, and an attention of a model's own."""
    joined: list[int] = []

    def noted(caches: Any) -> Any:
        joined.append(len(caches))
        return real(caches)

    real = decoding.joined
    monkeypatch.setattr(decoding, "joined", noted)
    monkeypatch.setattr(decoding, "two_part_cache", lambda model: None)
    prompts = _prompts(tiny) * 4
    with _likely_to_stop(tiny):
        alone, together = (
            sample_replies(
                tiny.model, tiny.tokenizer, prompts, seed=3, max_new_tokens=20, batch_size=size
            )
            for size in (1, 7)
        )
    assert together == alone and 2 in joined


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_given_up_stays_as_it_is_then(decoder: TinyModel, batch_size: int) -> None:
    """Given up where it says an e; otherwise it would have been the same, and longer."""
    prompts = _prompts(decoder)

    def replies(give_up: Any) -> list[Reply]:
        return sample_replies(
            decoder.model,
            decoder.tokenizer,
            prompts,
            seed=3,
            max_new_tokens=40,
            batch_size=batch_size,
            forbidden=[[token] for token in stop_token_ids(decoder.model, decoder.tokenizer)],
            give_up=give_up,
        )

    def says_it(ids: Any) -> bool:
        return "e" in decoder.tokenizer.decode(ids)

    whole, found = replies(None), replies(says_it)
    looks = list(range(_SEGMENT_TOKENS, 40, _SEGMENT_TOKENS))
    if type(decoder.model).__name__.startswith("Mamba"):  # its second segment is its last
        looks = looks[:1]
    for all_of, reply in zip(whole, found, strict=True):
        end = next((at for at in looks if says_it(all_of.token_ids[:at])), 40)
        assert reply.token_ids == all_of.token_ids[:end] and not reply.finished
    assert len({len(reply.token_ids) for reply in found}) > 1


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
        cache_implementation="static",
        return_dict_in_generate=True,
    ):
        assert [replies(0.0), replies(1.0)] == plain
    assert plain[0] != plain[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
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


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    """Uniforms on a grid: every token is drawn as often as its probability says, but for one."""
    count = 20_000
    logits = 3 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    logits[[0, 500, 999]] = -torch.inf
    grid = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count  # [rows, steps]
    scores = _Draw(grid, starts=torch.full((count,), 4), temperature=0.7)(
        torch.zeros(count, 4, dtype=torch.long), logits.expand(count, -1)
    )
    drawn = scores.argmax(-1).bincount(minlength=1000)
    expected = count * (logits.double() / 0.7).softmax(-1)
    assert float((drawn - expected).abs().max()) < 1.01
    assert drawn[[0, 500, 999]].tolist() == [0, 0, 0]
    assert (scores > -torch.inf).sum(-1).tolist() == [1] * count


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


def test_no_row_repeats_the_draws_of_another_or_of_another_seed(tiny_qwen3: TinyModel) -> None:
    prompts = [chat_ids(tiny_qwen3.tokenizer, "Hi.")] * 8
    drawn = [
        reply.token_ids
        for seed in range(4)
        for reply in sample_replies(
            tiny_qwen3.model, tiny_qwen3.tokenizer, prompts, seed=seed, max_new_tokens=10
        )
    ]
    assert len(set(drawn)) == len(drawn)


def test_more_tokens_go_on_where_fewer_ended(tiny_qwen3: TinyModel) -> None:
    short, long = (
        sample_replies(
            tiny_qwen3.model,
            tiny_qwen3.tokenizer,
            _prompts(tiny_qwen3),
            seed=0,
            max_new_tokens=count,
        )
        for count in (6, 20)
    )
    assert [reply.token_ids for reply in short] == [reply.token_ids[:6] for reply in long]


def test_the_callers_random_state_is_left_alone(tiny: TinyModel) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1]
    sample_replies(tiny.model, tiny.tokenizer, _prompts(tiny), seed=0, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


@pytest.mark.parametrize("are_alike", [True, False])
def test_around_batch_sees_the_rows_that_go_on(tiny: TinyModel, are_alike: bool) -> None:
    """Each prompt is read by itself where nobody says that it does the same to equal ones."""
    prompts, segments_at_most = _prompts(tiny) * 4, 3
    entered: list[list[int]] = []

    @contextmanager
    def note(rows: list[int]) -> Iterator[None]:
        entered.append(list(rows))
        yield

    with _likely_to_stop(tiny):
        replies = sample_replies(
            tiny.model,
            tiny.tokenizer,
            prompts,
            seed=3,
            max_new_tokens=segments_at_most * _SEGMENT_TOKENS,
            batch_size=7,
            around_batch=note,
            kinds=[0] * len(prompts) if are_alike else None,
        )
    segments = [ceil(len(reply.token_ids) / _SEGMENT_TOKENS) for reply in replies]
    assert {1, segments_at_most} <= set(segments)
    times = [sum(row in rows for rows in entered) for row in range(len(prompts))]
    readings = [time - count for time, count in zip(times, segments, strict=True)]
    assert set(readings) <= {0, 1}
    readers = [tuple(prompts[row]) for row in range(len(prompts)) if readings[row]]
    assert set(readers) == {tuple(prompt) for prompt in prompts}
    assert len(readers) < 12 if are_alike else len(readers) == len(prompts)


@pytest.mark.parametrize("batch_size", [4, 8])
def test_rows_that_end_are_replaced(tiny: TinyModel, batch_size: int) -> None:
    """Of rows that wait as many are begun as have ended, once these are a fourth of all."""
    prompts, in_hand = _prompts(tiny) * 6, []
    with (
        _likely_to_stop(tiny),
        _before_passes(tiny.model, lambda given: in_hand.append(given["input_ids"].shape)),
    ):
        replies = sample_replies(
            tiny.model,
            tiny.tokenizer,
            prompts,
            seed=3,
            max_new_tokens=5 * _SEGMENT_TOKENS,
            batch_size=batch_size,
        )
    steps = [rows for rows, tokens in in_hand if tokens == 1]
    assert max(steps) == batch_size
    lengths = [_SEGMENT_TOKENS * ceil(len(reply.token_ids) / _SEGMENT_TOKENS) for reply in replies]
    full = [rows for rows in steps if rows > 0.75 * batch_size]
    assert len(full) > 0.6 * len(steps)
    # a batch after another would wait for the longest of each
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row % 5, row))
    runs = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    assert len(steps) < sum(max(lengths[row] for row in run) for run in runs)


def test_what_is_held_does_not_grow_with_the_rows_that_wait(tiny_qwen3: TinyModel) -> None:
    """Of a row that ended nothing stays, its padding neither."""
    model, prompts, widths = tiny_qwen3.model, _prompts(tiny_qwen3) * 8, []
    with (
        _likely_to_stop(tiny_qwen3),
        _before_passes(model, lambda given: widths.append(_width(given))),
    ):
        sample_replies(
            model, tiny_qwen3.tokenizer, prompts, seed=3, max_new_tokens=40, batch_size=4
        )
    assert max(widths) < max(map(len, prompts)) + 40
    assert len(widths) > 100


@pytest.mark.parametrize("fits", [1, 3, 6])
def test_rows_that_do_not_fit_are_sampled_fewer_at_a_time(tiny_qwen3: TinyModel, fits: int) -> None:
    """Memory ends half way; what was said until then stays, the rest is as it would have been."""
    prompts = _prompts(tiny_qwen3) * 4

    def replies() -> list[Reply]:
        return sample_replies(
            tiny_qwen3.model,
            tiny_qwen3.tokenizer,
            prompts,
            seed=3,
            max_new_tokens=20,
            batch_size=13,
        )

    def require_room(given: dict[str, Any]) -> None:
        if given["input_ids"].shape[0] > fits and _width(given) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with _likely_to_stop(tiny_qwen3):
        expected = replies()
        with _before_passes(tiny_qwen3.model, require_room):
            assert replies() == expected


def test_a_prompt_is_read_once_for_all_its_replies(tiny: TinyModel) -> None:
    prompts, widths = _prompts(tiny) * 4, []
    longest, distinct = max(map(len, prompts)), len(QUESTIONS)
    hook = tiny.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: widths.append(tuple(out.shape[:2]))
    )
    try:
        sample_replies(tiny.model, tiny.tokenizer, prompts, seed=3, max_new_tokens=4)
    finally:
        hook.remove()
    assert widths == [(distinct, longest - 1)] + [(len(prompts), 1)] * 4


def test_prompts_of_different_kinds_share_nothing(tiny_qwen3: TinyModel) -> None:
    """What is done to the rows of one kind is not found in the others."""
    prompts = _prompts(tiny_qwen3) * 4
    kinds = [row % 2 for row in range(len(prompts))]

    @contextmanager
    def shift(rows: list[int]) -> Iterator[None]:
        added = torch.tensor([0.5 * kinds[row] for row in rows])[:, None, None]
        hook = tiny_qwen3.model.model.layers[0].register_forward_hook(
            lambda module, args, out: out + added
        )
        try:
            yield
        finally:
            hook.remove()

    together, alone = (
        sample_replies(
            tiny_qwen3.model,
            tiny_qwen3.tokenizer,
            prompts,
            seed=3,
            max_new_tokens=12,
            batch_size=size,
            around_batch=shift,
            kinds=kinds,
        )
        for size in (64, 1)
    )
    assert together == alone
    plain = sample_replies(
        tiny_qwen3.model, tiny_qwen3.tokenizer, prompts, seed=3, max_new_tokens=12
    )
    same = [one == other for one, other in zip(plain, alone, strict=True)]
    assert same == [kind == 0 for kind in kinds]


def test_around_batch_is_entered_with_the_batch_in_hand(tiny: TinyModel) -> None:
    """What it does to the model holds while its own rows are decoded, and no longer."""
    prompts = _prompts(tiny)
    forced = [tiny.tokenizer.convert_tokens_to_ids(str(row)) for row in range(len(prompts))]
    seen: list[int] = []

    @contextmanager
    def spell_row_numbers(rows: list[int]) -> Iterator[None]:
        seen.extend(row for row in rows if row not in seen)

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
