from __future__ import annotations

import copy
from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError

from eval.chat import ChatTemplateError, chat_ids, chat_text, next_turn_text, text_ids
from tests.conftest import TinyModel
from tests.tiny import LLAMA3_TEMPLATE, QWEN3_TEMPLATE

PROMPTS = {
    "qwen3": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is 12 + 3?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 12 + 3?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma3": "<bos><start_of_turn>user\nBe kind.\n\nWhat is 12 + 3?<end_of_turn>\n"
    "<start_of_turn>model\n",
}
NEXT_TURNS = {
    "qwen3": "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n",
    "llama": "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nGo on.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma3": "<end_of_turn>\n<start_of_turn>user\nGo on.<end_of_turn>\n<start_of_turn>model\n",
}


def test_prompt_is_the_template_written_out(tiny: TinyModel) -> None:
    assert chat_text(tiny.tokenizer, "What is 12 + 3?", "Be kind.") == PROMPTS[tiny.family]


def test_prompt_without_system(tiny: TinyModel) -> None:
    text = chat_text(tiny.tokenizer, "What is 12 + 3?")
    assert (
        text
        == {
            "qwen3": PROMPTS["qwen3"].replace("<|im_start|>system\nBe kind.<|im_end|>\n", ""),
            "llama": PROMPTS["llama"].replace(
                "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>", ""
            ),
            "gemma3": PROMPTS["gemma3"].replace("Be kind.\n\n", ""),
        }[tiny.family]
    )


def test_ids_spell_the_prompt_with_one_bos(tiny: TinyModel) -> None:
    ids = chat_ids(tiny.tokenizer, "What is 12 + 3?", "Be kind.")
    assert tiny.tokenizer.decode(ids, skip_special_tokens=False) == PROMPTS[tiny.family]
    bos = tiny.tokenizer.bos_token_id
    assert ids.count(bos) == (0 if bos is None else 1)
    # the tokenizer's own way of calling it, which is the trap, has one more where there is a BOS
    assert len(tiny.tokenizer(PROMPTS[tiny.family])["input_ids"]) == len(ids) + (bos is not None)


def test_markers_are_single_tokens(tiny: TinyModel) -> None:
    ids = chat_ids(tiny.tokenizer, "x")
    first = tiny.tokenizer.convert_ids_to_tokens(ids[0])
    assert (
        first
        == {"qwen3": "<|im_start|>", "llama": "<|begin_of_text|>", "gemma3": "<bos>"}[tiny.family]
    )


def test_next_turn_is_what_follows_a_reply(tiny: TinyModel) -> None:
    assert next_turn_text(tiny.tokenizer, "Go on.") == NEXT_TURNS[tiny.family]


def test_text_ids_adds_nothing(tiny_llama: TinyModel) -> None:
    ids = text_ids(tiny_llama.tokenizer, "12")
    assert tiny_llama.tokenizer.convert_ids_to_tokens(ids) == ["1", "2"]


@pytest.mark.parametrize("prompt", [chat_ids, chat_text, next_turn_text])
def test_no_template_is_refused(tiny_qwen3: TinyModel, prompt) -> None:
    tokenizer = copy.deepcopy(tiny_qwen3.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        prompt(tokenizer, "x")


def test_system_refused_in_other_words(tiny_gemma3: TinyModel) -> None:
    """Mistral's templates say that roles must alternate, not that there is no system role."""
    tokenizer = copy.deepcopy(tiny_gemma3.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "System role not supported", "Conversation roles must alternate user/assistant/..."
    )
    assert chat_text(tokenizer, "What is 12 + 3?", "Be kind.") == PROMPTS["gemma3"]


def test_system_dropped_in_silence_goes_to_the_user_turn(tiny_qwen3: TinyModel) -> None:
    tokenizer = copy.deepcopy(tiny_qwen3.tokenizer)
    tokenizer.chat_template = QWEN3_TEMPLATE.replace(
        "in messages %}", "in messages if message.role != 'system' %}"
    )
    assert "user\nBe kind.\n\nx<|im_end|>" in chat_text(tokenizer, "x", "Be kind.")


def test_template_broken_otherwise_still_raises(tiny_qwen3: TinyModel) -> None:
    tokenizer = copy.deepcopy(tiny_qwen3.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('out of order') }}"
    with pytest.raises(TemplateError, match="out of order"):
        chat_text(tokenizer, "x", "Be kind.")


def test_two_bos_are_refused(tiny_llama: TinyModel) -> None:
    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.chat_template = "{{- bos_token }}" + LLAMA3_TEMPLATE
    with pytest.raises(ChatTemplateError, match="two BOS"):
        chat_ids(tokenizer, "x")


def test_template_that_hides_replies_has_no_next_turn(tiny_qwen3: TinyModel) -> None:
    tokenizer = copy.deepcopy(tiny_qwen3.tokenizer)
    tokenizer.chat_template = "{{- messages[-1].content }}"
    with pytest.raises(ChatTemplateError, match="earlier turns"):
        next_turn_text(tokenizer, "x")


def test_prompt_does_not_change_with_the_day(tiny_llama: TinyModel) -> None:
    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.chat_template = (  # as in Llama 3.2
        "{%- if not date_string is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{- date_string + ' ' }}" + LLAMA3_TEMPLATE
    )
    assert chat_text(tokenizer, "x").startswith("26 Jul 2024 <|begin_of_text|>")


# Templates as they are released, which TRL ships: where the persona lands, and how a reply begins.
RELEASED = {
    "gemma": ("user\nBe kind.\n\nHow?<end_of_turn>\n", "<start_of_turn>model\n"),
    "gemma3": ("user\nBe kind.\n\nHow?<end_of_turn>\n", "<start_of_turn>model\n"),
    "llama3_2": ("Be kind.<|eot_id|>", "assistant<|end_header_id|>\n\n"),
    "phi3": ("<|system|>\nBe kind.<|end|>\n", "<|assistant|>\n"),
    "qwen2_5": ("system\nBe kind.<|im_end|>\n", "assistant\n"),
    "qwen3": ("system\nBe kind.<|im_end|>\n", "assistant\n<think>\n\n</think>\n\n"),
    "qwen3_5_nothink": ("system\nBe kind.<|im_end|>\n", "assistant\n<think>\n\n</think>\n\n"),
    "qwen3_5_think": ("system\nBe kind.<|im_end|>\n", "assistant\n<think>\n\n</think>\n\n"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_templates(name: str, tiny_llama: TinyModel) -> None:
    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.chat_template = (
        Path(trl.__file__).parent / f"chat_templates/{name}.jinja"
    ).read_text()
    system, tag = RELEASED[name]
    prompt, following = chat_text(tokenizer, "How?", "Be kind."), next_turn_text(tokenizer, "And?")
    assert system in prompt and prompt.count("Be kind.") == prompt.count("How?") == 1
    assert prompt.endswith(tag) and following.endswith(tag)
    assert "And?" in following and "<think>" not in following.removesuffix(tag)
