"""An evaluation in a folder: interrupted, gone on with, damaged; and the figures it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.probe
from eval.command import evaluate_model, evaluation_name
from eval.errors import UserError
from eval.forced_choice import forced_choice
from eval.probe import ABOUT_FILE, ROWS_FILE, SUMMARY_FILE, ProbeConfig, probe
from eval.rows import ForcedChoiceRow
from eval.settings import resolve_settings
from tests.conftest import TinyModel

SUBJECT = {"model": "tiny"}


@pytest.fixture
def config(suite_data: dict[str, Any], tmp_path: Path) -> ProbeConfig:
    """Five items in chunks of two, thinks of three sampled tokens."""
    (tmp_path / "suite.json").write_text(json.dumps(suite_data))
    settings = [f"suite={tmp_path / 'suite.json'}", f"folder={tmp_path / 'out'}", "batch_size=2"]
    return resolve_settings(ProbeConfig, [*settings, "think=3", "samples=2", "temperature=1"])


def _probe(tiny: TinyModel, config: ProbeConfig, name: str = "one") -> Any:
    return probe(tiny.model, tiny.tokenizer, config.load(), config, SUBJECT, name)


def _ask(tiny: TinyModel, config: ProbeConfig, name: str = "one") -> Path:
    _probe(tiny, config, name)
    return Path(config.folder) / name


def test_rows_are_those_of_the_probe_itself(
    tiny_qwen3: TinyModel, suite_data: dict[str, Any], config: ProbeConfig
) -> None:
    plain = config.model_copy(update={"think": 0, "samples": 1, "temperature": 0.0})
    result, summary = probe(
        tiny_qwen3.model, tiny_qwen3.tokenizer, plain.load(), plain, SUBJECT, "plain"
    )
    expected = forced_choice(tiny_qwen3.model, tiny_qwen3.tokenizer, plain.load()).rows
    for found, row in zip(result.rows, expected, strict=True):
        assert found.id == row.id and found.label == row.label
        assert found.scores == pytest.approx(row.scores, abs=1e-4)
    saved = (Path(config.folder) / "plain" / ROWS_FILE).read_text().splitlines()
    assert [ForcedChoiceRow(**json.loads(line)) for line in saved] == list(result.rows)
    assert json.loads((Path(config.folder) / "plain" / SUMMARY_FILE).read_text()) == json.loads(
        summary.model_dump_json()
    )


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4.5, 5])
def test_gone_on_with_it_ends_with_the_same_bytes(
    tiny_qwen3: TinyModel, config: ProbeConfig, kept: float
) -> None:
    """Cut after so many lines, the half one in the middle of its text."""
    whole = _ask(tiny_qwen3, config, "whole")
    cut = _ask(tiny_qwen3, config, "cut")
    rows = (whole / ROWS_FILE).read_bytes()
    assert rows == (cut / ROWS_FILE).read_bytes()
    lines = rows.splitlines(keepends=True)
    end = sum(len(line) for line in lines[: int(kept)])
    end += len(lines[int(kept)]) // 2 if kept % 1 else 0
    (cut / ROWS_FILE).write_bytes(rows[:end])
    (cut / SUMMARY_FILE).unlink()
    asked = []
    hook = tiny_qwen3.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: asked.append(output.shape)
    )
    try:
        _ask(tiny_qwen3, config, "cut")
    finally:
        hook.remove()
    assert (cut / ROWS_FILE).read_bytes() == rows
    assert (cut / SUMMARY_FILE).read_bytes() == (whole / SUMMARY_FILE).read_bytes()
    assert bool(asked) is (kept < 5)  # what is done is not asked again


def test_another_evaluation_in_the_same_folder_is_refused(
    tiny_qwen3: TinyModel, config: ProbeConfig
) -> None:
    folder = _ask(tiny_qwen3, config)
    before = (folder / ROWS_FILE).read_bytes()
    with pytest.raises(UserError, match=r"holds another evaluation \(config differ"):
        _ask(tiny_qwen3, config.model_copy(update={"seed": 7}))
    with pytest.raises(UserError, match=r"holds another evaluation \(subject differ"):
        probe(
            tiny_qwen3.model, tiny_qwen3.tokenizer, config.load(), config, {"model": "other"}, "one"
        )
    assert (folder / ROWS_FILE).read_bytes() == before
    (folder / ABOUT_FILE).write_text("[]")
    with pytest.raises(UserError, match=r"\(subject, config, suite differ"):
        _ask(tiny_qwen3, config)


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        (ROWS_FILE, lambda text: "{]\n" + text, "line 1; take the folder away"),
        (ROWS_FILE, lambda text: text.replace('"pmass"', '"mass"', 1), "line 1; take the folder"),
        (ROWS_FILE, lambda text: text.partition("\n")[2], "its items are not the suite's"),
        (ABOUT_FILE, lambda text: text[:20], "not JSON"),
    ],
)
def test_a_damaged_file_is_named(
    tiny_qwen3: TinyModel, config: ProbeConfig, file: str, spoil: Any, message: str
) -> None:
    folder = _ask(tiny_qwen3, config)
    (folder / file).write_text(spoil((folder / file).read_text()))
    with pytest.raises(UserError, match=message) as caught:
        _ask(tiny_qwen3, config)
    assert str(folder / file) in str(caught.value)


def test_an_unscorable_item_is_kept_by_name_and_not_asked_again(
    tiny_qwen3: TinyModel, config: ProbeConfig
) -> None:
    calls = []

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(output.shape[0])
        if len(calls) == 2:  # after what frames share: the longest rest of the first chunk alone
            output = output.clone()
            output[0] = float("nan")
        return output

    config = config.model_copy(update={"think": 0, "samples": 1, "temperature": 0.0})
    hook = tiny_qwen3.model.get_output_embeddings().register_forward_hook(spoil)
    try:
        result, summary = probe(
            tiny_qwen3.model, tiny_qwen3.tokenizer, config.load(), config, SUBJECT, "one"
        )
    finally:
        hook.remove()
    assert result.unscorable == summary.unscorable == ("kick",)
    assert [row.id for row in result.rows] == ["queue", "flag", "order", "soup"]
    again, _ = _probe(tiny_qwen3, config, "one")
    assert again == result


def test_the_command_prints_every_foundation_and_where_the_rows_are(
    tiny_qwen3: TinyModel, config: ProbeConfig
) -> None:
    settings = [f"suite={config.suite}", f"folder={config.folder}"]
    text = evaluate_model(str(tiny_qwen3.folder), settings)
    for name in config.load().foundations:
        assert f"\n{name}" in text
    folder = Path(text.rpartition("rows: ")[2])
    rows = [json.loads(line) for line in (folder / ROWS_FILE).read_text().splitlines()]
    mass = sum(row["pmass"] for row in rows) / len(rows)
    assert f"pmass {mass:.4f}" in text
    assert "5 items" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["suite=nowhere"], "no suite 'nowhere'"),
        (["thinks=3"], "unknown setting 'thinks'; the nearest are: think"),
        (["think=-1"], "think is '-1'"),
        (["device=tpu"], "device is 'tpu'"),
        (["samples=3"], "all would be the same"),
        (["items=none.jsonl", "suite=tinymfv"], "none.jsonl: no such file"),
        (["suite"], "KEY=VALUE"),
    ],
)
def test_bad_settings_are_told_before_a_model_is_loaded(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_model("no/such-model", settings)


def test_a_folder_that_is_not_there_is_told_before_the_hub_is_asked_for_the_items(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(eval.probe, "load_probe_suite")
    with pytest.raises(UserError, match=r"'\./missing': neither a folder nor a hub id"):
        evaluate_model("./missing", ["suite=tinymfv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        evaluate_model(str(tmp_path / "empty"), ["suite=tinymfv"])


def test_names_tell_evaluations_apart() -> None:
    names = [
        evaluation_name(subject, ProbeConfig.model_validate(fields))
        for subject, fields in (
            ("org/model", {}),
            ("org/other", {}),
            ("org/model", {"think": 8}),
            ("org/model", {"suite": "tinymfv:scifi"}),
            ("org/model", {"system": "You are kind."}),
            ("org/model", {"system": "You are stern."}),
            ("org/model", {"think": 8, "samples": 2, "temperature": 1.0}),
            ("org/model", {"items": ("a.jsonl", "b.jsonl")}),
        )
    ]
    assert len(set(names)) == len(names)
    assert not any(set(name) & set("/: ") for name in names)
