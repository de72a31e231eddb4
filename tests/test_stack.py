"""Stacks of adapters against sums of weight matrices written out, and against stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from steer_heal.artifacts import RoundAdapter
from steer_heal.model import Student, load_student
from steer_heal.stack import (
    adapter_weights,
    attach,
    attach_saved,
    detach,
    fold,
    freeze,
    lora_config,
    only,
    trainable,
    weights_digest,
)
from tests.conftest import TinyModel

IDS = torch.tensor([[5, 90, 33, 270, 8, 61, 44], [7, 7, 120, 301, 18, 2, 250]])


def random_adapter(
    student: Student, name: str, layers: Sequence[int], rank: int, alpha: float, seed: int
) -> RoundAdapter:
    """An adapter as `heal` would give it, with factors drawn at random."""
    loaded = student.loaded
    targets = [module for layer in layers for module in loaded.linear_names[layer]]
    modules = dict(loaded.model.named_modules())
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for target in targets:
        # on a PeftModel the base's modules sit under a prefix
        module = modules.get(target) or modules[f"base_model.model.{target}"]
        prefix = f"base_model.model.{target}"
        rows, columns = module.out_features, module.in_features
        weights[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(rank, columns, generator=draw)
        weights[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(rows, rank, generator=draw)
    config = lora_config(rank, alpha, targets, str(loaded.model_id)).to_dict()
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    return RoundAdapter(
        name=name, config=plain | {"inference_mode": True}, weights=weights, steps=()
    )


def fresh(tiny: TinyModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def logits_by_hand(tiny: TinyModel, adapters: Sequence[RoundAdapter]) -> torch.Tensor:
    """A model of its own whose weights are W + sum of alpha / rank * B A."""
    model = fresh(tiny)
    for adapter in adapters:
        scale = adapter.config["lora_alpha"] / adapter.config["r"]
        for key, a in adapter.weights.items():
            if ".lora_A." in key:
                b = adapter.weights[key.replace(".lora_A.", ".lora_B.")]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(name).weight += scale * (b.double() @ a.double()).float()
    return logits_of(model)


def three(tiny: TinyModel) -> tuple[Student, list[RoundAdapter]]:
    """A base with three adapters put on, each by itself; they differ in rank, alpha, layers."""
    student = load_student(str(tiny.folder), [], "cpu")
    adapters = [
        random_adapter(student, "r00", [0], rank=2, alpha=4, seed=1),
        random_adapter(student, "r01", [0, 1], rank=3, alpha=2, seed=2),
        random_adapter(student, "r02", [1], rank=1, alpha=1.5, seed=3),
    ]
    for adapter in adapters:
        student.loaded.model = attach_saved(student.loaded.model, adapter)
    return student, adapters


def close(left: torch.Tensor, right: torch.Tensor, atol: float = 1e-5) -> None:
    """Equal to `atol` of the size of a logit."""
    size = float(right.abs().max())
    torch.testing.assert_close(left / size, right / size, rtol=0, atol=atol)


def test_only_picks_the_adapters_that_act(tiny: TinyModel) -> None:
    student, adapters = three(tiny)
    model = student.loaded.model
    for chosen in ([0, 1, 2], [0, 1], [2], [1]):
        with only(model, [adapters[index].name for index in chosen]):
            found = logits_of(model)
        expected = logits_by_hand(tiny, [adapters[index] for index in chosen])
        close(found, expected, 2e-5)
        assert float((expected - logits_by_hand(tiny, [])).abs().max()) > 0.1  # they do act


def test_the_base_through_a_stack_is_bit_equal_to_the_untouched_model(tiny: TinyModel) -> None:
    student, _ = three(tiny)
    with student.base.running() as model:
        found = logits_of(model)
    assert torch.equal(found, logits_of(fresh(tiny)))


def test_an_earlier_student_is_bit_equal_to_itself_before_the_stack_grew(
    tiny_qwen3: TinyModel,
) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    first = student.grown(random_adapter(student, "r00", [0, 1], 2, 4, seed=1))
    with first.running() as model:
        before = logits_of(model)
    second = first.grown(random_adapter(student, "r01", [1], 4, 8, seed=2))
    with first.running() as model:
        after = logits_of(model)
    with second.running() as model:
        grown = logits_of(model)
    assert torch.equal(before, after)
    assert not torch.equal(before, grown)


def test_only_gives_back_what_was_active_also_when_the_body_raises(tiny_qwen3: TinyModel) -> None:
    student, _ = three(tiny_qwen3)
    model = student.loaded.model
    with only(model, ["r00", "r02"]):
        outer = logits_of(model)
        with pytest.raises(RuntimeError, match="mine"), only(model, []):
            raise RuntimeError("mine")
        assert torch.equal(logits_of(model), outer)


def test_only_touches_no_requires_grad(tiny_qwen3: TinyModel) -> None:
    """Leaving PEFT's own disable_adapter makes frozen adapters trainable; leaving this does not."""
    student, _ = three(tiny_qwen3)
    model = student.loaded.model
    with trainable(model, "r01"):
        before = {key: p.requires_grad for key, p in model.named_parameters()}
        with only(model, []):
            pass
        assert {key: p.requires_grad for key, p in model.named_parameters()} == before


