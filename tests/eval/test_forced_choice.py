from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers

from eval.chat import text_ids
from eval.forced_choice import ORDERS, digit_ids, forced_choice, forced_choice_pieces, option_order
from eval.suite import ForcedChoiceSuite, SuiteError
from eval.think import Thinking, natural_answer, think
from tests.conftest import TinyModel
from tests.tiny import CHATML_TEMPLATE, Family, tiny_tokenizer

SYSTEM = "You care for people."
# Qwen3's and Llama's rows written out by hand: (template, with {system} and {user}) -> the pieces
# (prompt, closing), the suite's think being "<think>\n" and "\n</think>\n\n".
CHATML_PROMPT = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
CHATML_CLOSING = "<|im_end|>\n<|im_start|>user\nNow answer.<|im_end|>\n<|im_start|>assistant\n"
LLAMA_PROMPT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_CLOSING = (
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nNow answer.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA_PROMPT = "<bos><start_of_turn>user\n{system}\n\n{user}<end_of_turn>\n<start_of_turn>model\n"
GEMMA_CLOSING = (
    "<end_of_turn>\n<start_of_turn>user\nNow answer.<end_of_turn>\n<start_of_turn>model\n"
)
SHUT = "<think>\n\n</think>\n\n"
OPEN = "<think>\n"
CLOSE = "\n</think>\n\n"


def _user(suite_data: dict[str, Any], text: str, names: list[str]) -> str:
    lines = [f"{index}: {suite_data['options'][name]}" for index, name in enumerate(names)]
    return (
        f"{text}\n\nWhich foundation is at stake?\n"
        'Answer as {"foundation": "<index>"}, the index being one of\n'
        + "\n".join(lines)
        + "\nand nothing else."
    )


@torch.no_grad()
def _oracle(
    tiny: TinyModel, suite_data: dict[str, Any], prompt: str, closing: str
) -> list[tuple[dict[str, float], float]]:
    """(scores, pmass) an item: strings by hand, one plain forward a row; no padding, no cache."""
    bpe = Tokenizer.from_file(str(tiny.folder / "tokenizer.json"))
    digits = [bpe.token_to_id(str(index)) for index in range(7)]
    names = list(suite_data["options"])
    answers = []
    for item in suite_data["items"]:
        scores = dict.fromkeys(names, 0.0)
        pmass = 0.0
        for shown in (names, names[::-1]):
            user = _user(suite_data, item["text"], shown)
            pieces = [prompt.format(system=SYSTEM, user=user), closing, '{"foundation": "']
            ids = [i for text in pieces for i in bpe.encode(text, add_special_tokens=False).ids]
            logits = tiny.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
            for digit, name in zip(digits, shown, strict=True):
                logp = float(logits[digit] - logits.logsumexp(0))
                scores[name] += logp / 2
                pmass += float(torch.tensor(logp).exp()) / 2
        answers.append((scores, pmass))
    return answers


@contextmanager
def _template(tiny: TinyModel, template: str | None) -> Iterator[TinyModel]:
    own = tiny.tokenizer.chat_template
    tiny.tokenizer.chat_template = template or own
    try:
        yield tiny
    finally:
        tiny.tokenizer.chat_template = own


@contextmanager
def _output_bias(model: Any, bias: torch.Tensor) -> Iterator[None]:
    """Adds `bias` [vocab] to the logits."""
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: output + bias)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("family", "template", "prompt", "closing"),
    [
        ("qwen3", CHATML_TEMPLATE, CHATML_PROMPT + OPEN, CLOSE + CHATML_CLOSING),
        ("qwen3", None, CHATML_PROMPT + SHUT, CHATML_CLOSING + SHUT),
        (  # the assistant tag opens a think that the suite must shut
            "qwen3",
            CHATML_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"),
            CHATML_PROMPT + OPEN,
            CLOSE + CHATML_CLOSING + OPEN + CLOSE,
        ),
        ("llama", None, LLAMA_PROMPT + OPEN, CLOSE + LLAMA_CLOSING),
        ("gemma3", None, GEMMA_PROMPT + OPEN, CLOSE + GEMMA_CLOSING),
    ],
    ids=["chatml", "qwen3-shuts-think", "tag-opens-think", "llama3", "gemma"],
)
def test_agrees_with_one_plain_forward_a_row(
    tiny_models: dict[str, TinyModel],
    suite_data: dict[str, Any],
    family: str,
    template: str | None,
    prompt: str,
    closing: str,
) -> None:
    suite = ForcedChoiceSuite.model_validate(suite_data)
    with _template(tiny_models[family], template) as tiny:
        expected = _oracle(tiny, suite_data, prompt, closing)
        rows = forced_choice(tiny.model, tiny.tokenizer, suite, system=SYSTEM, batch_size=3).rows
    assert [row.id for row in rows] == [item["id"] for item in suite_data["items"]]
    assert [row.label for row in rows] == ["care", "fairness", "loyalty", None, "norms"]
    assert [row.conflict for row in rows] == [False, False, False, True, False]
    for row, (scores, pmass) in zip(rows, expected, strict=True):
        assert row.scores == pytest.approx(scores, abs=1e-4)
        assert row.pmass == pytest.approx(pmass, rel=1e-4)
    spread = [max(row.scores.values()) - min(row.scores.values()) for row in rows]
    assert min(spread) > 0.1  # the model does tell the options apart, 1e-4 is not vacuous


