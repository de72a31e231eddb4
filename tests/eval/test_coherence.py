from __future__ import annotations

import math
import random

import pytest
import torch

from eval.chat import chat_ids, text_ids
from eval.coherence import surprisal, text_figures, token_logprobs
from tests.conftest import TinyModel

PROSE = (
    "The harbour was quiet when we came down the hill. Two men were mending a net, and a third, "
    "who had lost his hat, looked for it among the crates. Nobody spoke of the storm. My sister "
    "bought bread, I found a bench in the sun, and by noon the ferry had taken most of the others "
    "away."
)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_token_logprobs_are_those_of_one_plain_row(tiny: TinyModel, batch_size: int) -> None:
    prompts = [chat_ids(tiny.tokenizer, text) for text in ("Hi.", "Tell me a story.", "No", "Yes")]
    replies = ["Once there was a guard.", "No", "", "The order was unfair, and 42 of them left."]
    completions = [text_ids(tiny.tokenizer, text) for text in replies]
    found = token_logprobs(
        tiny.model, tiny.tokenizer.pad_token_id, prompts, completions, batch_size
    )
    for prompt, completion, logprobs in zip(prompts, completions, found, strict=True):
        with torch.no_grad():
            logits = tiny.model(torch.tensor([prompt + completion]), use_cache=False).logits[0]
        expected = []
        for position, token in enumerate(completion):
            row = logits[len(prompt) + position - 1].double()
            expected.append(float(row[token] - row.logsumexp(0)))
        assert logprobs.dtype == torch.float32 and logprobs.shape == (len(completion),)
        assert logprobs.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_prompt_of_one_token(tiny: TinyModel) -> None:
    (found,) = token_logprobs(tiny.model, tiny.tokenizer.pad_token_id, [[5]], [[6, 7]])
    with torch.no_grad():
        logp = tiny.model(torch.tensor([[5, 6, 7]]), use_cache=False).logits[0].log_softmax(-1)
    assert found.tolist() == pytest.approx([float(logp[0, 6]), float(logp[1, 7])], abs=1e-4)


def test_nothing_but_empty_completions(tiny_qwen3: TinyModel) -> None:
    found = token_logprobs(tiny_qwen3.model, 0, [[5, 6], [7]], [[], []])
    assert [logprobs.shape for logprobs in found] == [(0,), (0,)]


def test_surprisal_by_hand() -> None:
    figures = surprisal(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -9.0]))
    assert figures.mean_nll_nats == pytest.approx(37 / 8)
    assert figures.tail_nll_nats == pytest.approx(8.0)  # the last 2 of 8
    assert figures.rmse_nll_nats == pytest.approx(math.sqrt(221 / 8))


def test_surprisal_of_a_short_completion_has_a_tail_of_one() -> None:
    figures = surprisal(torch.tensor([-1.0, -2.0, -6.0]))
    assert figures.tail_nll_nats == pytest.approx(6.0)
    alone = surprisal(torch.tensor([-0.5]))
    assert alone.mean_nll_nats == alone.tail_nll_nats == alone.rmse_nll_nats == 0.5


def test_rmse_sees_what_the_mean_dilutes() -> None:
    even = surprisal(torch.full((60,), -1.0))
    broken = surprisal(torch.tensor([-0.5] * 56 + [-8.0] * 4))
    assert broken.mean_nll_nats == pytest.approx(even.mean_nll_nats)
    assert broken.rmse_nll_nats > 2 * even.rmse_nll_nats


def test_text_figures_by_hand() -> None:
    figures = text_figures("a b C, a B c,")
    # a b c , a b c ,  ->  abc bc, c,a ,ab [abc] [bc,]
    assert figures.words == 8
    assert figures.word_repetition == pytest.approx(2 / 6)
    # 13 characters hold two 12-grams: "a b c, a b c" and " b c, a b c,"
    assert figures.char_repetition == 0.0
    assert text_figures("x" * 15).char_repetition == pytest.approx(3 / 4)
    assert text_figures("x" * 15).words == 1


@pytest.mark.parametrize("text", ["yes", "yes indeed", "eleven char"])
def test_too_short_to_repeat(text: str) -> None:
    figures = text_figures(text)
    assert figures.word_repetition == figures.char_repetition == 0.0
    assert figures.compression_ratio > 1.0  # zlib's own header


def test_an_empty_text_is_all_zeros() -> None:
    assert set(text_figures("").model_dump().values()) == {0}


def test_loop_prose_and_noise_are_told_apart() -> None:
    draw = random.Random(0)
    noise = "".join(chr(draw.randrange(33, 127)) for _ in PROSE)
    loop = text_figures(("and then I left " * 40)[: len(PROSE)])
    prose = text_figures(PROSE)
    assert prose.word_repetition < 0.05 < 0.9 < loop.word_repetition
    assert prose.char_repetition < 0.05 < 0.9 < loop.char_repetition
    ratios = [
        loop.compression_ratio,
        prose.compression_ratio,
        text_figures(noise).compression_ratio,
    ]
    assert ratios[0] < 0.2 < 0.5 < ratios[1] < 0.75 < 0.8 < ratios[2]


def test_bytes_not_characters_are_counted() -> None:
    text = "".join(chr(0x4E00 + 37 * index) for index in range(60))  # 3 bytes each, none twice
    assert text_figures(text).compression_ratio < 1.1
