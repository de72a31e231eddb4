"""Scores against log-probabilities taken one completion at a time."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from eval.chat import chat_ids
from eval.errors import UserError
from eval.sampling import sample_replies
from steer_heal.model import Student, load_student
from steer_heal.scoring import score_completions
from steer_heal.trait import Trait, load_trait
from tests.conftest import TinyModel
from tests.small import small_trait
from tests.test_stack import random_adapter


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Trait:
    return load_trait(str(small_trait(tmp_path_factory.mktemp("trait"))))


@torch.no_grad()
def slow_logprobs(model: torch.nn.Module, prompt: list[int], ids: list[int]) -> list[float]:
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    return [float(logp[len(prompt) - 1 + index, token]) for index, token in enumerate(ids)]


COMPLETIONS = [
    "I think the answer is care.",
    "No.",
    "The nurse told the guard that the order was unfair, and the guard agreed with her. " * 2,
]


def encoded(student: Student) -> list[list[int]]:
    end = student.tokenizer.eos_token_id
    return [
        [*student.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        for text in COMPLETIONS
    ]


def test_scores_equal_slow_ones(tiny: TinyModel, trait: Trait) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    rows = encoded(student)
    turns = list(trait.prompts[:3])
    scores = score_completions(student, trait, turns, rows, batch_size=2)
    for turn, ids, text, score in zip(turns, rows, COMPLETIONS, scores, strict=True):
        neutral, positive, negative = (
            slow_logprobs(tiny.model, chat_ids(tiny.tokenizer, turn, persona), ids)
            for persona in (None, trait.positive, trait.negative)
        )
        enactment = (sum(positive) - sum(negative)) / len(ids)
        assert score.enactment_nats == pytest.approx(enactment, abs=1e-4)
        tail = neutral[-max(1, len(ids) // 4) :]
        assert score.surprisal.mean_nll_nats == pytest.approx(-sum(neutral) / len(ids), rel=1e-4)
        assert score.surprisal.tail_nll_nats == pytest.approx(-sum(tail) / len(tail), rel=1e-4)
        rmse = math.sqrt(sum(value**2 for value in neutral) / len(ids))
        assert score.surprisal.rmse_nll_nats == pytest.approx(rmse, rel=1e-4)
        size = (
            max(0, len(zlib.compress(text.encode(), 9)) - min(20, 8 + 0.3 * len(text.encode())))
            / len(text.encode()) ** 0.9
        )
        assert score.figures.compressed_size == pytest.approx(size)


def test_scores_are_the_bases_whatever_the_student_has_learnt(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    base = load_student(str(tiny_qwen3.folder), [], "cpu")
    grown = base.grown(random_adapter(base, "r00", [0, 1], 2, 8, seed=1))
    rows, turns = encoded(base), list(trait.prompts[:3])
    assert score_completions(base, trait, turns, rows, 4) == score_completions(
        grown, trait, turns, rows, 4
    )


def test_what_the_positive_persona_says_scores_higher(tiny: TinyModel, trait: Trait) -> None:
    """In expectation each side is a KL divergence: above 0 and below 0."""
    student = load_student(str(tiny.folder), [], "cpu")
    turns = [turn for turn in trait.prompts for _ in range(12)]
    means = []
    for seed, persona in enumerate((trait.positive, trait.negative)):
        prompts = [chat_ids(student.tokenizer, turn, persona) for turn in turns]
        with student.running() as model:
            replies = sample_replies(
                model, student.tokenizer, prompts, seed=seed, max_new_tokens=24
            )
        rows = [reply.token_ids for reply in replies]
        scores = score_completions(student, trait, turns, rows, batch_size=16)
        means.append(sum(score.enactment_nats for score in scores) / len(scores))
    assert means[0] > 0.01 and means[1] < -0.01


@pytest.mark.parametrize("persona", ["positive", "negative", None])
def test_log_probabilities_that_are_not_finite_are_refused(
    tiny_qwen3: TinyModel, trait: Trait, persona: str | None
) -> None:
    """Also where only a persona's prompt breaks the model: NaN would pass every threshold."""
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    odd = trait.model_copy(update={persona: "\u2603"} if persona else {})
    with torch.no_grad():
        embedding = student.loaded.model.get_input_embeddings().weight
        if persona is None:
            embedding[:] = float("nan")
        else:  # a token that is in this persona alone
            turn = trait.prompts[0]
            used = set(chat_ids(student.tokenizer, turn, odd.positive))
            other = set(chat_ids(student.tokenizer, turn, odd.negative))
            own = used - other if persona == "positive" else other - used
            embedding[sorted(own)] = float("nan")
    ids = encoded(student)[1][-1:]
    with pytest.raises(UserError, match="not finite"):
        score_completions(student, odd, [trait.prompts[0]], [ids], batch_size=4)
