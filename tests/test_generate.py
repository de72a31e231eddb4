"""Steered sampling: where each completion comes from, and what the steering did to it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from eval.chat import chat_ids
from eval.coherence import is_loop
from eval.sampling import sample_replies
from steer_heal.artifacts import Completions, Doses, SteeringVector
from steer_heal.config import GenerateConfig, VectorConfig
from steer_heal.generate import generate_steered
from steer_heal.model import Student, load_student
from steer_heal.trait import Trait, load_trait
from steer_heal.vector import extract_vector
from tests.conftest import TinyModel
from tests.small import small_trait
from tests.test_stack import random_adapter

CONFIG = GenerateConfig(num_drafts=24, max_new_tokens=16, batch_size=8)


def given(*doses: float) -> Doses:
    return Doses(doses=doses, asked=doses, carried=None, probe=(), passing=())


DOSES = given(0.0, 0.3, 1.0)


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Trait:
    return load_trait(str(small_trait(tmp_path_factory.mktemp("trait"))))


def steered(tiny: TinyModel, trait: Trait) -> tuple[Student, SteeringVector]:
    student = load_student(str(tiny.folder), [], "cpu")
    student = student.grown(random_adapter(student, "r00", [0], 2, 1, seed=1))
    return student, extract_vector(
        student, trait, VectorConfig(num_contexts=8, band=(0.5, 1.0)), seed=0
    )


def likely_to_stop(student: Student) -> set[int]:
    """A random model hardly ever ends a reply: gives it twenty tokens that do; returns them all."""
    student.loaded.model.generation_config.eos_token_id = list(range(60, 80))
    return {student.tokenizer.eos_token_id, *range(60, 80)}


def generated(tiny: TinyModel, trait: Trait, config: GenerateConfig = CONFIG) -> Completions:
    student, vector = steered(tiny, trait)
    return generate_steered(student, vector, DOSES, trait, config, seed=5)


def test_prompts_and_doses_take_turns(tiny_qwen3: TinyModel, trait: Trait) -> None:
    rows = generated(tiny_qwen3, trait).rows
    assert Counter(row.dose for row in rows) == {0.0: 8, 0.3: 8, 1.0: 8}
    assert Counter(row.prompt_index for row in rows) == dict.fromkeys(range(8), 3)
    assert len({(row.prompt_index, row.dose) for row in rows}) == 24


def test_where_a_completion_comes_from(tiny: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny, trait)
    stops = likely_to_stop(student)
    rows = generate_steered(student, vector, DOSES, trait, CONFIG, seed=5).rows
    tokenizer = student.tokenizer
    for row in rows:
        assert row.prompt == trait.prompts[row.prompt_index]
        assert list(row.prompt_ids) == chat_ids(tokenizer, row.prompt)
        assert row.text == tokenizer.decode(row.token_ids, skip_special_tokens=True)
        assert row.seed == 5
        assert row.finished == (row.token_ids[-1] in stops)
        assert not stops & set(row.token_ids[:-1])
        assert row.finished or len(row.token_ids) == CONFIG.max_new_tokens
    finished = [row.finished for row in rows]
    assert any(finished) and not all(finished)


def test_same_seed_same_ids_and_another_seed_others(tiny_llama: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny_llama, trait)
    ids = [
        [
            row.token_ids
            for row in generate_steered(student, vector, DOSES, trait, CONFIG, seed).rows
        ]
        for seed in (5, 5, 6)
    ]
    assert ids[0] == ids[1]
    assert all(one != two for one, two in zip(ids[0], ids[2], strict=True))


def test_dose_zero_is_the_student_unsteered(tiny: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny, trait)
    config = GenerateConfig(num_drafts=8, max_new_tokens=16, batch_size=3)
    rows = generate_steered(student, vector, given(0.0), trait, config, seed=9).rows
    prompts = [chat_ids(student.tokenizer, turn) for turn in trait.prompts]
    with student.running() as model:
        plain = sample_replies(
            model, student.tokenizer, prompts, seed=9, max_new_tokens=16, batch_size=3
        )
    assert [row.token_ids for row in rows] == [reply.token_ids for reply in plain]
    assert [row.kl_p95_nats for row in rows] == [0.0] * 8


def test_a_completion_is_the_same_beside_other_doses_and_alone(
    tiny: TinyModel, trait: Trait
) -> None:
    """Rows leave their batch as they end; those that go on keep their own doses."""
    student, vector = steered(tiny, trait)
    likely_to_stop(student)
    together, alone = (
        generate_steered(
            student, vector, DOSES, trait, CONFIG.model_copy(update={"batch_size": size}), seed=5
        ).rows
        for size in (24, 1)
    )
    assert [row.token_ids for row in together] == [row.token_ids for row in alone]
    assert len({len(row.token_ids) for row in alone}) > 3


def test_a_dose_changes_what_is_said(tiny_qwen3: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny_qwen3, trait)
    config = GenerateConfig(num_drafts=8, max_new_tokens=16)
    said = [
        [row.token_ids for row in generate_steered(student, vector, one, trait, config, 9).rows]
        for one in (given(0.0), given(1.0))
    ]
    assert sum(one != two for one, two in zip(*said, strict=True)) >= 6


@torch.no_grad()
def slow_kl(
    student: Student, vector: SteeringVector, prompt: list[int], ids: list[int], dose: float
):
    """KL(steered || student) at each completion token, one row at a time, in fp64."""
    logits = []
    for factor in (dose, 0.0):
        handles = [
            student.loaded.layers[layer].register_forward_hook(
                lambda module, args, out, added=factor * vector.directions[layer]: out + added
            )
            for layer in vector.band
        ]
        with student.running() as model:
            out = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
        for handle in handles:
            handle.remove()
        logits.append(out[len(prompt) - 1 : -1])
    assert len(logits[0]) == len(ids)
    return kl_divergence(Categorical(logits=logits[0]), Categorical(logits=logits[1]))


def test_kl_is_measured_on_the_first_drafts_of_every_dose(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    config, doses = GenerateConfig(num_drafts=70, max_new_tokens=4), given(0.3, 1.0)
    rows = generate_steered(student, vector, doses, trait, config, seed=2).rows
    for dose in doses.doses:
        known = [row.kl_p95_nats is not None for row in rows if row.dose == dose]
        assert known == [True] * 32 + [False] * 3


def test_kl_p95_equals_a_slow_one(tiny: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny, trait)
    likely_to_stop(student)  # completions of different lengths in a batch
    rows = generate_steered(student, vector, DOSES, trait, CONFIG, seed=2).rows
    assert len({len(row.token_ids) for row in rows}) > 2
    for row in rows:
        kl = slow_kl(student, vector, list(row.prompt_ids), list(row.token_ids), row.dose)
        expected = float(np.quantile(kl.numpy(), 0.95))
        assert row.kl_p95_nats == pytest.approx(expected, rel=2e-3, abs=1e-5)
    by_dose = {
        dose: np.median([row.kl_p95_nats for row in rows if row.dose == dose])
        for dose in DOSES.doses
    }
    assert 0 == by_dose[0.0] < by_dose[0.3] < by_dose[1.0]


def test_a_row_that_has_become_a_loop_is_ended_there(tiny_qwen3: TinyModel, trait: Trait) -> None:
    """Nearly greedy, a random model says the same again and again before long."""
    config = CONFIG.model_copy(update={"temperature": 1e-3, "max_new_tokens": 160})
    rows = generated(tiny_qwen3, trait, config).rows
    loops = [row for row in rows if is_loop(row.token_ids)]
    assert loops and all(not row.finished for row in loops)
    assert all(not is_loop(row.token_ids[:-8]) and len(row.token_ids) % 8 == 0 for row in loops)
    assert any(len(row.token_ids) < 160 for row in loops)


def test_nothing_stays_hooked(tiny_qwen3: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny_qwen3, trait)
    before = [len(layer._forward_hooks) for layer in student.loaded.layers]
    generate_steered(student, vector, DOSES, trait, CONFIG, seed=2)
    assert [len(layer._forward_hooks) for layer in student.loaded.layers] == before
