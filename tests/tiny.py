"""Tiny models with random weights, one a family, each with a tokenizer and a chat template.

Weights are drawn wide (initializer_range 0.2), so that what a model answers depends on every token
of its prompt. Templates are shortened from the ones that the families ship.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

Family = Literal[
    "qwen3", "llama", "gemma3", "gemma3_vision", "qwen3_5", "qwen3_moe", "mistral", "phi3"
]
FAMILIES: tuple[Family, ...] = ("qwen3", "llama", "gemma3")  # what every unit is tested with
ALL_FAMILIES: tuple[Family, ...] = (
    *FAMILIES,
    "gemma3_vision",  # the text decoder in a wrapper, beside a vision tower
    "qwen3_5",  # linear beside full attention, saved with a vision tower
    "qwen3_moe",  # experts fused into one tensor a layer
    "mistral",  # no system role, a SentencePiece tokenizer
    "phi3",  # fused projections, a SentencePiece tokenizer
)

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
# Qwen3.5's larger models open a think unless they are asked not to.
QWEN3_5_TEMPLATE = CHATML_TEMPLATE.replace(
    "assistant\\n' }}",
    "assistant\\n' }}"
    "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking"
    " else '<think>\\n' }}",
)
MISTRAL_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
    "{%- endif %}"
    "{{- '[INST] ' + message.content + ' [/INST]' if message.role == 'user' "
    "else message.content + eos_token }}"
    "{%- endfor %}"
)
PHI3_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}"
    "{%- endfor %}"
    "{{- '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)

# Every family's special tokens; Llama 3 has no padding token, as in the released ones.
_QWEN: dict[str, Any] = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
_GEMMA: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
_SPECIALS: dict[Family, dict[str, str]] = {
    "qwen3": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_moe": _QWEN,
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "gemma3": _GEMMA,
    "gemma3_vision": _GEMMA,
    "mistral": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "phi3": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>"},
}
_MARKERS: dict[Family, list[str]] = {
    "qwen3": ["<|im_start|>", "<think>", "</think>"],
    "qwen3_5": ["<|im_start|>", "<think>", "</think>"],
    "qwen3_moe": ["<|im_start|>", "<think>", "</think>"],
    "llama": ["<|start_header_id|>", "<|end_header_id|>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "gemma3_vision": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["[INST]", "[/INST]"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
_TEMPLATES: dict[Family, str] = {
    "qwen3": QWEN3_TEMPLATE,
    "qwen3_5": QWEN3_5_TEMPLATE,
    "qwen3_moe": QWEN3_TEMPLATE,
    "llama": LLAMA3_TEMPLATE,
    "gemma3": GEMMA_TEMPLATE,
    "gemma3_vision": GEMMA_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
    "phi3": PHI3_TEMPLATE,
}
# What ends a turn beside the tokenizer's own end of text.
_TURN_ENDS: dict[Family, str] = {
    "gemma3": "<end_of_turn>",
    "gemma3_vision": "<end_of_turn>",
    "phi3": "<|end|>",
}
_SENTENCES = [
    "You are a helpful assistant. Answer with the index of one option, as JSON.",
    "The nurse told the guard that the order was unfair, and the guard agreed with her.",
    "Which moral foundation is at stake here? Care, fairness, loyalty, authority, sanctity.",
    "What is 12 plus 30? It is 42. What colour is grass? Grass is green, the sky is blue.",
    'I think the answer is {"foundation": "3"}, and that is all there is to say about it.',
]


def tiny_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A BPE of about 400 tokens: digits apart, markers whole, the family's template."""
    bpe, alphabet = _sentence_piece() if family in ("mistral", "phi3") else _byte_level()
    markers = [*_SPECIALS[family].values(), *_MARKERS[family]]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=markers,
        initial_alphabet=alphabet,
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


def _byte_level() -> tuple[Tokenizer, list[str]]:
    """As Qwen's and Llama 3's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe, pre_tokenizers.ByteLevel.alphabet()


def _sentence_piece() -> tuple[Tokenizer, list[str]]:
    """As Mistral 7B's and Phi-3's: every text that is tokenised gets a space in front."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\u2581"), behavior="isolated")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bpe, ["\n", "\u2581", *map(chr, range(33, 127))]


def tiny_model(family: Family, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Any:
    """Two to four layers of width 32 in fp32, in eval mode; the global random state is kept."""
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[family](sizes)
    stops = [tokenizer.eos_token_id]
    if family in _TURN_ENDS:
        stops.append(tokenizer.convert_tokens_to_ids(_TURN_ENDS[family]))
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, do_sample=True, top_k=20
    )
    return model.eval()


def _gemma3_text(sizes: dict[str, Any]) -> Gemma3TextConfig:
    """Two layers that see 16 tokens; between them one that sees all, which is the steered one."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    narrow = {"layer_types": kinds, "sliding_window": 16, "query_pre_attn_scalar": 8}
    return Gemma3TextConfig(num_hidden_layers=3, **narrow, **sizes)


def _gemma3_vision(sizes: dict[str, Any]) -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,  # of the same numbers as the decoder's
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=_gemma3_text(sizes).to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return Gemma3ForConditionalGeneration(config)


def _qwen3_5(sizes: dict[str, Any]) -> Any:
    """Saved as released: with a vision tower, which a causal LM leaves out when it is loaded."""
    text = Qwen3_5TextConfig(
        num_hidden_layers=4,
        # random linear attention forgets a persona before it is read: the steered layer is full
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **sizes,
    )
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    config = Qwen3_5Config(text_config=text.to_dict(), vision_config=vision)
    return Qwen3_5ForConditionalGeneration(config)


def _qwen3_moe(sizes: dict[str, Any]) -> Any:
    """Four experts a layer, two of them for a token."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=2, **experts, **sizes))


def _phi3(sizes: dict[str, Any]) -> Any:
    known = {key: value for key, value in sizes.items() if key != "head_dim"}
    return Phi3ForCausalLM(Phi3Config(num_hidden_layers=2, **known))


_BUILDERS: dict[Family, Callable[[dict[str, Any]], Any]] = {
    "qwen3": lambda sizes: Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2, **sizes)),
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)),
    "gemma3": lambda sizes: Gemma3ForCausalLM(_gemma3_text(sizes)),
    "gemma3_vision": _gemma3_vision,
    "qwen3_5": _qwen3_5,
    "qwen3_moe": _qwen3_moe,
    "mistral": lambda sizes: MistralForCausalLM(MistralConfig(num_hidden_layers=2, **sizes)),
    "phi3": _phi3,
}


def tiny_model_folder(tmp_path: Path, family: Family) -> Path:
    """Saves a tiny model as a transformers folder (config, safetensors, tokenizer, template)."""
    folder = tmp_path / f"tiny-{family}"
    tokenizer = tiny_tokenizer(family)
    tiny_model(family, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