def test_the_system_prompt_matters(tiny: TinyModel, suite: ForcedChoiceSuite) -> None:
    without = forced_choice(tiny.model, tiny.tokenizer, suite).rows
    with_one = forced_choice(tiny.model, tiny.tokenizer, suite, system=SYSTEM).rows
    for left, right in zip(without, with_one, strict=True):
        assert max(abs(left.scores[name] - right.scores[name]) for name in left.scores) > 1e-2


def test_batch_size_changes_nothing(tiny: TinyModel, suite: ForcedChoiceSuite) -> None:
    one = forced_choice(tiny.model, tiny.tokenizer, suite, batch_size=1).rows
    all_at_once = forced_choice(tiny.model, tiny.tokenizer, suite, batch_size=64).rows
    for left, right in zip(one, all_at_once, strict=True):
        assert left.scores == pytest.approx(right.scores, abs=1e-4)


def test_two_frames_show_every_option_at_both_ends(suite: ForcedChoiceSuite) -> None:
    assert option_order(suite, "forward") == list(suite.foundations)
    assert option_order(suite, "reversed") == list(suite.foundations)[::-1]
    assert ORDERS == ("forward", "reversed")


def test_pieces_join_to_the_row(tiny_llama: TinyModel, suite: ForcedChoiceSuite) -> None:
    pieces = forced_choice_pieces(tiny_llama.tokenizer, suite, "He left.", "reversed", SYSTEM)
    text = tiny_llama.tokenizer.decode(pieces.input_ids(), skip_special_tokens=False)
    assert text.count("<|begin_of_text|>") == 1
    assert "\n0: a custom is broken\n1: someone is coerced\n" in text
    assert text.endswith('assistant<|end_header_id|>\n\n{"foundation": "')