def test_everything_is_frozen_after_loading_a_stack(tiny: TinyModel) -> None:
    student, _ = three(tiny)
    assert not any(p.requires_grad for p in student.loaded.model.parameters())


def test_trainable_unfreezes_one_adapter_alone_and_freezes_it_again(tiny_qwen3: TinyModel) -> None:
    student, adapters = three(tiny_qwen3)
    model = student.loaded.model
    with trainable(model, "r01") as parameters:
        open_keys = {key for key, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in parameters) == sum(
            value.numel() for value in adapters[1].weights.values()
        )
    expected = {
        key.replace(".lora_A.", ".lora_A.r01.").replace(".lora_B.", ".lora_B.r01.")
        for key in adapters[1].weights
    }
    assert open_keys == expected
    assert not any(p.requires_grad for p in model.parameters())


def test_gradients_reach_the_trainable_adapter_and_no_other(tiny_qwen3: TinyModel) -> None:
    student, adapters = three(tiny_qwen3)
    model = student.loaded.model
    with trainable(model, "r02"), only(model, [adapter.name for adapter in adapters]):
        model(input_ids=IDS).logits.square().sum().backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all(".r02." in key for key in with_gradient)


def test_a_fresh_adapter_starts_as_nothing(tiny: TinyModel) -> None:
    base = fresh(tiny)
    before = logits_of(base)
    student = load_student(str(tiny.folder), [], "cpu")
    model = attach(
        base, "r00", lora_config(4, 8, student.loaded.linear_names[0], base.name_or_path)
    )
    assert torch.equal(logits_of(model), before)
    assert not any(p.requires_grad for p in model.parameters())
    b = [value for key, value in adapter_weights(model, "r00").items() if ".lora_B." in key]
    a = [value for key, value in adapter_weights(model, "r00").items() if ".lora_A." in key]
    assert all(float(value.abs().max()) == 0 for value in b)
    assert all(float(value.abs().max()) > 0 for value in a)


def test_detaching_the_last_adapter_gives_the_base_back_bit_for_bit(tiny: TinyModel) -> None:
    base = fresh(tiny)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    logits = logits_of(base)
    student = load_student(str(tiny.folder), [], "cpu")
    adapter = random_adapter(student, "r00", [0, 1], 2, 4, seed=1)
    model = attach_saved(base, adapter)
    assert not torch.equal(logits_of(model), logits)
    bare = detach(model, "r00")
    assert type(bare) is type(tiny.model)
    after = bare.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(logits_of(bare), logits)


