"""The exported adapter is what users load: it must be the whole stack, by stock PEFT."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eval.errors import UserError
from steer_heal.config import resolve_config
from steer_heal.export import export_adapter
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from tests.conftest import TinyModel
from tests.small import small_settings


@pytest.fixture(scope="module")
def run(tiny_qwen3: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    config = resolve_config([*small_settings(tiny_qwen3.folder, folder), "N=2"])
    run_rounds(config, run_path(config))
    return run_path(config)


def test_one_folder_equals_both_rounds_together(
    run: Path, tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(tiny_qwen3.folder, dtype=torch.float32)

    out = tmp_path / "adapter"
    assert export_adapter(run, out, 2) == 2
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ids = torch.arange(40)[None]
    stacked = PeftModel.from_pretrained(base(), run / "round-00" / "adapter", adapter_name="a")
    stacked.load_adapter(run / "round-01" / "adapter", adapter_name="b")
    stacked.base_model.set_adapter(["a", "b"])
    with torch.inference_mode():
        expected = stacked.eval()(ids).logits
        exported = PeftModel.from_pretrained(base(), out).eval()(ids).logits
        untouched = base().eval()(ids).logits
    assert (exported - expected).abs().max() < 1e-4
    assert (exported - untouched).abs().max() > 1e-3


def test_the_first_round_alone(run: Path, tmp_path: Path) -> None:
    assert export_adapter(run, tmp_path / "one", 1) == 1
    saved, found = updates(run / "round-00" / "adapter"), updates(tmp_path / "one")
    assert saved.keys() == found.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, saved[key], rtol=1e-5, atol=1e-8)


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> what an adapter adds to its weight."""
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        key: scale * weights[key.replace("lora_A", "lora_B")] @ value
        for key, value in weights.items()
        if "lora_A" in key
    }


@pytest.mark.parametrize("best", [1, 2])
def test_by_default_it_takes_the_rounds_up_to_the_best(
    run: Path, tmp_path: Path, best: int
) -> None:
    """The best of two rounds, made to be the one or the other by what is on disk."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    make_best(copy, best)
    assert export_adapter(copy, tmp_path / "best") == best
    export_adapter(copy, tmp_path / "asked", best)
    name = "adapter_model.safetensors"
    assert (tmp_path / "best" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes()


def test_without_a_coherent_round_it_asks_for_a_number(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    make_best(copy, None)
    with pytest.raises(UserError, match=r"no round stayed coherent.*--rounds N"):
        export_adapter(copy, tmp_path / "out")
    with pytest.raises(UserError, match="has 2 finished rounds; --rounds 3"):
        export_adapter(copy, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    assert export_adapter(copy, tmp_path / "out", 2) == 2


def make_best(run: Path, best: int | None) -> None:
    """Writes evaluations in which every round but the best has lost its answers' format."""
    for number in (1, 2):
        folder = run / f"round-{number - 1:02d}"
        file, stages = folder / "eval.json", folder / "stages.json"
        rows = json.loads(file.read_text())
        healed = json.loads((run / "base.json").read_text()) | {"condition": "healed"}
        for row in healed["choices"]:
            row["pmass"] *= 1 if number == best else 0.5
        rows["healed"] = healed
        file.write_text(json.dumps(rows))
        recorded = json.loads(stages.read_text())
        recorded["eval"]["files"]["eval.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
        stages.write_text(json.dumps(recorded))


def test_what_is_there_is_not_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export_adapter(run, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        export_adapter(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
