"""Headroom: on the embedded model, whose personas are known to move it."""

from __future__ import annotations

import pytest

from steer_heal.headroom import Headroom, measure_headroom
from steer_heal.model import Student, load_student
from steer_heal.organism.personas import neutral_systems
from steer_heal.trait import Trait, load_trait

ORGANISM_TRAIT = "care-over-authority-organism"


@pytest.fixture(scope="module")
def organism() -> Student:
    return load_student("organism", [], "cpu")


def headroom(student: Student, trait: Trait, num_prompts: int = 24, seed: int = 0) -> Headroom:
    return measure_headroom(
        student, trait, num_prompts=num_prompts, max_new_tokens=96, batch_size=24, seed=seed
    )


def test_a_trait_that_the_model_has_by_half_leaves_half(organism: Student) -> None:
    room = headroom(organism, load_trait(ORGANISM_TRAIT))
    assert room.positive_nats > 0.5 and room.negative_nats < -0.3
    assert 0.3 < room.share < 0.8
    assert room.gap_nats.low > 0.3
    assert room.gap_nats.estimate == pytest.approx(room.positive_nats - room.neutral_nats)


def test_a_persona_that_the_model_speaks_as_anyway_leaves_nothing(organism: Student) -> None:
    trait = load_trait(ORGANISM_TRAIT)
    room = headroom(organism, trait.model_copy(update={"positive": neutral_systems()[0]}))
    assert room.share > 0.7 and room.gap_nats.low < 0.05
    assert room.span_nats > 0.2


def test_personas_that_mean_the_same_do_not_move_the_model(organism: Student) -> None:
    first, second = neutral_systems()[:2]
    alike = load_trait(ORGANISM_TRAIT).model_copy(update={"positive": first, "negative": second})
    assert abs(headroom(organism, alike, num_prompts=8).span_nats) < 0.01


def test_the_seed_decides_and_no_more_prompts_are_asked_than_there_are(organism: Student) -> None:
    trait = load_trait(ORGANISM_TRAIT)
    few = trait.model_copy(update={"held_out_prompts": trait.held_out_prompts[:4]})
    assert headroom(organism, few) == headroom(organism, few) != headroom(organism, few, seed=1)
