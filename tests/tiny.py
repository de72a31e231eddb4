"""Tiny models with random weights, one a family, each with a tokenizer and a chat template.

Weights are drawn wide (initializer_range 0.2), so that what a model answers depends on every token
of its prompt. Templates are shortened from the ones that the families ship.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Family = Literal["qwen3", "llama", "gemma3"]
FAMILIES: tuple[Family, ...] = ("qwen3", "llama", "gemma3")

CHATML_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen3 asked not to think writes a shut think into the assistant tag.
QWEN3_TEMPLATE = CHATML_TEMPLATE.replace(
    "assistant\\n' }}",
    "assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
    "{{- message.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}"
    "{{- raise_exception('System role not supported') }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
    "{%- endif %}"
    "{%- set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)

# Every family's special tokens; Llama 3 has no padding token, as in the released ones.
_SPECIALS: dict[Family, dict[str, str]] = {
    "qwen3": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma3": {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"},
}
_MARKERS: dict[Family, list[str]] = {
    "qwen3": ["<|im_start|>", "<think>", "</think>"],
    "llama": ["<|start_header_id|>", "<|end_header_id|>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
}
_TEMPLATES: dict[Family, str] = {
    "qwen3": QWEN3_TEMPLATE,
    "llama": LLAMA3_TEMPLATE,
    "gemma3": GEMMA_TEMPLATE,
}
_SENTENCES = [
    "You are a helpful assistant. Answer with the index of one option, as JSON.",
    "The nurse told the guard that the order was unfair, and the guard agreed with her.",
    "Which moral foundation is at stake here? Care, fairness, loyalty, authority, sanctity.",
    "What is 12 plus 30? It is 42. What colour is grass? Grass is green, the sky is blue.",
    'I think the answer is {"foundation": "3"}, and that is all there is to say about it.',
]


def tiny_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens: digits apart, markers whole, the family's template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    markers = [*_SPECIALS[family].values(), *_MARKERS[family]]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=markers,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    bos = _SPECIALS[family].get("bos_token")
    if bos is not None:  # as the released ones: whoever tokenises a templated text gets two
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=_MARKERS[family], **_SPECIALS[family]
    )
    tokenizer.chat_template = _TEMPLATES[family]
    return tokenizer


def tiny_model(family: Family, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Any:
    """Two to three layers of width 32 in fp32, in eval mode; the global random state is kept."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    stops = [tokenizer.eos_token_id]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen3":
            model: Any = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **sizes))
        elif family == "llama":
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        else:  # two layers that see 16 tokens, one that sees all
            kinds = ["sliding_attention", "sliding_attention", "full_attention"]
            model = Gemma3ForCausalLM(
                Gemma3TextConfig(
                    num_hidden_layers=3,
                    layer_types=kinds,
                    sliding_window=16,
                    query_pre_attn_scalar=8,
                    **sizes,
                )
            )
            stops.append(tokenizer.convert_tokens_to_ids("<end_of_turn>"))
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=20
    )
    return model.eval()


def tiny_model_folder(tmp_path: Path, family: Family) -> Path:
    """Saves a tiny model as a transformers folder (config, safetensors, tokenizer, template)."""
    folder = tmp_path / f"tiny-{family}"
    tokenizer = tiny_tokenizer(family)
    tiny_model(family, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
