"""Evaluation: the same items in every condition, and no difference where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.chat import chat_ids, text_ids
from eval.coherence import Surprisal, TextFigures
from eval.errors import UserError
from eval.forced_choice import forced_choice
from eval.sampling import sample_replies, stop_token_ids
from eval.suite import NeutralSuite, load_suite
from steer_heal.artifacts import (
    ConditionEval,
    Controls,
    RoundAdapter,
    RoundEval,
    Screened,
    ScreenedCompletion,
    SteeringVector,
)
from steer_heal.config import EvaluateConfig, VectorConfig
from steer_heal.evaluate import evaluate_controls, evaluate_round
from steer_heal.model import Student, load_student
from steer_heal.scoring import score_completions
from steer_heal.steering import _matching_dose, _seed_of, random_like
from steer_heal.trait import Trait, load_trait
from steer_heal.vector import extract_vector
from tests.conftest import TinyModel
from tests.small import FOUNDATIONS, small_neutral, small_suites, small_trait
from tests.test_stack import random_adapter


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Trait:
    return load_trait(str(small_trait(tmp_path_factory.mktemp("trait"))))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    folder = tmp_path_factory.mktemp("suites")
    choices, tasks = small_suites(folder)
    return EvaluateConfig(
        suite=str(choices),
        tasks=str(tasks),
        neutral=str(small_neutral(folder)),
        samples_per_prompt=3,
        num_dialogues=3,
        max_new_tokens=12,
        batch_size=5,
    )


def kept_at(*doses: float) -> Screened:
    return Screened(
        rows=tuple(
            ScreenedCompletion(
                prompt_index=0,
                prompt="x",
                prompt_ids=(1, 5, 9, 7),
                token_ids=(3, 8, 12, 6, 4),
                text="",
                dose=dose,
                seed=0,
                finished=True,
                kl_p95_nats=0.0,
                surprisal=Surprisal(mean_nll_nats=1, tail_nll_nats=1, rmse_nll_nats=1),
                figures=TextFigures(**dict.fromkeys(TextFigures.model_fields, 0)),
                brokenness=0.0,
                persona_share=0.0,
                enactment_nats=0.0,
                dropped=None,
            )
            for dose in doses
        ),
        curve=(),
    )


def vector_of(student: Student, trait: Trait) -> SteeringVector:
    return extract_vector(student, trait, VectorConfig(num_contexts=8, band=(0.5, 1.0)), seed=0)


def loaded(tiny: TinyModel) -> Student:
    """A random model hardly ever ends a reply; here one token in five does, to save time."""
    ends = list(range(0, len(tiny.tokenizer), 5))
    student = load_student(str(tiny.folder), [], "cpu")
    student.loaded.model.generation_config.eos_token_id = ends
    return student


def idle(student: Student, name: str) -> RoundAdapter:
    """An adapter with B = 0."""
    adapter = random_adapter(student, name, [0, 1], 2, 4, seed=1)
    weights = {
        key: torch.zeros_like(value) if ".lora_B." in key else value
        for key, value in adapter.weights.items()
    }
    return RoundAdapter(name=name, config=adapter.config, weights=weights, steps=())


def rows(condition: ConditionEval) -> dict[str, Any]:
    return condition.model_dump(exclude={"condition", "dose", "kl_nats"})


def test_an_adapter_that_does_nothing_leaves_every_row_as_it_was(
    tiny: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny)
    vector = vector_of(base, trait)
    controls = evaluate_controls(base, vector, kept_at(0.5), trait, config, seed=0)
    healed = base.grown(idle(base, "r00"))
    found = evaluate_round(base, healed, vector, kept_at(0.5), trait, config, seed=0)
    assert rows(found.healed) == rows(controls.base)
    assert rows(found.steered) != rows(controls.base)


def test_an_adapter_that_does_something_is_seen_and_the_base_is_not_moved_by_it(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_qwen3)
    vector = vector_of(base, trait)
    before = evaluate_controls(base, vector, kept_at(0.5), trait, config, seed=0)
    healed = base.grown(random_adapter(base, "r00", [0, 1], 2, 4, seed=1))
    found = evaluate_round(base, healed, vector, kept_at(0.5), trait, config, seed=0)
    assert rows(found.healed) != rows(before.base)
    after = evaluate_controls(healed, vector, kept_at(0.5), trait, config, seed=0)
    assert after == before


def test_steering_by_nothing_is_the_student(
    tiny_llama: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_llama)
    vector = vector_of(base, trait)
    same = config.model_copy(update={"num_random": 1})  # as many replies to both
    found = evaluate_round(base, base, vector, kept_at(0.0), trait, same, seed=0)
    assert rows(found.steered) == rows(found.healed)


def test_every_condition_has_every_item(
    tiny_llama: TinyModel, trait: Trait, config: EvaluateConfig, tmp_path: Path
) -> None:
    base = loaded(tiny_llama)
    vector = vector_of(base, trait)
    kept = kept_at(0.25, 0.5, 0.75, 0.5)
    controls = evaluate_controls(base, vector, kept, trait, config, seed=0)
    found = evaluate_round(base, base, vector, kept, trait, config, seed=0)
    conditions = {
        "base": controls.base,
        "prompted": controls.prompted,
        "engineered": controls.engineered,
        **{f"random {draw}": each for draw, each in enumerate(controls.random, start=1)},
        "steered": found.steered,
        "healed": found.healed,
    }
    assert len(controls.random) == config.num_random == 3
    assert found.steered.dose == 0.5
    for name, condition in conditions.items():
        assert condition.condition == name
        assert (condition.dose is not None) == name.startswith(("random", "steered"))
        assert (condition.kl_nats is None) == (condition.dose is None)
        assert [row.id for row in condition.choices] == list(FOUNDATIONS)
        assert all(tuple(row.scores) == FOUNDATIONS for row in condition.choices)
        assert [row.id for row in condition.tasks] == [f"sum-{n}" for n in range(4)]
        samples = 1 if name.startswith(("random", "steered")) else 3  # fewer with a vector added
        assert [(row.prompt_index, row.sample) for row in condition.replies] == [
            (prompt, sample) for prompt in range(4) for sample in range(samples)
        ]
        assert all(row.enacted == (row.enactment_nats > 0) for row in condition.replies)
        assert all(0 < row.pmass <= 1 for row in condition.choices)
        assert [row.prompt_index for row in condition.second_replies] == [0, 1, 2]
        assert [row.id for row in condition.neutral] == ["told-0", "told-1", "told-2"]
    assert len({str(rows(condition)) for name, condition in conditions.items()}) == 7
    assert rows(conditions["base"]) == rows(conditions["healed"])  # the same student

    controls.save(tmp_path)
    found.save(tmp_path)
    assert Controls.load(tmp_path) == controls
    assert RoundEval.load(tmp_path) == found


def test_the_conditions_are_what_they_say(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    """Each recomputed from the probes, with hooks and system prompts of the test's own."""
    student = loaded(tiny_qwen3)
    student = student.grown(random_adapter(student, "r00", [0], 2, 1, seed=1))
    vector = vector_of(student, trait)
    kept = kept_at(0.2, 0.6)
    controls = evaluate_controls(student.base, vector, kept, trait, config, seed=3)
    found = evaluate_round(student, student, vector, kept, trait, config, seed=3)
    suite = load_suite(config.suite)

    prompted = forced_choice(
        tiny_qwen3.model, student.tokenizer, suite, trait.positive, config.batch_size
    ).rows
    for one, two in zip(controls.prompted.choices, prompted, strict=True):
        assert one.scores == pytest.approx(two.scores, abs=1e-5)
    prompts = [chat_ids(student.tokenizer, turn, trait.positive) for turn in trait.held_out_prompts]
    with student.base.running() as model:
        replies = sample_replies(
            model,
            student.tokenizer,
            [prompt for prompt in prompts for _ in range(3)],
            seed=3,
            max_new_tokens=12,
            batch_size=config.batch_size,
        )
    assert [row.text for row in controls.prompted.replies] == [
        student.tokenizer.decode(reply.token_ids, skip_special_tokens=True) for reply in replies
    ]
    turns = [turn for turn in trait.held_out_prompts for _ in range(3)]
    scores = score_completions(
        student, trait, turns, [reply.token_ids for reply in replies], config.batch_size
    )
    assert [row.enactment_nats for row in controls.prompted.replies] == [
        score.enactment_nats for score in scores
    ]

    handles = [
        student.loaded.layers[layer].register_forward_hook(
            lambda module, args, out, v=vector.directions[layer]: out + 0.4 * v
        )
        for layer in vector.band
    ]
    with student.running() as model:
        steered = forced_choice(model, student.tokenizer, suite, None, config.batch_size).rows
    for handle in handles:
        handle.remove()
    for one, two in zip(found.steered.choices, steered, strict=True):
        assert one.scores == pytest.approx(two.scores, abs=1e-5)


