"""Loading, layers, bands and the projection on real families; what cannot be loaded says so."""

from __future__ import annotations

import json
import shutil
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3ForCausalLM,
)

from eval.errors import UserError
from eval.model_files import weights_hash
from steer_heal.head import project
from steer_heal.model import (
    decoder_layers,
    layer_band,
    linear_names,
    load_student,
)
from steer_heal.model_folder import resolve_model
from tests.conftest import TinyModel
from tests.test_stack import random_adapter

IDS = torch.tensor([[5, 90, 33, 270, 8, 61, 44]])


def copied(tiny: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder, tmp_path / "copy"))


# ----------------------------------------------------------------------------------------- layers


def layers_by_name(model: Any, prefix: str) -> list[Any]:
    """The modules called `<prefix>.<number>`, by their number."""
    numbered = {
        int(name.removeprefix(prefix)): module
        for name, module in model.named_modules()
        if name.startswith(prefix) and name.removeprefix(prefix).isdigit()
    }
    return [numbered[index] for index in range(len(numbered))]


def test_decoder_layers_of_three_families(tiny: TinyModel) -> None:
    found = decoder_layers(tiny.model)
    expected = layers_by_name(tiny.model, "model.layers.")
    assert len(found) == (3 if tiny.family == "gemma3" else 2)
    assert all(one is two for one, two in zip(found, expected, strict=True))


def test_decoder_layers_through_peft_are_the_same_modules(tiny: TinyModel) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    before = list(student.loaded.layers)
    grown = student.grown(random_adapter(student, "r00", [0, 1], 2, 4, seed=0))
    with grown.running() as model:
        through = decoder_layers(model)
    assert all(one is two for one, two in zip(through, before, strict=True))
    named = layers_by_name(student.loaded.model, "base_model.model.model.layers.")
    assert all(one is two for one, two in zip(through, named, strict=True))


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)), "h."),
        (BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)), "h."),
    ],
    ids=["gpt2", "bloom"],
)
def test_decoder_layers_under_another_name(model: Any, prefix: str) -> None:
    expected = layers_by_name(model, f"transformer.{prefix}")
    found = decoder_layers(model)
    assert len(found) == 2
    assert all(one is two for one, two in zip(found, expected, strict=True))


def test_linear_names_are_the_seven_projections_of_each_layer(tiny: TinyModel) -> None:
    found = linear_names(tiny.model, decoder_layers(tiny.model))
    parts = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert [sorted(names) for names in found] == [
        sorted(f"model.layers.{layer}.{part}" for part in parts) for layer in range(len(found))
    ]


@pytest.mark.parametrize(
    ("num_layers", "shares", "expected"),
    [
        (6, (0.45, 0.55), [2]),
        (6, (0.2, 0.8), [1, 2, 3]),
        (6, (0.0, 0.5), [0, 1, 2]),
        (6, (0.0, 1.0), [0, 1, 2, 3, 4, 5]),
        (28, (0.45, 0.55), [12, 13, 14]),
        (36, (0.45, 0.55), [16, 17, 18]),
        (2, (0.45, 0.55), [0]),
        (3, (0.45, 0.55), [1]),  # none lies inside: 1/3 and 2/3 are as near, the later is taken
        (5, (0.45, 0.55), [1]),  # likewise 2/5 and 3/5, the earlier is
        (1, (0.1, 0.2), [0]),
    ],
)
def test_layer_band(num_layers: int, shares: tuple[float, float], expected: list[int]) -> None:
    assert layer_band(num_layers, shares) == expected


def test_layer_band_is_what_its_docstring_says_for_every_depth() -> None:
    """Low < (l + 1) / num_layers <= high in exact fractions; else one of the nearest layers."""
    for num_layers in range(1, 81):
        for low, high in ((45, 55), (20, 80), (0, 50), (30, 60), (90, 95)):
            found = layer_band(num_layers, (low / 100, high / 100))
            shares = [Fraction(layer + 1, num_layers) for layer in range(num_layers)]
            inside = [
                layer
                for layer, share in enumerate(shares)
                if Fraction(low, 100) < share <= Fraction(high, 100)
            ]
            if inside:
                assert found == inside
            else:
                middle = Fraction(low + high, 200)
                distance = [abs(share - middle) for share in shares]
                assert len(found) == 1 and distance[found[0]] == min(distance)


# ---------------------------------------------------------------------------------------- loading


def test_a_loaded_student_is_frozen_in_eval_mode_and_equals_the_model(tiny: TinyModel) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    with student.running() as model, torch.no_grad():
        found = model(input_ids=IDS).logits
        expected = tiny.model(input_ids=IDS).logits
    assert torch.equal(found, expected)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert student.tokenizer.pad_token_id is not None


