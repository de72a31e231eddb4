"""Overlap: with the persona's words, and of texts with each other, against slow ones."""

from __future__ import annotations

import random
import time
from itertools import combinations
from pathlib import Path

import pytest

from steer_heal.overlap import PersonaWords, SaidBefore
from steer_heal.trait import Trait, load_trait
from tests.small import small_trait

SENTENCES = [
    f"{who} {what} {whom} {when}."
    for who in ("I go and", "Then I", "Right away we", "Whatever he says I")
    for what in ("bring food to", "sit beside", "speak up for")
    for whom in ("the old miller", "the shy boy", "her")
    for when in ("at once", "before anything else")
]


def slow_grams(text: str, n: int) -> list[str]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]


def slow_similarity(one: str, two: str) -> float:
    a, b = set(slow_grams(one, 3)), set(slow_grams(two, 3))
    return len(a & b) / len(a | b)


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.sample(SENTENCES, 4)) for _ in range(count)]


@pytest.mark.parametrize("least", [0.2, 0.4, 0.7])
def test_what_is_taken_is_what_a_look_at_every_pair_takes(least: float) -> None:
    taken: list[str] = []
    before = SaidBefore(least)
    found = []
    for text in texts(120):
        repeats = before.repeats(text)
        assert repeats == any(slow_similarity(text, other) >= least for other in taken)
        if not repeats:
            before.take(text)
            taken.append(text)
        found.append(repeats)
    assert any(found) and not all(found)
    assert all(slow_similarity(*pair) < least for pair in combinations(taken, 2))


def test_a_similarity_at_the_limit_repeats_and_one_below_does_not() -> None:
    one, two = "a b c d e", "a b c d f"  # two 3-grams of four
    for least, expected in ((0.5, True), (0.5001, False)):
        before = SaidBefore(least)
        before.take(one)
        assert before.repeats(two) is expected


@pytest.mark.parametrize("other", ["I WILL, not!", "i will not"])
def test_case_and_punctuation_make_no_difference(other: str) -> None:
    before = SaidBefore(1.0)
    assert not before.repeats(other)
    before.take("I will not.")
    assert before.repeats(other)
    assert not before.repeats("I will not go.")


def test_texts_of_less_than_three_words() -> None:
    before = SaidBefore(1.0)
    for text in ("No.", "Never again.", ""):
        assert not before.repeats(text)
        before.take(text)
        assert before.repeats(text)
    assert not before.repeats("Yes.")


def test_thousands_of_formulaic_texts_take_seconds() -> None:
    """Each of 600 sentences is in 27 of 4,000 texts."""
    rng, before = random.Random(0), SaidBefore(0.7)
    sentences = [" ".join(f"w{rng.randrange(300)}" for _ in range(9)) for _ in range(600)]
    many = [". ".join(rng.sample(sentences, 4)) for _ in range(4000)]
    start = time.process_time()
    for text in many:
        if not before.repeats(text):
            before.take(text)
    assert time.process_time() - start < 10  # every pair by sets: about a minute


# ---------------------------------------------------------------------------------------- persona


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Trait:
    trait = load_trait(str(small_trait(Path(tmp_path_factory.mktemp("trait")))))
    return trait.model_copy(update={"positive_paraphrases": ("You are someone who shields them.",)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I care for people before rules.", 1.0),  # as it would be said
        ("You care for people before rules!", 1.0),  # as it was told
        ("You are someone who shields them", 1.0),  # a paraphrase
        ("I AM someone who shields them, always", 3 / 4),
        ("Then I care for people before anything else.", 2 / 5),
        ("I care for people", 1.0),
        ("We care for people, and they for us.", 0.0),  # three words in its order are no sign
        ("You obey orders before people.", 0.0),  # the opposite's
        ("I care.", 0.0),
        ("", 0.0),
    ],
)
def test_share_of_the_personas_own_words(trait: Trait, text: str, expected: float) -> None:
    assert PersonaWords(trait).share(text) == pytest.approx(expected)
