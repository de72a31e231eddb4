from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from eval.forced_choice import ORDERS, forced_choice, forced_choice_pieces, option_order
from eval.suite import ForcedChoiceSuite, SuiteError
from tests.conftest import TinyModel
from tests.tiny import CHATML_TEMPLATE

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
        rows = forced_choice(tiny.model, tiny.tokenizer, suite, system=SYSTEM, batch_size=3)
    assert [row.id for row in rows] == [item["id"] for item in suite_data["items"]]
    assert [row.label for row in rows] == ["care", "fairness", "loyalty", None, "norms"]
    assert [row.conflict for row in rows] == [False, False, False, True, False]
    for row, (scores, pmass) in zip(rows, expected, strict=True):
        assert row.scores == pytest.approx(scores, abs=1e-4)
        assert row.pmass == pytest.approx(pmass, rel=1e-4)
    spread = [max(row.scores.values()) - min(row.scores.values()) for row in rows]
    assert min(spread) > 0.1  # the model does tell the options apart, 1e-4 is not vacuous


def test_the_system_prompt_matters(tiny: TinyModel, suite: ForcedChoiceSuite) -> None:
    without = forced_choice(tiny.model, tiny.tokenizer, suite)
    with_one = forced_choice(tiny.model, tiny.tokenizer, suite, system=SYSTEM)
    for left, right in zip(without, with_one, strict=True):
        assert max(abs(left.scores[name] - right.scores[name]) for name in left.scores) > 1e-2


def test_batch_size_changes_nothing(tiny: TinyModel, suite: ForcedChoiceSuite) -> None:
    one = forced_choice(tiny.model, tiny.tokenizer, suite, batch_size=1)
    all_at_once = forced_choice(tiny.model, tiny.tokenizer, suite, batch_size=64)
    for left, right in zip(one, all_at_once, strict=True):
        assert left.scores == pytest.approx(right.scores, abs=1e-4)


def test_two_frames_show_every_option_at_both_ends(suite: ForcedChoiceSuite) -> None:
    assert option_order(suite, "forward") == list(suite.foundations)
    assert option_order(suite, "reversed") == list(suite.foundations)[::-1]
    assert ORDERS == ("forward", "reversed")


def test_pieces_join_to_the_row(tiny_llama: TinyModel, suite: ForcedChoiceSuite) -> None:
    pieces = forced_choice_pieces(tiny_llama.tokenizer, suite, "He left.", "reversed", SYSTEM)
    text = tiny_llama.tokenizer.decode(pieces.input_ids, skip_special_tokens=False)
    assert text.count("<|begin_of_text|>") == 1
    assert "\n0: a custom is broken\n1: someone is coerced\n" in text
    assert text.endswith('assistant<|end_header_id|>\n\n{"foundation": "')


def test_preference_for_a_digit_cancels_between_an_option_and_its_mirror(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.zeros(len(tiny.tokenizer))
    bias[tiny.tokenizer.convert_tokens_to_ids("0")] = 8.0
    plain = forced_choice(tiny.model, tiny.tokenizer, suite)
    with _output_bias(tiny.model, bias):
        biased = forced_choice(tiny.model, tiny.tokenizer, suite)
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
    plain = forced_choice(tiny.model, tiny.tokenizer, suite)
    with _output_bias(tiny.model, bias):
        biased = forced_choice(tiny.model, tiny.tokenizer, suite)
    for before, after in zip(plain, biased, strict=True):
        gain = [after.scores[name] - before.scores[name] for name in suite.foundations]
        assert max(gain) - min(gain) < 1e-3


def test_pmass_is_all_of_it_when_only_digits_are_possible(
    tiny: TinyModel, suite: ForcedChoiceSuite
) -> None:
    bias = torch.full((len(tiny.tokenizer),), -50.0)
    bias[[tiny.tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(7)]] = 50.0
    with _output_bias(tiny.model, bias):
        rows = forced_choice(tiny.model, tiny.tokenizer, suite)
    assert all(row.pmass == pytest.approx(1.0, abs=1e-5) for row in rows)


def test_not_a_number_is_refused_by_item(tiny: TinyModel, suite: ForcedChoiceSuite) -> None:
    bias = torch.full((len(tiny.tokenizer),), float("nan"))
    with (
        _output_bias(tiny.model, bias),
        pytest.raises(ValueError, match=r"item 'kick' of suite 'small'.*not finite"),
    ):
        forced_choice(tiny.model, tiny.tokenizer, suite)


def test_one_broken_item_is_the_one_named(tiny: TinyModel, suite: ForcedChoiceSuite) -> None:
    """Breaks the batches that hold the longest row, which is the second item's."""
    calls = []

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.shape[0])
        return output * float("nan") if len(calls) == 1 else output

    hook = tiny.model.get_output_embeddings().register_forward_hook(spoil)
    try:
        with pytest.raises(ValueError, match="item 'queue'"):
            forced_choice(tiny.model, tiny.tokenizer, suite, batch_size=1)
    finally:
        hook.remove()
    assert calls == [1] * 10


def test_digits_of_two_tokens_are_refused(tiny_qwen3: TinyModel, suite: ForcedChoiceSuite) -> None:
    """A tokenizer that puts a space in front of every text spells "0" as two tokens."""
    tokenizer = copy.deepcopy(tiny_qwen3.tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(True)]
    )
    assert len(tokenizer("0", add_special_tokens=False)["input_ids"]) == 2
    with pytest.raises(SuiteError, match="digits 0 to 6"):
        forced_choice(tiny_qwen3.model, tokenizer, suite)


def test_state_of_the_model_is_left_alone(tiny: TinyModel, suite: ForcedChoiceSuite) -> None:
    state = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    random_state = torch.get_rng_state()
    forced_choice(tiny.model, tiny.tokenizer, suite)
    assert all(torch.equal(state[name], t) for name, t in tiny.model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
