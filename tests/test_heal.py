"""Healing: what is trained, what is not, and a step's figures against ones worked out apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from loguru import logger
from peft import PeftModel, get_peft_model
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from eval.chat import chat_ids
from eval.coherence import Surprisal, TextFigures
from eval.errors import UserError
from steer_heal.artifacts import RoundAdapter, Screened, ScreenedCompletion, SteeringVector
from steer_heal.config import HealConfig
from steer_heal.heal import heal
from steer_heal.losses import LEAST_NATS, Aggregate, Direction
from steer_heal.model import Student, load_student
from steer_heal.stack import attach, lora_config, only, trainable
from tests.conftest import TinyModel
from tests.test_stack import random_adapter

SMALL: dict[str, Any] = {
    "rank": 2,
    "alpha": 4,
    "layers": (0.0, 1.0),
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 5e-3,
    "learning_rate_decay": 1,
    "soft_weight": 0,
    "warmup_ratio": 0.0,
}
DOSES = (0.5, 1.0, 0.25)


def config(**changes: Any) -> HealConfig:
    return HealConfig(**(SMALL | changes))


def names(student: Student, reference: str) -> list[str]:
    """The adapters that act in a reference."""
    return student.names if reference == "previous" else []


def kept(student: Student, rows: int = 8) -> Screened:
    """Completions of several lengths, one in three without an end-of-turn token; one dropped."""
    tokenizer = student.tokenizer
    built = []
    for index in range(rows + 1):
        ids = tokenizer(
            f"I will help {index} of them, " + "and her too, " * (index % 4),
            add_special_tokens=False,
        )["input_ids"]
        finished = index % 3 != 0
        built.append(
            ScreenedCompletion(
                prompt_index=index,
                prompt=f"What now, {index}?",
                prompt_ids=tuple(chat_ids(tokenizer, f"What now, {index}?")),
                token_ids=(*ids, tokenizer.eos_token_id) if finished else tuple(ids),
                text="",
                dose=DOSES[index % len(DOSES)],
                seed=0,
                finished=finished,
                kl_p95_nats=0.0,
                surprisal=Surprisal(mean_nll_nats=1, tail_nll_nats=1, rmse_nll_nats=1),
                figures=TextFigures(**dict.fromkeys(TextFigures.model_fields, 0)),
                brokenness=0.0,
                persona_share=0.0,
                enactment_nats=1.0,
                dropped=None if index < rows else "length",
            )
        )
    return Screened(rows=tuple(built), curve=())


def vector(student: Student) -> SteeringVector:
    """A direction in the first layer's output, large enough to change what is said next."""
    layers = len(student.loaded.layers)
    generator = torch.Generator().manual_seed(11)
    directions = 2 * torch.randn(layers, 32, generator=generator)
    figures = (1.0,) * layers
    return SteeringVector(
        directions=directions,
        band=(0,),
        norms=figures,
        residual_norms=figures,
        auc=figures,
        pairwise_cosine=figures,
        num_pairs=8,
        weights_hash="",
    )


def loaded(tiny: TinyModel, history: int = 0) -> Student:
    student = load_student(str(tiny.folder), [], "cpu")
    for index in range(history):
        student = student.grown(random_adapter(student, f"r{index:02d}", [index], 2, 0.3, index))
    student.loaded.put_on(student.adapters)
    return student


def state(model: Any) -> dict[str, Any]:
    """All that a stage after this one could notice."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        # PEFT leaves an empty wrapper where an adapter was taken away from a stack
        "parameters": {
            key.replace(".base_layer.", "."): value.clone()
            for key, value in model.state_dict().items()
        },
        "trainable": [key for key, p in model.named_parameters() if p.requires_grad],
        "gradients": [key for key, p in model.named_parameters() if p.grad is not None],
        "train mode": any(module.training for module in model.modules()),
        "forwards": [key for key, module in model.named_modules() if "forward" in vars(module)],
        "config": base.config.to_dict(),
        "generation": base.generation_config.to_dict(),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    weights, weights_after = before.pop("parameters"), after.pop("parameters")
    assert list(weights_after) == list(weights)
    changed = [key for key, value in weights.items() if not torch.equal(weights_after[key], value)]
    assert changed == []
    assert after == before


@torch.no_grad()
def logits(student: Student, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """The student's logits at the positions that predict the completion, fp64."""
    with student.running() as model:
        out = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].double()
    return out[len(prompt) - 1 : -1]


def divergences(
    student: Student, reference: Student, rows: Screened, how: Aggregate, direction: Direction
) -> list[float]:
    values = []
    for row in rows.kept:
        p, q = (
            Categorical(logits=logits(one, row.prompt_ids, row.token_ids))
            for one in (student, reference)
        )
        values.append(aggregated(p, q, how, direction))
    return values


