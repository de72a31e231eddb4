"""Stages that runs have in common are made once, and are what they would have been."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.errors import UserError
from steer_heal.cache import StageCache, open_cache
from steer_heal.config import resolve_config
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from tests.conftest import TinyModel
from tests.processes import REPORT_FILES
from tests.small import small_settings

BEFORE_HEAL = ("vector", "doses", "drafts", "screened")
OF_RUN = ("doctor", "batches", "limits", "controls")


class Lab:
    """A small run, with whatever is changed about it, each in a folder of its own."""

    def __init__(self, tiny: TinyModel, folder: Path) -> None:
        self.settings = small_settings(tiny.folder, folder)
        self.cache = f"cache={folder / 'cache'}"

    def run(self, name: str, *settings: str) -> Path:
        given = [each for each in self.settings if each != "run=small"]
        config = resolve_config([*given, f"run={name}", *settings])
        run_rounds(config, run_path(config))
        return run_path(config)


@pytest.fixture
def lab(tiny_qwen3: TinyModel, tmp_path: Path) -> Lab:
    return Lab(tiny_qwen3, tmp_path)


def from_cache(run: Path) -> list[str]:
    """Stages that the log says were taken, sorted."""
    lines = (run / "log.txt").read_text().splitlines()
    ends = [line.removesuffix(", from the cache") for line in lines if line.endswith("the cache")]
    return sorted(line.rpartition(" ")[2] for line in ends)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the stages, by its place."""
    told = ("log.txt", "run.json", "stages.json", ".lock", *REPORT_FILES)
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in told
    }


def test_what_differs_in_healing_alone_shares_all_before_it(lab: Lab) -> None:
    first = lab.run("first", "N=1", lab.cache)
    assert from_cache(first) == []
    plain = lab.run("plain", "N=1", "heal.alpha=8")
    cached = lab.run("cached", "N=1", "heal.alpha=8", lab.cache)
    assert from_cache(cached) == sorted([*OF_RUN[1:], *BEFORE_HEAL])
    assert contents(cached) == contents(plain) != contents(first)
    again = lab.run("again", "N=2", lab.cache)
    assert from_cache(again) == sorted([*OF_RUN, *BEFORE_HEAL, "adapter", "eval"])
    assert {name: contents(again)[name] for name in contents(first)} == contents(first)
    assert "round-01/DONE" in contents(again)


def test_another_seed_shares_nothing_that_is_drawn(lab: Lab) -> None:
    lab.run("first", "N=1", lab.cache)
    # how many rows at a time is nothing that is drawn
    assert from_cache(lab.run("other", "N=1", "seed=1", lab.cache)) == ["batches"]


def put(cache: StageCache, folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text(text)
    cache.put("limits", "in", ["a.json"], folder)


def description(**values: Any) -> dict[str, Any]:
    return {"code": "c", "libraries": {"torch": "2", "peft": "1"}} | values


def test_what_was_made_with_something_else_is_not_taken(tmp_path: Path) -> None:
    one, same, other, newer, gpu = (
        open_cache(str(tmp_path / "cache"), described, device)
        for described, device in (
            (description(), "cpu"),
            (description(libraries={"peft": "1", "torch": "2"}), "cpu"),
            (description(code="d"), "cpu"),
            (description(libraries={"torch": "3", "peft": "1"}), "cpu"),
            (description(), "cuda:0"),
        )
    )
    assert one and same and other and newer and gpu
    put(one, tmp_path / "made", "1")
    into = tmp_path / "into"
    into.mkdir()
    for cache in (other, newer, gpu):
        assert not cache.fetch("limits", "in", ["a.json"], into)
    assert not one.fetch("controls", "in", ["a.json"], into)
    assert not one.fetch("limits", "other", ["a.json"], into)
    assert list(into.iterdir()) == []
    assert same.fetch("limits", "in", ["a.json"], into)
    assert (into / "a.json").read_text() == "1"
    assert open_cache(None, description(), "cpu") is None


def test_the_second_of_two_that_made_the_same_is_not_in_the_way(tmp_path: Path) -> None:
    cache = StageCache(folder=tmp_path / "cache", made_with="x")
    put(cache, tmp_path / "one", "1")
    put(cache, tmp_path / "two", "1")
    (entry,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["a.json", "hashes.json"]


@pytest.mark.parametrize("damage", ["edited", "gone", "emptied"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    cache = StageCache(folder=tmp_path / "cache", made_with="x")
    put(cache, tmp_path / "made", json.dumps([1, 2]))
    (entry,) = (tmp_path / "cache").iterdir()
    if damage == "edited":
        (entry / "a.json").write_text("[1, 3]")
    elif damage == "gone":
        (entry / "a.json").unlink()
    else:
        shutil.rmtree(entry)
        entry.mkdir()
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(UserError, match=r"limits-.*take the folder .* away"):
        cache.fetch("limits", "in", ["a.json"], into)
