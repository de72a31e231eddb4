"""Batches by memory: what is chosen fits, is a power of two, and stays with its run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest
import torch

from steer_heal import memory
from steer_heal.batch_sizes import choose_batch_sizes, settled
from steer_heal.config import resolve_config
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.memory import GIB, rows_that_fit
from steer_heal.model import Student, load_student
from steer_heal.trait import load_trait
from tests.conftest import TinyModel
from tests.small import small_settings


def with_memory(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(memory, "_device_total", lambda device: gib * GIB)


@torch.inference_mode()
def cache_bytes(student: Student, rows: int, tokens: int) -> int:
    """Of the cache that the model itself makes."""
    ids = torch.full((rows, tokens), 5)
    cache = student.loaded.model(ids, use_cache=True, logits_to_keep=1).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_what_is_chosen_fits_and_twice_as_many_would_not(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    model = student.loaded.model
    weights = sum(value.nbytes for value in model.parameters())
    chosen = []
    for gib in (0.461, 0.462, 0.464, 0.468, 64):  # of these 0.46 are the libraries'
        with_memory(monkeypatch, gib)
        rows = rows_that_fit(student, prompt_tokens=200, new_tokens=2)
        chosen.append(rows)
        half = (gib - 0.46) * GIB / 2 - weights / 2
        sampling = 24 * model.config.vocab_size
        assert rows == 1 or cache_bytes(student, rows, 202) + rows * sampling <= half
        twice = cache_bytes(student, 2 * rows, 202) + 2 * rows * sampling
        if tiny.family != "gemma3":  # whose sliding windows hold less than is counted
            assert rows == 512 or twice > half
        assert rows & (rows - 1) == 0
    assert chosen == sorted(chosen) and len(set(chosen)) >= 3 and chosen[-1] == 512


def test_a_large_vocabulary_takes_smaller_batches(
    tiny_qwen3: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a whole completion, with and without the vector, are what a score holds."""
    with_memory(monkeypatch, 0.5)
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    few, many = (rows_that_fit(student, 20, new_tokens) for new_tokens in (2, 2000))
    vocab, free = student.loaded.model.config.vocab_size, 0.04 * GIB
    assert many < few
    assert many * 2 * 2000 * vocab * 4 <= free / 2


def test_a_number_that_was_given_stays(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    config = resolve_config([*small_settings(tiny_qwen3.folder, tmp_path), "generate.batch_size=7"])
    trait = load_trait(config.trait, None, None)
    student = load_student(config.model, [], "cpu")
    assert config.evaluate.batch_size == "auto"
    found = settled(student, trait, config)
    assert found.generate == config.generate and found.generate.rows_at_a_time == 7
    chosen = choose_batch_sizes(student, trait, config)
    assert found.evaluate.batch_size == chosen.evaluate == 512
    assert settled(student, trait, found) == found


def test_a_run_goes_on_with_what_it_began_with(
    tiny_qwen3: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(tiny_qwen3.folder, tmp_path)
    config = resolve_config([*settings, "N=1"])
    path = run_path(config)
    with_memory(monkeypatch, 0.464)
    run_rounds(config, path)
    kept = json.loads((path / "batches.json").read_text())
    assert 1 < kept["evaluate"] <= kept["generate"] < 512
    with_memory(monkeypatch, 64)
    run_rounds(resolve_config([*settings, "N=2"]), path)
    assert json.loads((path / "batches.json").read_text()) == kept
    said = f"batches: {kept['generate']} drafts, {kept['evaluate']} rows of evaluation"
    log = (path / "log.txt").read_text()
    assert log.count(said) == 2
    peaks = re.findall(r"memory: ([\d.]+) GiB at the most in this process; expected: about", log)
    held_gib = psutil.Process().memory_info().rss / GIB
    assert len(peaks) == 2 and float(peaks[1]) > 0.9 * held_gib  # at one time it was as now
    assert (path / "round-01" / "DONE").exists()