def test_detaching_one_of_several_leaves_the_others(tiny_qwen3: TinyModel) -> None:
    student, adapters = three(tiny_qwen3)
    model = detach(student.loaded.model, "r02")
    assert isinstance(model, PeftModel) and set(model.peft_config) == {"r00", "r01"}
    assert not any(".r02." in key for key, _ in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    with only(model, ["r00", "r01"]):
        close(logits_of(model), logits_by_hand(tiny_qwen3, adapters[:2]))


def grown_by(student: Student, count: int) -> list[Student]:
    """The base, and it with one, two ... adapters."""
    students = [student]
    for number in range(count):
        adapter = random_adapter(student, f"r{number:02d}", [0, 1], 2, 4, seed=number)
        students.append(students[-1].grown(adapter))
    return students


@pytest.mark.filterwarnings("error::UserWarning")  # of PEFT, to people who could do nothing
def test_a_stack_acts_as_one_adapter(tiny: TinyModel) -> None:
    """Any of several students, in any order; few of them stay on the model."""
    students = grown_by(load_student(str(tiny.folder), [], "cpu"), 5)
    loaded, first = students[0].loaded, {}
    for number in (5, 1, 3, 2, 0, 4, 5, 3):
        student = students[number]
        with student.running() as model:
            found = logits_of(model)
        close(found, logits_by_hand(tiny, list(student.adapters)))
        assert torch.equal(found, first.setdefault(number, found))  # to the bit, every time
        acting = {name for key in loaded.stacks for name in key.split("_")}
        assert len(loaded.stacks) <= 2 and set(student.names) <= acting
        assert not any(p.requires_grad for p in loaded.model.parameters())
        if number:
            assert set(loaded.model.peft_config) == set(loaded.stacks)
    with students[5].with_only(["r00", "r01"]).running() as model:
        assert torch.equal(logits_of(model), first[2])


def test_what_is_put_on_while_a_student_is_only_read_can_be_trained_beside(
    tiny_qwen3: TinyModel,
) -> None:
    *_, one = grown_by(load_student(str(tiny_qwen3.folder), [], "cpu"), 2)
    with torch.inference_mode(), one.running() as model:
        logits_of(model)
    assert not any(p.is_inference() for p in one.loaded.model.parameters())
    fresh_one = lora_config(2, 4, one.loaded.linear_names[0], "x")
    with trainable(attach(one.loaded.model, "r02", fresh_one), "r02") as parameters:
        assert len(parameters) == 2 * len(one.loaded.linear_names[0])


def test_an_adapter_of_the_same_name_takes_the_place_of_another(tiny_qwen3: TinyModel) -> None:
    base = load_student(str(tiny_qwen3.folder), [], "cpu")
    for seed in (1, 2):
        adapter = random_adapter(base, "r00", [0], 2, 4, seed=seed)
        with base.grown(adapter).running() as model:
            close(logits_of(model), logits_by_hand(tiny_qwen3, [adapter]))


def test_nothing_is_put_on_a_model_that_runs(tiny_qwen3: TinyModel) -> None:
    """It would act there, too: PEFT lets what is new act."""
    base, one = grown_by(load_student(str(tiny_qwen3.folder), [], "cpu"), 1)
    with base.running(), pytest.raises(AssertionError, match="let loose"), one.running():
        pass
    with one.running() as model:
        expected = logits_of(model)
        with base.running() as same, one.running():
            assert torch.equal(logits_of(same), expected)


def test_weights_in_the_model_are_those_of_the_artifact(tiny_qwen3: TinyModel) -> None:
    student, adapters = three(tiny_qwen3)
    for adapter in adapters:
        found = adapter_weights(student.loaded.model, adapter.name)
        assert set(found) == set(adapter.weights)
        assert all(torch.equal(found[key], value) for key, value in adapter.weights.items())


def test_an_adapter_for_other_modules_is_refused(tiny_qwen3: TinyModel) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    adapter = random_adapter(student, "r00", [0], 2, 4, seed=1)
    stray = {key.replace("layers.0", "layers.7"): v for key, v in adapter.weights.items()}
    odd = RoundAdapter(name="r00", config=adapter.config, weights=stray, steps=())
    with pytest.raises(ValueError, match="r00: no place for"):
        attach_saved(student.loaded.model, odd)


def test_the_digest_of_the_weights_sees_one_changed_number(tiny_qwen3: TinyModel) -> None:
    student, _ = three(tiny_qwen3)
    model = student.loaded.model
    before = weights_digest(model, ["r00", "r01"])
    parameter = next(p for key, p in model.named_parameters() if ".lora_B.r01." in key)
    with torch.no_grad():
        parameter.view(-1)[3] += 1e-6
    assert weights_digest(model, ["r00", "r01"]) != before
    first = weights_digest(model, ["r00"])
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if ".lora_B.r02." in key).add_(1)
    assert weights_digest(model, ["r00"]) == first


