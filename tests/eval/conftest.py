"""A forced-choice suite small enough to read, as data; a decoder of every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from eval.suite import ForcedChoiceSuite
from tests.conftest import TinyModel
from tests.tiny import FAMILIES, Family


@pytest.fixture
def suite_data() -> dict[str, Any]:
    """What a suite's file holds; a test may change its copy."""
    return {
        "name": "small",
        "description": "Vignettes of unequal length.",
        "options": {
            "care": "someone is harmed",
            "fairness": "someone is treated unequally",
            "loyalty": "a group is betrayed",
            "authority": "an order is disobeyed",
            "sanctity": "something pure is defiled",
            "liberty": "someone is coerced",
            "norms": "a custom is broken",
        },
        "question": "Which foundation is at stake?",
        "schema_head": 'Answer as {"foundation": "<index>"}, the index being one of\n',
        "schema_line": "{index}: {option}",
        "schema_tail": "\nand nothing else.",
        "nudge": "Now answer.",
        "think_open": "<think>\n",
        "think_close": "\n</think>\n\n",
        "prefill": '{"foundation": "',
        "items": [
            {"id": "kick", "text": "A boy kicks a dog.", "label": "care"},
            {
                "id": "queue",
                "text": "A man with money walks past a queue of 30 people and is served at once, "
                "while the guard looks the other way.",
                "label": "fairness",
            },
            {"id": "flag", "text": "She sells the team's plan to its rival.", "label": "loyalty"},
            {
                "id": "order",
                "text": "A nurse is told to leave a patient alone, and stays.",
                "conflict": True,
            },
            {"id": "soup", "text": "He eats soup with a fork at a wedding.", "label": "norms"},
        ],
    }


@pytest.fixture
def suite(suite_data: dict[str, Any]) -> ForcedChoiceSuite:
    return ForcedChoiceSuite.model_validate(suite_data)


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen3.5", "mamba"])
def decoder(request: pytest.FixtureRequest, tiny_models: dict[Family, TinyModel]) -> TinyModel:
    """Every kind of cache: full and sliding attention, linear attention beside full, and none."""
    if request.param in tiny_models:
        return tiny_models[request.param]
    tokenizer = tiny_models["qwen3"].tokenizer
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    linear: dict[str, Any] = {
        "layer_types": ["full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    widths = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = (
            MambaForCausalLM(MambaConfig(num_hidden_layers=2, **sizes))
            if request.param == "mamba"
            else Qwen3_5ForCausalLM(
                Qwen3_5TextConfig(num_hidden_layers=2, **heads, **linear, **widths, **sizes)
            )
        )
    return replace(tiny_models["qwen3"], model=model.eval())