def aggregated(p: Categorical, q: Categorical, how: Aggregate, direction: Direction) -> float:
    """A row's divergence of student p from reference q."""
    kl = kl_divergence(p, q) if direction == "reverse" else kl_divergence(q, p)
    return {
        "mean": float(kl.mean()),
        "rmse": float(kl.square().mean().sqrt()),
        "p95": float(np.quantile(kl.numpy(), 0.95)),
        "max": float(kl.max()),
    }[how]


def mean_nll(student: Student, rows: Screened) -> float:
    """Mean over completion tokens, nats."""
    total, count = 0.0, 0
    for row in rows.kept:
        logp = logits(student, row.prompt_ids, row.token_ids).log_softmax(-1)
        total -= float(sum(logp[at, token] for at, token in enumerate(row.token_ids)))
        count += len(row.token_ids)
    return total / count


# -------------------------------------------------------------------------- what is left as it was


@pytest.mark.parametrize("history", [0, 2])
def test_the_student_is_left_as_it_was(tiny: TinyModel, history: int) -> None:
    student = loaded(tiny, history)
    before = state(student.loaded.model)
    kind = type(student.loaded.model)
    settings = config(barrier_threshold_nats=0, soft_weight=1)
    adapter = heal(student, kept(student), vector(student), student.names, settings, "r07", seed=0)
    assert type(student.loaded.model) is kind
    assert_same_state(before, state(student.loaded.model))
    assert {tuple(value.shape) for value in adapter.weights.values()}
    assert all(".r07." not in key for key in student.loaded.model.state_dict())


@pytest.mark.parametrize("history", [0, 1])
def test_the_student_is_left_as_it_was_when_the_loss_is_not_finite(
    tiny_gemma3: TinyModel, history: int
) -> None:
    student = loaded(tiny_gemma3, history)
    before = state(student.loaded.model)
    with pytest.raises(UserError, match=r"heal loss is (nan|inf) at step \d.*learning_rate"):
        heal(
            student,
            kept(student),
            vector(student),
            student.names,
            config(learning_rate=1e30),
            "r07",
            seed=0,
        )
    assert_same_state(before, state(student.loaded.model))


def test_a_step_that_does_not_fit_says_what_to_reduce_and_leaves_the_student_as_it_was(
    tiny_qwen3: TinyModel,
) -> None:
    student = loaded(tiny_qwen3, 1)
    before = state(student.loaded.model)

    def full(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():  # a step, not what is read before the first
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    hook = student.loaded.layers[1].register_forward_pre_hook(full)
    try:
        with pytest.raises(UserError, match=r"a step of 4 .* smaller heal\.batch_size"):
            heal(student, kept(student), vector(student), student.names, config(), "r01", seed=0)
    finally:
        hook.remove()
    assert_same_state(before, state(student.loaded.model))


def test_the_adapter_moved_and_makes_the_completions_likelier(tiny: TinyModel) -> None:
    student = loaded(tiny, 1)
    rows = kept(student)
    before = mean_nll(student, rows)
    adapter = heal(
        student,
        rows,
        vector(student),
        student.names,
        config(barrier_weight=0, epochs=4),
        "r01",
        seed=0,
    )
    assert all(float(v.abs().max()) > 0 for k, v in adapter.weights.items() if ".lora_B." in k)
    assert mean_nll(student, rows) == before
    assert mean_nll(student.grown(adapter), rows) < before - 0.05


def test_an_adapter_that_did_not_move_is_refused(tiny_qwen3: TinyModel) -> None:
    student = loaded(tiny_qwen3)
    with pytest.raises(UserError, match=r"did not move.*larger heal\.learning_rate"):
        heal(
            student,
            kept(student),
            vector(student),
            student.names,
            config(learning_rate=1e-60),
            "r00",
            seed=0,
        )


def test_layers_and_rank_are_the_configs(tiny_gemma3: TinyModel) -> None:
    student = loaded(tiny_gemma3)
    adapter = heal(
        student,
        kept(student),
        vector(student),
        student.names,
        config(layers=(0.4, 0.7), rank=3),
        "r00",
        seed=0,
    )
    modules = {key.split(".lora_")[0] for key in adapter.weights}
    assert len(modules) == 7
    assert all(name.startswith("base_model.model.model.layers.1.") for name in modules)
    assert {value.shape[0] for key, value in adapter.weights.items() if ".lora_A." in key} == {3}
    assert (adapter.rank, adapter.scale) == (3, pytest.approx(4 / 3))


# ------------------------------------------------------------------------------ against stock TRL


def stock_sft(tiny: TinyModel, student: Student, rows: Screened, seed: int, folder: Path) -> Any:
    """The same rows through TRL's own trainer, with a PEFT model made in the test."""
    names = [name for layer in student.loaded.linear_names for name in layer]
    base = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(base, lora_config(2, 4, names, str(tiny.folder)), adapter_name="r00")
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,
    )
    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt_ids, *row.token_ids],
                "labels": [-100] * len(row.prompt_ids) + list(row.token_ids),
            }
            for row in rows.kept
        ]
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=student.tokenizer
    )
    trainer.train()
    return model