def test_a_saved_adapter_loads_with_stock_peft(tiny: TinyModel, tmp_path: Path) -> None:
    """What a user does with a round's folder."""
    student, adapters = three(tiny)
    folder = tmp_path / "round-01"
    folder.mkdir()
    adapters[1].save(folder)
    stock = PeftModel.from_pretrained(fresh(tiny), folder / "adapter").eval()
    close(logits_of(stock), logits_by_hand(tiny, [adapters[1]]))
    with only(student.loaded.model, ["r01"]):
        close(logits_of(stock), logits_of(student.loaded.model))

    files = {path.name for path in (folder / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert type(config["lora_alpha"]) is int and type(config["r"]) is int
    assert config["inference_mode"] is True and config["bias"] == "none"


def test_an_adapter_is_saved_in_the_same_bytes_every_time(
    tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    """Several keys of metadata in a safetensors file would stand in random order."""
    _, adapters = three(tiny_qwen3)
    contents = set()
    for run in range(16):
        folder = tmp_path / str(run)
        folder.mkdir()
        adapters[1].save(folder)
        contents.add(tuple((folder / name).read_bytes() for name in RoundAdapter.files))
    assert len(contents) == 1


def test_a_saved_adapter_comes_back_as_it_was(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    _, adapters = three(tiny_qwen3)
    folder = tmp_path / "round-02"
    folder.mkdir()
    adapters[2].save(folder)
    back = RoundAdapter.load(folder)
    assert back.name == "r02"
    assert back.digest() == adapters[2].digest()
    assert (back.rank, back.scale) == (1, 1.5)
    assert all(torch.equal(back.weights[key], v) for key, v in adapters[2].weights.items())


def test_a_student_loaded_from_saved_adapters_is_the_same(tiny: TinyModel, tmp_path: Path) -> None:
    _, adapters = three(tiny)
    student, back = load_student(str(tiny.folder), adapters, "cpu"), []
    for index, adapter in enumerate(adapters):
        folder = tmp_path / f"round-{index:02d}"
        folder.mkdir()
        adapter.save(folder)
        back.append(RoundAdapter.load(folder))
    again = load_student(str(tiny.folder), back, "cpu")
    with student.running() as one, again.running() as two:
        assert torch.equal(logits_of(one), logits_of(two))
    assert again.digest() == student.digest()


def test_a_folded_stack_loads_with_stock_peft_and_equals_the_stack(
    tiny: TinyModel, tmp_path: Path
) -> None:
    student, adapters = three(tiny)
    folded = fold(adapters)
    assert folded.rank == 6 and folded.scale == 1
    assert type(folded.config["lora_alpha"]) is int
    folded.save(tmp_path)
    stock = PeftModel.from_pretrained(fresh(tiny), tmp_path / "adapter").eval()
    model = student.loaded.model
    with only(model, [adapter.name for adapter in adapters]):
        close(logits_of(stock), logits_of(model))
    close(logits_of(stock), logits_by_hand(tiny, adapters))


def test_folding_gives_the_sum_of_the_updates_module_by_module(tiny_qwen3: TinyModel) -> None:
    _, adapters = three(tiny_qwen3)
    folded = fold(adapters).weights
    for key in (key for key in folded if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        total = sum(
            adapter.config["lora_alpha"]
            / adapter.config["r"]
            * (adapter.weights[other].double() @ adapter.weights[key].double())
            for adapter in adapters
            if key in adapter.weights
        )
        found = folded[other].double() @ folded[key].double()
        torch.testing.assert_close(found, total, rtol=0, atol=1e-6)


def test_folding_one_adapter_keeps_what_it_does(tiny_llama: TinyModel, tmp_path: Path) -> None:
    _, adapters = three(tiny_llama)
    fold(adapters[1:2]).save(tmp_path)
    stock = PeftModel.from_pretrained(fresh(tiny_llama), tmp_path / "adapter").eval()
    close(logits_of(stock), logits_by_hand(tiny_llama, adapters[1:2]))


def test_nothing_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="no adapter"):
        fold([])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_what_is_no_plain_lora_is_not_folded(
    tiny_qwen3: TinyModel, extra: dict[str, Any], named: str
) -> None:
    _, adapters = three(tiny_qwen3)
    plain = adapters[1]
    odd = RoundAdapter(
        name="r07", config=dict(plain.config) | extra, weights=plain.weights, steps=()
    )
    with pytest.raises(ValueError, match=f"r07: {named}"):
        fold([plain, odd])


def test_alpha_is_written_as_an_int_where_it_is_one() -> None:
    whole = lora_config(2, 32.0, ["q_proj"], "base").lora_alpha
    broken = lora_config(2, 1.5, ["q_proj"], "base").lora_alpha
    assert (whole, type(whole)) == (32, int)
    assert (broken, type(broken)) == (1.5, float)


def test_freeze_freezes_what_peft_left_open(tiny_qwen3: TinyModel) -> None:
    model = get_peft_model(fresh(tiny_qwen3), LoraConfig(target_modules=["q_proj"]))
    assert any(p.requires_grad for p in model.parameters())
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