def test_a_model_goes_by_the_id_it_was_asked_for(
    tiny_qwen3: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes the loaded model's name into adapters: else it is a path into a cache."""
    monkeypatch.chdir(tiny_qwen3.folder.parent)
    student = load_student(tiny_qwen3.folder.name, [], "cpu")
    assert student.loaded.model.name_or_path == "tiny-qwen3"
    adapter = random_adapter(student, "r00", [0], 2, 4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns where the two names differ
        with student.grown(adapter).running() as model:
            pass
    assert model.peft_config["r00"].base_model_name_or_path == "tiny-qwen3"


def test_tied_weights_are_not_missed(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    tied = Qwen3ForCausalLM(config).eval()
    tied.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (safe_open is no mapping)
    with load_student(str(folder), [], "cpu").running() as model, torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, tied(input_ids=IDS).logits)


def test_the_hash_of_the_weights_changes_with_one_flipped_byte(
    tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    before = weights_hash(folder)
    assert before == weights_hash(tiny_qwen3.folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for position in (len(content) - 1, len(content) // 2, 12):
        content[position] ^= 1
        path.write_bytes(content)
        assert weights_hash(folder) != before
        content[position] ^= 1
    path.write_bytes(content)
    assert weights_hash(folder) == before
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert weights_hash(folder) != before


def refused(folder: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_student(str(folder), [], "cpu")
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def test_no_such_model_offline() -> None:
    message = refused("nobody/no-such-model")
    assert "not a folder here, and the hub does not give it" in message
    assert "check the name, the connection, and HF_TOKEN" in message


def test_neither_a_folder_nor_a_hub_id(tmp_path: Path) -> None:
    message = refused(tmp_path / "not there")
    assert "neither a folder nor a hub id" in message or "not a folder here" in message


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    assert "there is no config.json" in refused(tmp_path)


def test_a_folder_without_weights(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights" in refused(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/tmp/model.safetensors"])
def test_an_index_that_names_a_file_elsewhere(
    tiny_qwen3: TinyModel, tmp_path: Path, name: str
) -> None:
    """It would be loaded, and the hash of the folder would not know of it."""
    folder = copied(tiny_qwen3, tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    message = refused(folder)
    assert str(index) in message and repr(name) in message


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(tiny_qwen3: TinyModel, device: str) -> None:
    if torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available():
        pytest.skip(f"{device} is there")
    with pytest.raises(UserError, match=f"device={device}: torch finds no such device"):
        load_student(str(tiny_qwen3.folder), [], device)


def test_pickled_weights_are_not_loaded(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_qwen3.model.state_dict(), folder / "pytorch_model.bin")
    assert "pickled weights (.bin, .pt) are not loaded" in refused(folder)


def test_a_tokenizer_without_a_chat_template(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    for path in folder.glob("*.jinja"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    message = refused(folder)
    assert "no chat template" in message and "chat_template.jinja" in message


def test_a_folder_without_a_tokenizer(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        path.unlink()
    assert "tokenizer" in refused(folder)


def test_a_damaged_tokenizer(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    assert "tokenizer" in refused(folder)


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_truncated_weights(tiny_qwen3: TinyModel, tmp_path: Path, share: float) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "weights are damaged" in refused(folder)


def test_an_empty_weights_file(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    assert "damaged" in refused(folder)


def test_weights_of_another_shape(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert "cannot be loaded" in refused(folder)


def test_weights_that_lack_a_layer(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    """Transformers would draw the missing layer at random and warn."""
    folder = copied(tiny_qwen3, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config | more))
    assert "lack" in refused(folder)


def test_a_config_of_an_unknown_kind(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-family"}))
    assert "no-such-family" in refused(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_without_a_gpu(tiny_qwen3: TinyModel, tmp_path: Path, bits: int) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    message = refused(folder)
    assert f"in {bits} bits by bitsandbytes" in message and "not quantised" in message


def test_a_config_that_is_not_json(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    (folder / "config.json").write_text("{")
    assert "config" in refused(folder)


def test_a_folder_is_taken_as_it_is(tiny_qwen3: TinyModel) -> None:
    assert resolve_model(str(tiny_qwen3.folder)) == tiny_qwen3.folder


# ------------------------------------------------------------------------------------- projection

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _odd_families() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "soft-capped": Gemma2ForCausalLM(
            Gemma2Config(final_logit_softcapping=3.0, query_pre_attn_scalar=8, **_SIZES)
        ),
        "divided": GraniteForCausalLM(GraniteConfig(logits_scaling=7.0, **_SIZES)),
        "multiplied": CohereForCausalLM(CohereConfig(logit_scale=0.3, **_SIZES)),
    }


def assert_projects(model: Any) -> None:
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        found = project(model, hidden)
    torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)


def test_projected_hidden_states_are_the_logits(tiny: TinyModel) -> None:
    assert_projects(tiny.model)


@pytest.mark.parametrize("family", ["soft-capped", "divided", "multiplied"])
def test_projected_hidden_states_are_the_logits_where_the_family_changes_them(family: str) -> None:
    model = _odd_families()[family].eval()
    assert_projects(model)
    with torch.no_grad():  # the bare head would have been wrong
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        bare = model.get_output_embeddings()(hidden)
        assert float((bare - model(input_ids=IDS).logits).abs().max()) > 0.1


def test_gemma3_with_a_soft_cap(tiny_gemma3: TinyModel) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_gemma3.folder).config
    config.final_logit_softcapping = 2.0
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma3.folder, config=config).eval()
    with torch.no_grad():
        assert float(model(input_ids=IDS).logits.abs().max()) <= 2
    assert_projects(model)