def test_second_replies_follow_the_first_and_a_second_turn(
    tiny: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    """Each dialogue is rendered whole here; its reply is scored in one plain row."""
    base = loaded(tiny)
    vector, tokenizer = vector_of(base, trait), base.tokenizer
    turns = ("Are you sure?", "Why is that?")
    asked = trait.model_copy(update={"second_turns": turns})
    found = evaluate_controls(base, vector, kept_at(0.5), asked, config, seed=3).prompted
    ends = set(stop_token_ids(base.loaded.model, tokenizer))
    prompts = [chat_ids(tokenizer, turn, trait.positive) for turn in trait.held_out_prompts]
    with base.running() as model:
        firsts = sample_replies(
            model,
            tokenizer,
            [prompt for prompt in prompts for _ in range(3)],
            seed=3,
            max_new_tokens=12,
            batch_size=config.batch_size,
        )[::3]
    followings = []
    for index, reply in enumerate(firsts[:3]):
        said = [token for token in reply.token_ids if token not in ends]
        assert len(said) >= len(reply.token_ids) - 1
        followings.append([*said, *text_ids(tokenizer, _turned(tiny.family, turns[index % 2]))])
    with base.running() as model:
        replies = sample_replies(
            model,
            tokenizer,
            [[*prompt, *more] for prompt, more in zip(prompts, followings, strict=False)],
            seed=int(np.random.SeedSequence(3, spawn_key=(1,)).generate_state(1)[0]),
            max_new_tokens=12,
            batch_size=config.batch_size,
        )
    for index, (row, reply) in enumerate(zip(found.second_replies, replies, strict=True)):
        assert row.text == tokenizer.decode(reply.token_ids, skip_special_tokens=True)
        logps = [
            _logprobs(
                base,
                [*chat_ids(tokenizer, trait.held_out_prompts[index], persona), *followings[index]],
                reply.token_ids,
            )
            for persona in (None, trait.positive, trait.negative)
        ]
        tail = logps[0][-max(1, len(logps[0]) // 4) :]
        assert row.surprisal.tail_nll_nats == pytest.approx(-float(tail.mean()), abs=1e-4)
        assert row.surprisal.mean_nll_nats == pytest.approx(-float(logps[0].mean()), abs=1e-4)
        assert row.enacted == bool((logps[1] - logps[2]).mean() > 0)


def _turned(family: str, user: str) -> str:
    """From the end of an assistant's turn to the next one's tag, as the family writes it."""
    return {
        "qwen3": f"<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
        "llama": f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "gemma3": f"<end_of_turn>\n<start_of_turn>user\n{user}<end_of_turn>\n"
        "<start_of_turn>model\n",
    }[family]


@torch.no_grad()
def _logprobs(student: Student, prompt: list[int], reply: Sequence[int]) -> torch.Tensor:
    """Log-probability of each of the reply's tokens, one row, in double precision: [tokens]."""
    with student.running() as model:
        logits = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0].double()
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(-1, torch.tensor(reply)[:, None])[:, 0]


def test_words_decide_of_a_second_reply_as_of_a_first(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_qwen3)
    vector = vector_of(base, trait)
    told = trait.model_copy(update={"acts": ("[aeiou]",), "acts_opposite": ("z",)})
    signs, words = (
        evaluate_round(base, base, vector, kept_at(0.5), each, config, seed=0).healed
        for each in (trait, told)
    )
    for one, two in zip(signs.second_replies, words.second_replies, strict=True):
        assert (one.text, one.surprisal) == (two.text, two.surprisal)
        vowel = any(letter in two.text.lower() for letter in "aeiou")
        assert two.enacted == (vowel and "z" not in two.text.lower())
    assert rows(signs) != rows(words)


def test_enactment_is_kept_where_it_decides_and_of_base(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_qwen3)
    vector = vector_of(base, trait)
    told = trait.model_copy(update={"acts": ("[aeiou]",), "acts_opposite": ("z",)})
    signs, words = (
        evaluate_controls(base, vector, kept_at(0.5), each, config, seed=0)
        for each in (trait, told)
    )
    assert all(reply.enactment_nats is not None for reply in signs.prompted.replies)
    assert all(reply.enactment_nats is None for reply in words.prompted.replies)
    for one, two in zip(signs.base.replies, words.base.replies, strict=True):
        assert (one.enactment_nats, one.surprisal) == (two.enactment_nats, two.surprisal)
    for one, two in zip(signs.prompted.replies, words.prompted.replies, strict=True):
        assert one.surprisal == two.surprisal


def test_neutral_text_is_read_by_the_condition_itself(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_qwen3)
    vector = vector_of(base, trait)
    healed = base.grown(random_adapter(base, "r00", [0, 1], 2, 4, seed=1))
    controls = evaluate_controls(base, vector, kept_at(0.5), trait, config, seed=0)
    found = evaluate_round(base, healed, vector, kept_at(0.5), trait, config, seed=0)
    conditions = (controls.base, base, None), (controls.prompted, base, trait.positive)
    for condition, student, system in (*conditions, (found.healed, healed, None)):
        for row, item in zip(
            condition.neutral, load_suite(config.neutral, NeutralSuite).items, strict=True
        ):
            reply = text_ids(base.tokenizer, item.reply)
            logp = _logprobs(student, chat_ids(base.tokenizer, item.prompt, system), reply)
            assert row.tokens == len(reply)
            assert row.nll_nats == pytest.approx(-float(logp.sum()), abs=1e-3)
    told = [condition.neutral for condition in (controls.base, controls.prompted, found.steered)]
    assert len({str(each) for each in [*told, found.healed.neutral]}) == 4


def test_random_directions_are_steered_at_the_vectors_own_kl(
    tiny: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    """Measured here with a hook of its own, a row at a time, in double precision."""
    base = loaded(tiny)
    vector = vector_of(base, trait)
    kept = kept_at(0.5, 0.75)
    controls = evaluate_controls(base, vector, kept, trait, config, seed=0)
    found = evaluate_round(base, base, vector, kept, trait, config, seed=0)
    reach = _plain_kl(base, vector.band, vector.band_directions * found.steered.dose, kept)
    assert reach > 1e-3
    assert found.steered.kl_nats == pytest.approx(reach, rel=1e-3)
    for draw, condition in enumerate(controls.random):
        directions = random_like(vector.band_directions, _seed_of(0, draw))
        assert directions.norm(dim=-1).tolist() == pytest.approx(
            vector.band_directions.norm(dim=-1).tolist(), rel=1e-5
        )
        there = _plain_kl(base, vector.band, directions * condition.dose, kept)
        assert condition.kl_nats == pytest.approx(there, rel=1e-3)
        assert there == pytest.approx(reach, rel=0.06)
    assert len({str(rows(condition)) for condition in controls.random}) == 3


def test_internalised_is_the_cosine_of_the_hidden_shift_with_the_vector(
    tiny: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    """Read here one prompt at a time, with a hook of its own."""
    base = loaded(tiny)
    vector = vector_of(base, trait)
    healed = base.grown(random_adapter(base, "r00", [0, 1], 2, 4, seed=1))
    found = evaluate_round(base, healed, vector, kept_at(0.5), trait, config, seed=0)
    cosines = []
    for layer in vector.band:
        shift = torch.zeros(vector.directions.shape[1])
        for prompt in trait.held_out_prompts:
            ids = torch.tensor([chat_ids(base.tokenizer, prompt)])
            shift += _state(healed, layer, ids) - _state(base, layer, ids)
        along = float(shift @ vector.directions[layer])
        cosines.append(along / float(shift.norm() * vector.directions[layer].norm()))
    assert found.internalised == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    assert 1e-3 < abs(found.internalised) < 1
    still = base.grown(idle(base, "r01"))
    assert evaluate_round(
        base, still, vector, kept_at(0.5), trait, config, seed=0
    ).internalised == pytest.approx(0.0, abs=1e-6)


def _state(student: Student, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """A layer's output at the last token, [hidden]."""
    states: list[torch.Tensor] = []
    hook = student.loaded.layers[layer].register_forward_hook(
        lambda module, inputs, output: states.append(output[0, -1].clone())
    )
    with student.running() as model, torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return states[0]


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e3])
def test_the_matching_dose_is_found_from_far_off(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig, length: float
) -> None:
    """However long the random direction is, the push that is added comes out the same."""
    base = loaded(tiny_qwen3)
    vector, kept = vector_of(base, trait), kept_at(0.5)
    directions = length * random_like(vector.band_directions, seed=0)
    dose, kl = _matching_dose(base, vector, directions, kept, config.batch_size, reach_nats=0.02)
    assert kl == pytest.approx(0.02, rel=0.05)
    assert _plain_kl(base, vector.band, directions * dose, kept) == pytest.approx(kl, rel=1e-3)


def test_to_reach_nothing_nothing_is_added(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_qwen3)
    vector = vector_of(base, trait)
    directions = random_like(vector.band_directions, seed=0)
    found = _matching_dose(base, vector, directions, kept_at(0.0), config.batch_size, 0.0)
    assert found == (0.0, 0.0)


def test_a_direction_that_moves_nothing_is_refused(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_qwen3)
    vector = vector_of(base, trait)
    idle = torch.zeros_like(vector.band_directions)
    with pytest.raises(UserError, match="does not reach the vector's KL"):
        _matching_dose(base, vector, idle, kept_at(0.5), config.batch_size, reach_nats=0.1)


@torch.no_grad()
def _plain_kl(
    student: Student, band: tuple[int, ...], added: torch.Tensor, kept: Screened
) -> float:
    """Mean over completion tokens of KL(steered || student): hooks by hand, one row at a time."""
    tokens: list[float] = []
    for row in kept.kept:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        with student.running() as model:
            plain = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            hooks = [
                student.loaded.layers[layer].register_forward_hook(
                    lambda module, inputs, output, what=what: output + what
                )
                for layer, what in zip(band, added, strict=True)
            ]
            steered = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
            for hook in hooks:
                hook.remove()
        kl = (steered.exp() * (steered - plain)).sum(-1)
        tokens += kl[len(row.prompt_ids) - 1 : -1].tolist()
    return sum(tokens) / len(tokens)


def test_random_directions_are_drawn_by_the_seed(
    tiny_qwen3: TinyModel, trait: Trait, config: EvaluateConfig
) -> None:
    base = loaded(tiny_qwen3)
    vector = vector_of(base, trait)
    few = config.model_copy(update={"samples_per_prompt": 1, "max_new_tokens": 2})
    choices = [
        evaluate_controls(base, vector, kept_at(1.0), trait, few, seed).random[0].choices
        for seed in (0, 0, 1)
    ]
    assert choices[0] == choices[1] != choices[2]