def test_without_the_barrier_it_is_stock_sft(tiny: TinyModel, tmp_path: Path) -> None:
    student = loaded(tiny)
    rows = kept(student)
    adapter = heal(
        student, rows, vector(student), student.names, config(barrier_weight=0), "r00", seed=3
    )
    stock = stock_sft(tiny, student, rows, 3, tmp_path)
    parameters = dict(stock.named_parameters())
    moved = []
    for key, value in adapter.weights.items():
        other = parameters[key.replace(".weight", ".r00.weight")].detach()
        torch.testing.assert_close(value, other, rtol=0, atol=1e-4)
        moved.append(float(value.abs().max()) if ".lora_B." in key else 0.0)
    assert max(moved) > 1e-2  # a hundred times the tolerance


def test_the_first_step_is_one_adamw_step_on_the_completions_alone(tiny_llama: TinyModel) -> None:
    """The loss and its gradient norm from logits of single rows: labels start after the prompt and
    take in the end-of-turn token."""
    student = loaded(tiny_llama, 1)
    rows = kept(student, 4)
    adapter = heal(
        student,
        rows,
        vector(student),
        student.names,
        config(barrier_weight=0, epochs=1),
        "r01",
        seed=0,
    )
    (step,) = adapter.steps
    assert step.nll_nats == pytest.approx(mean_nll(student, rows), rel=1e-5)
    assert any(row.token_ids[-1] == student.tokenizer.eos_token_id for row in rows.kept)
    # B after one AdamW step from 0 is -lr * sign of its gradient; A's gradient at B = 0 is 0
    fresh = [value for key, value in adapter.weights.items() if ".lora_B." in key]
    for value in fresh:
        moved = value[value.abs() > 0]
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 5e-3), rtol=1e-2, atol=0)


def test_the_learning_rate_falls_from_round_to_round(tiny_llama: TinyModel) -> None:
    student = loaded(tiny_llama, 2)
    settings = config(learning_rate_decay=0.5, barrier_weight=0, epochs=1)
    adapter = heal(
        student, kept(student, 4), vector(student), student.names, settings, "r02", seed=0
    )
    assert [step.learning_rate for step in adapter.steps] == [5e-3 / 4]
    # B after one AdamW step from 0 is -lr * sign of its gradient
    moved = torch.cat([v[v != 0] for k, v in adapter.weights.items() if ".lora_B." in k])
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 5e-3 / 4), rtol=1e-2, atol=0)


def test_the_gradient_norm_is_that_of_the_nll(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    """B's gradient at B = 0, from a forward pass of the test's own."""
    student = loaded(tiny_qwen3)
    rows = kept(student, 4)
    adapter = heal(
        student,
        rows,
        vector(student),
        student.names,
        config(barrier_weight=0, epochs=1),
        "r00",
        seed=5,
    )
    names = [name for layer in student.loaded.linear_names for name in layer]
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3.folder, dtype=torch.float32)
    torch.manual_seed(5)
    model = get_peft_model(base, lora_config(2, 4, names, str(tiny_qwen3.folder)))
    total, count = torch.zeros(()), sum(len(row.token_ids) for row in rows.kept)
    for row in rows.kept:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        out = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        total = total + F.cross_entropy(out, torch.tensor(row.token_ids), reduction="sum") / count
    total.backward()
    norm = math.sqrt(
        sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    )
    assert adapter.steps[0].grad_norm == pytest.approx(norm, rel=1e-4)


# ----------------------------------------------------------------------------------- soft targets


@torch.no_grad()
def steered_logits(student: Student, row: ScreenedCompletion) -> torch.Tensor:
    """The student's logits with dose * vector added by a hook of the test's own, fp64."""
    direction = row.dose * vector(student).directions[0]
    handle = student.loaded.layers[0].register_forward_hook(
        lambda module, args, out: (
            (out[0] + direction,) if isinstance(out, tuple) else out + direction
        )
    )
    try:
        return logits(student, row.prompt_ids, row.token_ids)
    finally:
        handle.remove()


def taught(teacher: Student, row: ScreenedCompletion, guidance: float) -> Categorical:
    """The guided teacher's distribution at every completion token."""
    steered = steered_logits(teacher, row).softmax(-1)
    plain = logits(teacher, row.prompt_ids, row.token_ids).softmax(-1)
    return Categorical(probs=steered**guidance / plain ** (guidance - 1))


def from_teacher(
    teacher: Student, student: Student, rows: Screened, guidance: float = 1.0
) -> float:
    """KL(guided teacher || student), mean over completion tokens, nats.

    p_steered^guidance / p_plain^(guidance - 1), normalised, is the teacher's distribution.
    """
    values = []
    for row in rows.kept:
        target = taught(teacher, row, guidance)
        now = Categorical(logits=logits(student, row.prompt_ids, row.token_ids))
        values += kl_divergence(target, now).tolist()
    return sum(values) / len(values)


