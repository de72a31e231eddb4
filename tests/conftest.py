"""Fixtures shared by every test: tiny models, one a family, loaded from a saved folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import pytest
import torch
from playwright.sync_api import Browser
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.browser import Tabs, open_browser
from tests.tiny import FAMILIES, Family, tiny_model_folder

torch.set_num_threads(1)

# begun first: a process that takes one of these last keeps the others waiting
LONG_FILES = ("test_study", "test_resume", "test_loop", "test_bench", "test_export", "test_page")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


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


@pytest.fixture(scope="module")  # no longer: its event loop is in the way of other ones
def browser() -> Iterator[Browser]:
    """A Chromium; the test skips where there is none."""
    with open_browser() as opened:
        yield opened


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Tabs]:
    """Opens pages; at the end none of them may have gone wrong."""
    opened = Tabs(browser)
    yield opened
    opened.close()
    assert opened.errors == []
