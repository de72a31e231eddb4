"""Fixtures shared by every test: tiny models, one a family, loaded from a saved folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FAMILIES, Family, tiny_model_folder

torch.set_num_threads(1)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A tiny model as a user loads it, shared by the session: a test puts back what it sets."""

    family: Family
    folder: Path
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, TinyModel]:
    loaded: dict[Family, TinyModel] = {}
    for family in FAMILIES:
        folder = tiny_model_folder(tmp_path_factory.mktemp(family), family)
        loaded[family] = TinyModel(
            family=family,
            folder=folder,
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder),
        )
    return loaded


@pytest.fixture(scope="session")
def tiny_qwen3(tiny_models: dict[Family, TinyModel]) -> TinyModel:
    return tiny_models["qwen3"]


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: dict[Family, TinyModel]) -> TinyModel:
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def tiny_gemma3(tiny_models: dict[Family, TinyModel]) -> TinyModel:
    return tiny_models["gemma3"]


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tiny_models: dict[Family, TinyModel]) -> TinyModel:
    """Each family in turn."""
    return tiny_models[request.param]