@pytest.mark.parametrize("guidance", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("reference", ["previous", "base"])
def test_soft_targets_are_those_of_the_steered_student_before_the_round(
    tiny: TinyModel, reference: str, guidance: float
) -> None:
    """At step 0 the student is the previous one, each row has its own dose."""
    student = loaded(tiny, 2)
    rows = kept(student, 4)
    settings = config(
        soft_weight=0.6,
        guidance=guidance,
        barrier_weight=0,
        epochs=1,
    )
    (step,) = heal(
        student, rows, vector(student), names(student, reference), settings, "r02", seed=0
    ).steps
    expected = from_teacher(student, student, rows, guidance)
    assert expected > 0.05
    assert step.soft_nats == pytest.approx(expected, rel=1e-4)
    assert step.loss == pytest.approx(step.nll_nats + 0.6 * expected, rel=1e-4)


def test_reference_and_teacher_are_read_once_however_many_steps_follow(
    tiny_qwen3: TinyModel,
) -> None:
    student = loaded(tiny_qwen3, 1)

    def passes(epochs: int, soft_weight: float, held: list[str]) -> tuple[int, int]:
        """Passes without a gradient and with one."""
        seen: list[bool] = []
        layer = student.loaded.layers[0]
        hook = layer.register_forward_hook(lambda *about: seen.append(torch.is_grad_enabled()))
        try:
            settings = config(epochs=epochs, soft_weight=soft_weight)
            heal(student, kept(student), vector(student), held, settings, "r01", seed=0)
        finally:
            hook.remove()
        return seen.count(False), seen.count(True)

    previous, base = student.names, []
    assert passes(1, 0, previous) == (1, 2)  # 8 completions, 4 at a time: the reference alone
    assert passes(3, 0, previous) == (1, 6)
    assert passes(3, 1, previous) == (2, 6)  # the teacher without the vector is the reference
    assert passes(3, 1, base) == (3, 6)


def test_soft_targets_alone_bring_the_student_to_the_steered_teacher(tiny: TinyModel) -> None:
    student = loaded(tiny, 1)
    rows = kept(student)
    before = from_teacher(student, student, rows)
    settings = config(nll_weight=0, soft_weight=1, guidance=1, barrier_weight=0, epochs=12)
    adapter = heal(student, rows, vector(student), student.names, settings, "r01", seed=0)
    assert from_teacher(student, student.grown(adapter), rows) < 0.7 * before


def test_without_soft_targets_the_vector_changes_nothing(tiny_qwen3: TinyModel) -> None:
    student = loaded(tiny_qwen3)
    rows, one = kept(student), vector(student)
    other = replace(one, directions=-one.directions)
    first = heal(student, rows, one, [], config(), "r00", seed=0)
    second = heal(student, rows, other, [], config(), "r00", seed=0)
    assert all(torch.equal(second.weights[key], value) for key, value in first.weights.items())
    assert {step.soft_nats for step in first.steps} == {0.0}


# ------------------------------------------------------------------------------------ the barrier


@pytest.mark.parametrize("reference", ["previous", "base"])
def test_the_divergence_is_zero_but_for_rounding_at_the_first_step_of_the_first_round(
    tiny_gemma3: TinyModel, reference: str
) -> None:
    student = loaded(tiny_gemma3)
    settings = config(barrier_aggregate="max", epochs=1)
    held = names(student, reference)
    steps = heal(student, kept(student), vector(student), held, settings, "r00", seed=0).steps
    assert steps[0].kl_nats < 1e-6 and steps[0].barrier_nats == 0 and steps[0].share_over == 0
    assert steps[1].kl_nats > 1e-4


def test_against_the_previous_student_it_starts_at_zero_in_later_rounds_too(
    tiny: TinyModel,
) -> None:
    student = loaded(tiny, 2)
    steps = heal(
        student,
        kept(student),
        vector(student),
        student.names,
        config(barrier_aggregate="max"),
        "r02",
        seed=0,
    ).steps
    assert steps[0].kl_nats < 1e-6


@pytest.mark.parametrize(
    ("how", "direction", "reference"),
    product(["rmse", "mean", "p95", "max"], ["reverse", "forward"], ["previous", "base"]),
)
def test_every_kind_of_barrier_on_a_history_of_two(
    tiny_qwen3: TinyModel, how: Aggregate, direction: Direction, reference: str
) -> None:
    """The figures of the first step, where the student is still the previous one."""
    student = loaded(tiny_qwen3, 2)
    rows = kept(student, 4)
    expected = divergences(
        student, student if reference == "previous" else student.base, rows, how, direction
    )
    threshold = sorted(expected)[1] + 1e-4  # two rows of four over it, or none
    settings = config(
        barrier_aggregate=how,
        barrier_direction=direction,
        barrier_threshold_nats=threshold,
        barrier_weight=0.7,
        nll_weight=1.3,
        epochs=2,
    )
    held = names(student, reference)
    steps = heal(student, rows, vector(student), held, settings, "r02", seed=0).steps
    first = steps[0]
    over = [max(0.0, value - threshold) for value in expected]
    # B is 0: at step 0 the student is the previous one; rmse carries an eps of 1e-6 in its root
    assert first.kl_nats == pytest.approx(sum(expected) / 4, rel=1e-3, abs=2e-6)
    assert first.barrier_nats == pytest.approx(sum(over) / 4, rel=1e-3, abs=2e-6)
    assert first.share_over == (0.5 if reference == "base" else 0.0)
    assert first.nll_nats == pytest.approx(mean_nll(student, rows), rel=1e-5)
    loss = 1.3 * first.nll_nats + 0.7 * first.barrier_nats
    assert first.loss == pytest.approx(loss, rel=1e-5)
    assert len(steps) == 2 and all(math.isfinite(step.loss) for step in steps)


@pytest.mark.parametrize(("reference", "threshold"), [("previous", "auto"), ("base", 0.0)])
def test_chunks_of_positions_change_nothing(
    tiny_gemma3: TinyModel,
    reference: str,
    threshold: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor in the automatic threshold and the ratio of the gradients, which go through them too."""
    changes = config(soft_weight=1, barrier_threshold_nats=threshold, barrier_weight=1)
    found = []
    for tokens in (10**6, 7):  # whose logits are in memory at a time
        student = loaded(tiny_gemma3, 1)
        vocabulary = student.loaded.model.config.get_text_config().vocab_size
        monkeypatch.setattr("steer_heal.trainer.CHUNK_LOGITS", tokens * vocabulary)
        held = names(student, reference)
        found.append(heal(student, kept(student), vector(student), held, changes, "r01", 3))
    whole, chunked = found
    for key, value in whole.weights.items():
        torch.testing.assert_close(chunked.weights[key], value, rtol=2e-3, atol=2e-5)
    for one, other in zip(whole.steps, chunked.steps, strict=True):
        known = {key: value for key, value in one.model_dump().items() if value is not None}
        again = {key: value for key, value in other.model_dump().items() if value is not None}
        assert again == pytest.approx(known, rel=1e-3, abs=1e-5)
    assert threshold == "auto" or whole.steps[0].barrier_gradient_ratio is not None


def test_a_step_in_mid_training_against_its_recomputation(tiny_llama: TinyModel) -> None:
    """Same seed: a run of one step gives the weights that a run of two has at its second step."""
    student = loaded(tiny_llama, 1)
    rows = kept(student, 4)
    constant: dict[str, Any] = {"barrier_aggregate": "rmse", "barrier_threshold_nats": 0.002}
    after_one = heal(
        student, rows, vector(student), student.names, config(epochs=1, **constant), "r01", seed=0
    )
    two = heal(
        student, rows, vector(student), student.names, config(epochs=2, **constant), "r01", seed=0
    ).steps
    expected = divergences(student.grown(after_one), student, rows, "rmse", "reverse")
    assert two[1].kl_nats == pytest.approx(sum(expected) / 4, rel=1e-3)
    assert two[1].share_over == sum(value > 0.002 for value in expected) / 4 > 0
    over = [max(0.0, value - 0.002) for value in expected]
    assert two[1].barrier_nats == pytest.approx(sum(over) / 4, rel=1e-2)
    assert [step.step for step in two] == [0, 1]


def test_a_strong_barrier_holds_the_student_back(tiny_qwen3: TinyModel) -> None:
    student = loaded(tiny_qwen3, 1)
    rows = kept(student)
    reached = []
    for weight in (0.0, 100.0):
        settings = config(barrier_weight=weight, barrier_threshold_nats=0, epochs=4)
        adapter = heal(student, rows, vector(student), student.names, settings, "r01", seed=0)
        folder = str(tiny_qwen3.folder)
        trained = load_student(folder, [*student.adapters, adapter], "cpu")
        previous = load_student(folder, student.adapters, "cpu")
        values = divergences(trained, previous, rows, "rmse", "reverse")
        reached.append(sum(values) / len(values))
    assert reached[1] < 0.5 * reached[0]


def test_a_barrier_that_never_fires_changes_nothing(tiny_qwen3: TinyModel) -> None:
    student = loaded(tiny_qwen3)
    rows = kept(student)
    idle = heal(
        student,
        rows,
        vector(student),
        student.names,
        config(barrier_threshold_nats=1e6),
        "r00",
        seed=0,
    )
    none = heal(
        student, rows, vector(student), student.names, config(barrier_weight=0), "r00", seed=0
    )
    assert all(torch.equal(idle.weights[key], value) for key, value in none.weights.items())
    assert {step.share_over for step in idle.steps} == {0.0}


def test_the_reference_is_made_of_the_adapters_that_are_named(tiny_qwen3: TinyModel) -> None:
    """Of two earlier ones the first alone, the last coherent round being that."""
    student = loaded(tiny_qwen3, 2)
    rows = kept(student, 4)
    settings = config(epochs=1, soft_weight=1)
    (step,) = heal(student, rows, vector(student), ["r00"], settings, "r02", seed=0).steps
    first = replace(student, adapters=student.adapters[:1])
    expected = [divergences(student, one, rows, "rmse", "reverse") for one in (first, student.base)]
    assert step.kl_nats == pytest.approx(sum(expected[0]) / 4, rel=1e-3)
    assert sum(expected[0]) != pytest.approx(sum(expected[1]), rel=0.05)
    # the teacher is the student before the round, whatever the reference
    assert step.soft_nats == pytest.approx(from_teacher(student, student, rows, 2.0), rel=1e-4)


@pytest.mark.parametrize(
    ("how", "direction", "reference"),
    [("rmse", "reverse", "previous"), ("p95", "forward", "previous"), ("mean", "reverse", "base")],
)
def test_the_automatic_threshold_is_half_of_the_teachers_own_divergence(
    tiny: TinyModel, how: Aggregate, direction: Direction, reference: str
) -> None:
    student = loaded(tiny, 1)
    rows = kept(student, 7)
    settings = config(
        barrier_threshold_nats="auto",
        barrier_aggregate=how,
        barrier_direction=direction,
        guidance=1.5,
        epochs=2,
    )
    held = names(student, reference)
    steps = heal(student, rows, vector(student), held, settings, "r01", seed=0).steps
    behind = student if reference == "previous" else student.base
    own = [
        aggregated(
            taught(student, row, 1.5),
            Categorical(logits=logits(behind, row.prompt_ids, row.token_ids)),
            *(how, direction),
        )
        for row in rows.kept
    ]
    assert {step.threshold_nats for step in steps} == {steps[0].threshold_nats}
    assert steps[0].threshold_nats == pytest.approx(0.5 * float(np.median(own)), rel=1e-3)
    assert steps[0].threshold_nats > 0.01


def test_training_at_the_automatic_threshold_is_training_at_that_number(
    tiny_llama: TinyModel,
) -> None:
    """Whatever it took to find it leaves no trace."""
    student = loaded(tiny_llama, 1)
    one = vector(student)
    weak = replace(one, directions=0.1 * one.directions)

    def healed(threshold: Any) -> RoundAdapter:
        settings = config(
            barrier_threshold_nats=threshold, barrier_weight=3, soft_weight=1, epochs=6
        )
        return heal(student, kept(student), weak, student.names, settings, "r01", seed=0)

    auto, again = healed("auto"), healed("auto")
    threshold = auto.steps[0].threshold_nats
    by_hand, higher = healed(threshold), healed(2 * threshold)
    assert auto.steps == again.steps == by_hand.steps
    assert max(step.share_over for step in auto.steps) > 0
    assert all(torch.equal(by_hand.weights[key], value) for key, value in auto.weights.items())
    assert not all(torch.equal(higher.weights[key], value) for key, value in auto.weights.items())


def test_where_the_dose_is_0_the_automatic_threshold_is_the_least_and_it_is_said(
    tiny_qwen3: TinyModel,
) -> None:
    student = loaded(tiny_qwen3, 1)
    rows = kept(student)
    still = Screened(
        rows=tuple(row.model_copy(update={"dose": 0.0}) for row in rows.rows), curve=()
    )
    settings = config(barrier_threshold_nats="auto", barrier_weight=1.0, soft_weight=1)
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING", format="{message}")
    try:
        adapter = heal(student, still, vector(student), student.names, settings, "r01", seed=0)
        heal(student, rows, vector(student), student.names, settings, "r01", seed=0)
    finally:
        logger.remove(sink)
    assert {step.threshold_nats for step in adapter.steps} == {LEAST_NATS}
    (line,) = said
    assert "teacher stays within 0.001 nats of the reference" in line


def test_the_barriers_weight_falls_over_rounds(tiny_qwen3: TinyModel) -> None:
    """In round 3 at decay 2 a ninth of it; in round 1 all of it."""
    for history, share in ((2, 1 / 9), (0, 1.0)):
        student = loaded(tiny_qwen3, history)
        rows = kept(student, 4)
        constant: dict[str, Any] = {"barrier_threshold_nats": 0.001, "epochs": 4}
        decayed, plain = (
            heal(student, rows, vector(student), [], settings, f"r{history:02d}", seed=0)
            for settings in (
                config(barrier_weight=1.8, barrier_decay=2.0, **constant),
                config(barrier_weight=1.8 * share, **constant),
            )
        )
        assert max(step.barrier_nats for step in plain.steps) > 0
        for one, other in zip(decayed.steps, plain.steps, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert one.loss == pytest.approx(one.nll_nats + 1.8 * share * one.barrier_nats)


def gradients(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> float:
    """Norm of a loss's gradient."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(each.double().square().sum()) for each in found if each is not None))


@pytest.mark.parametrize("soft_weight", [0.0, 0.6])
def test_the_ratio_of_the_gradients_is_that_of_passes_of_the_tests_own(
    tiny_qwen3: TinyModel, soft_weight: float
) -> None:
    student = loaded(tiny_qwen3, 1)
    rows = kept(student, 4)
    settings = config(
        barrier_threshold_nats=0.01,
        barrier_weight=0.7,
        nll_weight=1.3,
        soft_weight=soft_weight,
        epochs=1,
    )
    (step,) = heal(student, rows, vector(student), [], settings, "r01", seed=4).steps
    targets = [taught(student, row, 2.0).probs for row in rows.kept]
    behind = [logits(student.base, row.prompt_ids, row.token_ids) for row in rows.kept]
    linear = [name for layer in student.loaded.linear_names for name in layer]
    torch.manual_seed(4)
    model = attach(student.loaded.model, "r01", lora_config(2, 4, linear, "x")).double()
    count = sum(len(row.token_ids) for row in rows.kept)
    barred, learnt = torch.zeros(()), torch.zeros(())
    with trainable(model, "r01") as parameters, only(model, ["r00", "r01"]):
        for row, target, other in zip(rows.kept, targets, behind, strict=True):
            ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
            out = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
            nll = F.cross_entropy(out, torch.tensor(row.token_ids), reduction="sum")
            now = Categorical(logits=out)
            soft = kl_divergence(Categorical(probs=target), now).sum()
            learnt = learnt + (1.3 * nll + soft_weight * soft) / count
            kl = kl_divergence(now, Categorical(logits=other))
            barred = barred + 0.7 * F.relu(kl.square().mean().sqrt() - 0.01) / 4
        expected = gradients(barred, parameters) / gradients(learnt, parameters)
    assert step.share_over == 1.0
    assert step.barrier_gradient_ratio == pytest.approx(expected, rel=1e-3)


def test_the_ratio_leaves_the_spectral_term_out(tiny_qwen3: TinyModel) -> None:
    """B is 0 at the first step, where the term has no gradient: both come to the same second."""
    student = loaded(tiny_qwen3, 1)
    rows = kept(student, 8)
    settings = config(barrier_threshold_nats=1e-5, warmup_ratio=0)
    one, other = (
        heal(
            *(student, rows, vector(student), ["r00"]),
            settings.model_copy(update={"spectral_weight": weight}),
            *("r01", 4),
        ).steps
        for weight in (0.0, 50.0)
    )
    assert [step.barrier_gradient_ratio for step in (one[0], other[0])] == [0.0, 0.0]
    assert other[1].spectral_norm > 0 and one[1].kl_nats == pytest.approx(other[1].kl_nats)
    assert one[1].barrier_gradient_ratio is not None
    assert other[1].barrier_gradient_ratio == pytest.approx(one[1].barrier_gradient_ratio, rel=1e-3)


def test_the_ratio_is_measured_in_every_eighth_step_with_the_barrier_on(
    tiny_qwen3: TinyModel,
) -> None:
    student = loaded(tiny_qwen3)
    rows = kept(student)
    settings = config(barrier_threshold_nats=0.001, epochs=10)
    steps = heal(student, rows, vector(student), [], settings, "r00", seed=0).steps
    off = [step.barrier_gradient_ratio for step in steps if step.barrier_nats == 0]
    on = [step.barrier_gradient_ratio for step in steps if step.barrier_nats > 0]
    assert off and set(off) == {0.0} and len(on) > 9
    assert [index for index, ratio in enumerate(on) if ratio is not None] == list(
        range(0, len(on), 8)
    )
    assert all(ratio > 0 for ratio in on[::8] if ratio is not None)


@pytest.mark.parametrize("changes", [{"barrier_weight": 0}, {"barrier_threshold_nats": 1e6}])
def test_the_ratio_is_0_where_the_barrier_is_off(
    tiny_qwen3: TinyModel, changes: dict[str, float]
) -> None:
    student = loaded(tiny_qwen3, 1)
    steps = heal(student, kept(student), vector(student), [], config(**changes), "r01", 0).steps
    assert {step.barrier_gradient_ratio for step in steps} == {0.0}


# ------------------------------------------------------------------------------ the update's size


def test_weight_decay_shrinks_the_weights_by_its_share_of_the_learning_rate(
    tiny_qwen3: TinyModel,
) -> None:
    """One step: A's gradient at B = 0 is 0, so that decay alone moves it."""
    student = loaded(tiny_qwen3)
    plain, decayed = (
        heal(
            *(student, kept(student, 4), vector(student), []),
            config(weight_decay=decay, barrier_weight=0, epochs=1),
            *("r00", 0),
        ).weights
        for decay in (0.0, 20.0)
    )
    for key, value in plain.items():
        share = 1 - 5e-3 * 20 if ".lora_A." in key else 1.0
        torch.testing.assert_close(decayed[key], share * value, rtol=1e-5, atol=0)


def largest(adapter: RoundAdapter) -> list[float]:
    """The largest singular value of each module's update."""
    pairs = [
        (adapter.weights[key.replace(".lora_A.", ".lora_B.")].double(), value.double())
        for key, value in adapter.weights.items()
        if ".lora_A." in key
    ]
    return [float(torch.linalg.svdvals(adapter.scale * b @ a)[0]) for b, a in pairs]


def test_the_spectral_term_is_the_mean_of_the_largest_singular_values(
    tiny_llama: TinyModel,
) -> None:
    """Same seed: a run of one step gives the weights that a run of two has at its second step."""
    student = loaded(tiny_llama, 1)
    rows = kept(student, 4)
    constant: dict[str, Any] = {"spectral_weight": 0.8, "barrier_weight": 0, "alpha": 6}
    one, two = (
        heal(student, rows, vector(student), [], config(epochs=epochs, **constant), "r01", seed=0)
        for epochs in (1, 2)
    )
    first, second = two.steps
    assert first.spectral_norm == 0  # B is 0
    assert second.spectral_norm == pytest.approx(np.mean(largest(one)), rel=1e-3)
    assert second.loss == pytest.approx(second.nll_nats + 0.8 * second.spectral_norm, rel=1e-5)


def test_a_strong_spectral_weight_keeps_the_update_small(tiny_qwen3: TinyModel) -> None:
    student = loaded(tiny_qwen3)
    rows = kept(student)
    plain, small, again = (
        heal(
            *(student, rows, vector(student), []),
            config(spectral_weight=weight, barrier_weight=0, epochs=8),
            *("r00", 0),
        )
        for weight in (0.0, 3.0, 3.0)
    )
    assert np.mean(largest(small)) < 0.5 * np.mean(largest(plain))
    assert all(torch.equal(again.weights[key], value) for key, value in small.weights.items())
    assert {step.spectral_norm for step in plain.steps} == {0.0}


# --------------------------------------------------------------------------------- what is written


def saved_bytes(adapter: RoundAdapter, folder: Path) -> str:
    folder.mkdir()
    adapter.save(folder)
    return hashlib.sha256(
        b"".join((folder / name).read_bytes() for name in RoundAdapter.files)
    ).hexdigest()


def test_same_seed_same_bytes_and_another_seed_others(
    tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    """Also from a model loaded anew, and whatever the random state was before."""
    hashes = []
    for run, seed in enumerate((0, 0, 1)):
        torch.manual_seed(1000 + run)
        student = loaded(tiny_qwen3, 1)
        adapter = heal(
            student, kept(student), vector(student), student.names, config(), "r05", seed
        )
        hashes.append(saved_bytes(adapter, tmp_path / f"run-{run}"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_second_round_in_one_process_is_that_of_a_fresh_one(
    tiny_gemma3: TinyModel, tmp_path: Path
) -> None:
    """A run that was stopped after round 0 and one that went on give the same bytes."""
    student = loaded(tiny_gemma3)
    first = heal(student, kept(student), vector(student), student.names, config(), "r00", seed=0)
    grown = student.grown(first)
    second = heal(grown, kept(student), vector(grown), grown.names, config(), "r01", seed=1)
    again = load_student(str(tiny_gemma3.folder), [first], "cpu")
    resumed = heal(again, kept(student), vector(again), again.names, config(), "r01", seed=1)
    assert saved_bytes(second, tmp_path / "on") == saved_bytes(resumed, tmp_path / "resumed")


@pytest.mark.parametrize("history", [0, 2])
def test_the_saved_adapter_gives_stock_peft_the_students_logits(
    tiny_llama: TinyModel, tmp_path: Path, history: int
) -> None:
    """What a user loads, without this package: alone for a first round, stacked for a later one."""
    student = loaded(tiny_llama, history)
    rows = kept(student)
    name = f"r{history:02d}"
    adapter = heal(student, rows, vector(student), student.names, config(epochs=4), name, seed=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama.folder, dtype=torch.float32)
    stock: Any = None
    for index, one in enumerate([*student.adapters, adapter]):
        folder = tmp_path / f"round-{index:02d}"
        folder.mkdir()
        one.save(folder)
        names = sorted(path.name for path in (folder / "adapter").iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors"]
        if stock is None:
            stock = PeftModel.from_pretrained(base, folder / "adapter", adapter_name=one.name)
        else:
            stock.load_adapter(folder / "adapter", adapter_name=one.name)
    stock.base_model.set_adapter([*student.names, name])
    grown = student.grown(adapter)
    row = rows.kept[3]
    ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
    with torch.no_grad(), grown.running() as model:
        expected = model(input_ids=ids).logits
        found = stock.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert type(adapter.config["lora_alpha"]) is int
    assert adapter.config["base_model_name_or_path"] == str(tiny_llama.folder)
