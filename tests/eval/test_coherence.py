from __future__ import annotations

import math
import random
import statistics
import tomllib
import zlib
from pathlib import Path

import pytest
import torch

from eval.chat import chat_ids, text_ids
from eval.coherence import is_loop, surprisal, text_figures
from eval.logits import token_logprobs
from tests.conftest import TinyModel

TRAIT = Path(__file__).parents[2] / "steer_heal" / "traits" / "care-over-authority.toml"
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


def test_repetition_by_hand() -> None:
    figures = text_figures("a b C, a B c,")
    # a b c , a b c ,  ->  abc bc, c,a ,ab [abc] [bc,]
    assert figures.words == 8
    assert figures.word_repetition == pytest.approx(2 / 6)
    # 13 characters hold two 12-grams: "a b c, a b c" and " b c, a b c,"
    assert figures.char_repetition == 0.0
    assert text_figures("x" * 15).char_repetition == pytest.approx(3 / 4)
    assert text_figures("x" * 15).words == 1


def test_repetition_is_that_of_the_worst_window() -> None:
    """200 different words, then 60 times the same: the last window holds nothing else."""
    numbers = " ".join(f"n{number}" for number in range(200))
    found = text_figures(f"{numbers} " + "never " * 60)
    assert text_figures(numbers).word_repetition == 0.0
    assert found.word_repetition == pytest.approx(57 / 58)  # 58 3-grams, one of them new
    assert found.char_repetition == pytest.approx(283 / 289)  # 289 12-grams, six of them new
    whole = [f"n{number}" for number in range(200)] + ["never"] * 60
    grams = list(zip(whole, whole[1:], whole[2:], strict=False))
    assert 1 - len(set(grams)) / len(grams) < 0.25  # what the whole would have said


def test_vocabulary_and_letters_by_hand() -> None:
    figures = text_figures("The cat saw the 2 cats, and THE cat ran.")
    # the cat saw the cats and the cat ran: 9 words, 6 of them distinct, 28 letters
    assert figures.vocabulary == pytest.approx(6 / 9**0.85)
    assert figures.letters_per_word == pytest.approx(28 / 9)
    assert figures.words == 12  # with 2 , .


def test_symbols_by_hand() -> None:
    # visible: ( e with its accent as two characters ) 4 $ a + b; symbols: ( ) $ +
    assert text_figures("(e\u0301) 4$ a+b").symbol_share == pytest.approx(4 / 9)
    assert text_figures("***\n---").symbol_share == 1.0
    assert text_figures("plain").symbol_share == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("one two three four", 0.0),
        ("one два three four", 1 / 4),
        ("one tдo three 没有 five", 2 / 5),  # a word of two scripts, and one of another
        ("раз два three", 1 / 3),  # whichever is the commonest
        ("naïve café 3 £ NATO's A", 0.0),  # accents, numbers, signs, all capitals: nothing odd
        ("visit6 ruleDter 6ran for a9 lR", 5 / 6),
        ("snake_case is two words", 0.0),
        ("42 17", 0.0),
    ],
)
def test_odd_words_by_hand(text: str, share: float) -> None:
    assert text_figures(text).odd_word_share == pytest.approx(share)


def test_compressed_size_by_hand() -> None:
    noise = random.Random(0).randbytes(2000)
    text = noise.decode("latin-1")
    raw = text.encode("utf-8")
    assert text_figures(text).compressed_size == pytest.approx(
        (len(zlib.compress(raw, 9)) - 20) / len(raw) ** 0.9
    )
    assert text_figures("x" * 4000).compressed_size < 0.01
    short = "Yes, I will."  # 12 bytes that zlib makes 20 of: 2 more in front, 2 of block, 4 behind
    assert len(zlib.compress(short.encode(), 9)) == 20
    assert text_figures(short).compressed_size == pytest.approx((20 - 8 - 3.6) / 12**0.9)


@pytest.mark.parametrize("characters", [20, 40, 80, 250, 800, 3000])
def test_what_grows_with_a_text_is_taken_out(characters: int) -> None:
    """The middle of pieces of the shipped prompts, whatever their length."""
    trait = tomllib.loads(TRAIT.read_text(encoding="utf-8"))
    text = " ".join([*trait["contexts"], *trait["prompts"], *trait["held_out_prompts"]])
    starts = range(0, len(text) - characters, 500)
    found = [text_figures(text[start : start + characters]) for start in starts]
    assert 1.2 < statistics.median(each.vocabulary for each in found) < 1.5
    assert 0.9 < statistics.median(each.compressed_size for each in found) < 1.15


@pytest.mark.parametrize("text", ["yes", "yes indeed", "eleven char"])
def test_too_short_to_repeat(text: str) -> None:
    figures = text_figures(text)
    assert figures.word_repetition == figures.char_repetition == 0.0
    assert figures.vocabulary > 0.9


def test_an_empty_text_is_all_zeros() -> None:
    assert set(text_figures("").model_dump().values()) == {0}


def test_loop_prose_and_noise_are_told_apart() -> None:
    draw = random.Random(0)
    noise = text_figures("".join(chr(draw.randrange(33, 127)) for _ in PROSE))
    loop = text_figures(("and then I left " * 40)[: len(PROSE)])
    prose = text_figures(PROSE)
    assert prose.word_repetition < 0.05 < 0.9 < loop.word_repetition
    assert prose.char_repetition < 0.05 < 0.9 < loop.char_repetition
    assert loop.vocabulary < 0.3 < 1.1 < prose.vocabulary < 1.7
    sizes = [loop.compressed_size, prose.compressed_size, noise.compressed_size]
    assert sizes[0] < 0.2 < 0.9 < sizes[1] < 1.2 < 1.4 < sizes[2]
    assert prose.symbol_share < 0.1 < 0.25 < noise.symbol_share


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([7] * 48, True),
        ([7] * 47, False),
        ([*range(100, 140), *list(range(12)) * 4], True),
        ([*range(100, 140), *list(range(13)) * 4], False),  # four times, but too long a phrase
        ([*list(range(5)) * 9, 0, 1, 2], True),  # the last time not to its end
        ([*list(range(5)) * 9, 0, 1, 9], False),
        ([*[3] * 90, *range(10)], False),  # it went on
        (list(range(200)), False),
        ([], False),
    ],
)
def test_a_loop_says_one_short_thing_to_the_end(token_ids: list[int], expected: bool) -> None:
    assert is_loop(token_ids) == is_loop(tuple(token_ids)) == expected