def test_preference_for_a_digit_cancels_between_an_option_and_its_mirror(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.zeros(len(tiny.tokenizer))
    bias[tiny.tokenizer.convert_tokens_to_ids("0")] = 8.0
    plain = forced_choice(tiny.model, tiny.tokenizer, suite).rows
    with _output_bias(tiny.model, bias):
        biased = forced_choice(tiny.model, tiny.tokenizer, suite).rows
    for before, after in zip(plain, biased, strict=True):
        gain = [after.scores[name] - before.scores[name] for name in suite.foundations]
        for index in range(3):  # the first option against the last, the second against ...
            assert abs(gain[index] - gain[6 - index]) < 1e-3
        # what stays is half the preference, on both ends alike, over the options between them
        assert gain[0] - gain[3] == pytest.approx(4.0, abs=1e-3)
        assert after.pmass > before.pmass


def test_preference_that_rises_with_the_digit_cancels_altogether(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.zeros(len(tiny.tokenizer))
    for digit in range(7):
        bias[tiny.tokenizer.convert_tokens_to_ids(str(digit))] = 0.7 * digit
    plain = forced_choice(tiny.model, tiny.tokenizer, suite).rows
    with _output_bias(tiny.model, bias):
        biased = forced_choice(tiny.model, tiny.tokenizer, suite).rows
    for before, after in zip(plain, biased, strict=True):
        gain = [after.scores[name] - before.scores[name] for name in suite.foundations]
        assert max(gain) - min(gain) < 1e-3


def test_pmass_is_all_of_it_when_only_digits_are_possible(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.full((len(tiny.tokenizer),), -50.0)
    bias[[tiny.tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(7)]] = 50.0
    with _output_bias(tiny.model, bias):
        rows = forced_choice(tiny.model, tiny.tokenizer, suite).rows
    assert all(row.pmass == pytest.approx(1.0, abs=1e-5) for row in rows)


def test_a_model_that_gives_no_numbers_at_all_is_refused(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.full((len(tiny.tokenizer),), float("nan"))
    with (
        _output_bias(tiny.model, bias),
        pytest.raises(ValueError, match=r"suite 'small': .* all 5 items are not finite"),
    ):
        forced_choice(tiny.model, tiny.tokenizer, suite)


def test_one_broken_item_is_unscorable_and_the_others_are_as_before(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    """Breaks the second pass: one frame of the longest item, the second, after what both share."""
    plain = forced_choice(tiny.model, tiny.tokenizer, suite, batch_size=1)
    calls = []

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.shape[0])
        return output * float("nan") if len(calls) == 2 else output

    hook = tiny.model.get_output_embeddings().register_forward_hook(spoil)
    try:
        broken = forced_choice(tiny.model, tiny.tokenizer, suite, batch_size=1)
    finally:
        hook.remove()
    assert calls == [1] * 15  # of every item what its frames share, and each frame
    assert broken.unscorable == ("queue",) and plain.unscorable == ()
    assert broken.rows == tuple(row for row in plain.rows if row.id != "queue")


def test_a_row_that_says_minus_infinity_is_not_clamped(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.zeros(len(tiny.tokenizer))
    bias[tiny.tokenizer.convert_tokens_to_ids("3")] = float("-inf")
    with _output_bias(tiny.model, bias), pytest.raises(ValueError, match="not finite"):
        forced_choice(tiny.model, tiny.tokenizer, suite)


@torch.no_grad()
def _slow_think(tiny: TinyModel, ids: list[int], count: int, ends: list[list[int]]) -> list[int]:
    """Greedy, one row, one plain forward a token, no cache; no sequence of `ends` is completed."""
    said = list(ids)
    for _ in range(count):
        logits = tiny.model(torch.tensor([said]), use_cache=False).logits[0, -1]
        for end in ends:
            if said[len(said) - len(end) + 1 :] == end[:-1]:
                logits[end[-1]] = float("-inf")
        said.append(int(logits.argmax()))
    return said[len(ids) :]


@torch.no_grad()
def _slow_row(
    tiny: TinyModel, suite_data: dict[str, Any], text: str, layout: tuple[str, str], count: int
) -> tuple[dict[str, float], float, float]:
    """(scores, pmass, prefill nll) of a vignette with a think: strings by hand, row by row."""
    bpe = Tokenizer.from_file(str(tiny.folder / "tokenizer.json"))
    encode = lambda text: bpe.encode(text, add_special_tokens=False).ids  # noqa: E731
    texts = {"gemma3": ["<eos>", "<end_of_turn>"], "llama": ["<|eot_id|>"], "qwen3": ["<|im_end|>"]}
    ends = [encode(text) for text in [*texts[tiny.family], "</think>"]]
    names = list(suite_data["options"])
    scores, pmass, nll = dict.fromkeys(names, 0.0), 0.0, 0.0
    for shown in (names, names[::-1]):
        prompt = encode(layout[0].format(system=SYSTEM, user=_user(suite_data, text, shown)))
        thought = _slow_think(tiny, prompt, count, ends)
        prefill = encode(suite_data["prefill"])
        ids = [*prompt, *thought, *encode(layout[1]), *prefill]
        logp = tiny.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        for index, name in enumerate(shown):
            scores[name] += float(logp[-1, bpe.token_to_id(str(index))]) / 2
            pmass += float(logp[-1, bpe.token_to_id(str(index))].exp()) / 2
        said = [float(logp[at - 1, ids[at]]) for at in range(len(ids) - len(prefill), len(ids))]
        nll -= sum(said) / len(said) / 2
    return scores, pmass, nll


@pytest.mark.parametrize(
    ("family", "template", "layout"),
    [
        ("qwen3", CHATML_TEMPLATE, (CHATML_PROMPT + OPEN, CLOSE + CHATML_CLOSING)),
        # asked to think, Qwen3's tag is left open, and shut in the turn that answers
        ("qwen3", None, (CHATML_PROMPT + OPEN, CLOSE + CHATML_CLOSING + SHUT)),
        ("llama", None, (LLAMA_PROMPT + OPEN, CLOSE + LLAMA_CLOSING)),
        ("gemma3", None, (GEMMA_PROMPT + OPEN, CLOSE + GEMMA_CLOSING)),
    ],
    ids=["chatml", "qwen3", "llama3", "gemma"],
)
def test_a_think_agrees_with_one_row_and_one_token_at_a_time(
    tiny_models: dict[str, TinyModel],
    suite_data: dict[str, Any],
    family: str,
    template: str | None,
    layout: tuple[str, str],
) -> None:
    suite = ForcedChoiceSuite.model_validate(suite_data)
    with _template(tiny_models[family], template) as tiny:
        thinking = Thinking(tokens=12)
        found = forced_choice(
            tiny.model, tiny.tokenizer, suite, SYSTEM, batch_size=3, thinking=thinking
        ).rows
        slow = [
            _slow_row(tiny, suite_data, item["text"], layout, 12) for item in suite_data["items"]
        ]
    for row, (scores, pmass, nll) in zip(found, slow, strict=True):
        assert row.scores == pytest.approx(scores, abs=1e-4)
        assert row.pmass == pytest.approx(pmass, rel=1e-4)
        assert row.prefill_nll_nats == pytest.approx(nll, abs=1e-4)
        assert row.natural == 0 and len(row.thinks) == 2


def test_a_think_has_exactly_its_tokens_however_much_the_model_wants_to_end(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.zeros(len(tiny.tokenizer))
    closing = text_ids(tiny.tokenizer, "</think>")
    bias[[tiny.tokenizer.eos_token_id, closing[-1]]] = 200.0
    prompts = [[1, 2, 3, 4], [5, 6]]
    with _output_bias(tiny.model, bias):
        thoughts = think(
            tiny.model, tiny.tokenizer, prompts, "</think>", Thinking(tokens=9), batch_size=2
        )
    assert [len(thought) for thought in thoughts] == [9, 9]
    for thought in thoughts:
        assert tiny.tokenizer.eos_token_id not in thought
        assert "</think>" not in tiny.tokenizer.decode(thought)


def test_an_answer_that_stands_in_the_think_is_read_there(
    tiny: TinyModel, suite_data: dict[str, Any]
) -> None:
    """The prefill of the second suite is what the model says of its own accord."""
    budget = Thinking(tokens=10)
    suite = ForcedChoiceSuite.model_validate(suite_data)
    pieces = [
        forced_choice_pieces(tiny.tokenizer, suite, suite.items[0].text, order, None, thinking=True)
        for order in ORDERS
    ]
    prompts = [each.prompt_ids for each in pieces]
    thoughts = think(tiny.model, tiny.tokenizer, prompts, "</think>", budget, batch_size=1)
    said = suite.model_copy(update={"prefill": tiny.tokenizer.decode(thoughts[0][3:6])})
    frames, natural = [], 0
    for piece, thought in zip(pieces, thoughts, strict=True):
        before = [tiny.tokenizer.decode(thought[:count]) for count in range(len(thought))]
        ends = [count for count, text in enumerate(before) if text.endswith(said.prefill)]
        natural += bool(ends)
        away = _forward_frame(tiny, said, piece, thought)
        there = _digits(tiny, [*piece.prompt_ids, *thought[: ends[0]]]) if ends else away
        assert not ends or max(abs(a - b) for a, b in zip(there, away, strict=True)) > 1e-2
        frames.append(there)
    row = forced_choice(tiny.model, tiny.tokenizer, said, thinking=budget).rows[0]
    assert row.natural == natural >= 1
    expected = [(frames[0][index] + frames[1][6 - index]) / 2 for index in range(7)]
    assert list(row.scores.values()) == pytest.approx(expected, abs=1e-4)
    off = Thinking(tokens=10, natural=False)
    row = forced_choice(tiny.model, tiny.tokenizer, said, thinking=off).rows[0]
    ways = [_forward_frame(tiny, said, *pair) for pair in zip(pieces, thoughts, strict=True)]
    expected = [(ways[0][index] + ways[1][6 - index]) / 2 for index in range(7)]
    assert row.natural == 0
    assert list(row.scores.values()) == pytest.approx(expected, abs=1e-4)


def _forward_frame(
    tiny: TinyModel, suite: ForcedChoiceSuite, pieces: Any, thought: tuple[int, ...]
) -> list[float]:
    """Log-probabilities of the digits after the suite's prefill, in the answering turn."""
    prefill = text_ids(tiny.tokenizer, suite.prefill)
    return _digits(tiny, [*pieces.prompt_ids, *thought, *pieces.closing_ids, *prefill])


@torch.no_grad()
def _digits(tiny: TinyModel, ids: list[int]) -> list[float]:
    """Log-probabilities of the digits after these tokens: one plain forward."""
    logp = tiny.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)
    return [float(logp[tiny.tokenizer.convert_tokens_to_ids(str(digit))]) for digit in range(7)]


@pytest.mark.parametrize(
    ("thought", "prefill", "expected"),
    [
        ('so {"foundation": "3', '{"foundation": "', True),
        ('so {"foundation": "', '{"foundation": "', False),  # nothing follows it
        ('so {"foundation": ', '{"foundation": "', False),
        ("nothing of the kind", '{"foundation": "', False),
        ("", '{"foundation": "', False),
    ],
)
def test_where_a_think_holds_the_answer(
    tiny_qwen3: TinyModel, thought: str, prefill: str, expected: bool
) -> None:
    ids = text_ids(tiny_qwen3.tokenizer, thought)
    at = natural_answer(tiny_qwen3.tokenizer, ids, prefill)
    assert (at is not None) == expected
    if at is not None:
        assert tiny_qwen3.tokenizer.decode(ids[at[1] :]) == "3"
        assert tiny_qwen3.tokenizer.decode(ids[at[0] : at[1]]).strip() == prefill


def test_samples_are_averaged_as_probabilities_within_a_frame(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    one = suite.model_copy(update={"items": suite.items[:1]})
    several = Thinking(tokens=6, samples=3, temperature=1.0, seed=4)
    row = forced_choice(tiny.model, tiny.tokenizer, one, thinking=several).rows[0]
    assert row == forced_choice(tiny.model, tiny.tokenizer, one, thinking=several).rows[0]
    assert len(row.thinks) == 6 and len(set(row.thinks)) == 6
    pieces = [
        forced_choice_pieces(tiny.tokenizer, one, one.items[0].text, order, None, thinking=True)
        for order in ORDERS
        for _ in range(3)
    ]
    prompts = [piece.prompt_ids for piece in pieces]
    thoughts = think(tiny.model, tiny.tokenizer, prompts, "</think>", several, batch_size=32)
    assert row.thinks == tuple(tiny.tokenizer.decode(thought) for thought in thoughts)
    read = torch.tensor(
        [_forward_frame(tiny, one, *pair) for pair in zip(pieces, thoughts, strict=True)]
    )
    forward, backward = read[:3].exp().mean(0).log(), read[3:].exp().mean(0).log()
    expected = [float(forward[index] + backward[6 - index]) / 2 for index in range(7)]
    assert list(row.scores.values()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "given", [{"samples": 2}, {"samples": 2, "tokens": 4}, {"samples": 2, "temperature": 1.0}]
)
def test_samples_that_could_not_differ_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="all would be the same"):
        Thinking(**given)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_digits_are_read_where_they_stand(family: Family, suite: ForcedChoiceSuite) -> None:
    """SentencePiece: a digit by itself gets a space in front, after the prefill it does not."""
    tokenizer = tiny_tokenizer(family)
    assert len(text_ids(tokenizer, "3")) == 2
    bare = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(7)]
    assert digit_ids(tokenizer, suite) == bare
    whole = text_ids(tokenizer, suite.prefill + "3")
    assert whole == [*text_ids(tokenizer, suite.prefill), bare[3]]


def test_digits_of_two_tokens_are_refused(tiny_qwen3: TinyModel, suite: ForcedChoiceSuite) -> None:
    tokenizer = copy.deepcopy(tiny_qwen3.tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("0", "zero")
    assert len(tokenizer("0", add_special_tokens=False)["input_ids"]) > 1
    with pytest.raises(SuiteError, match="digits 0 to 6"):
        forced_choice(tiny_qwen3.model, tokenizer, suite)
