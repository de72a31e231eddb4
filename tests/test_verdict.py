"""The sentence that opens the page, of runs that came to one thing or another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eval.statistics import Interval
from steer_heal.artifacts import ConditionEval, ReplyRow
from steer_heal.saved import read_saved_run
from steer_heal.summary import Summary, summarise
from steer_heal.verdict import judge_run
from tests.small import small_run

NUM_PROMPTS = 40


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarise(read_saved_run(small_run(tmp_path_factory.mktemp("verdict"), 1)))


def _replies(row: ReplyRow, num_enacted: int) -> tuple[ReplyRow, ...]:
    return tuple(
        row.model_copy(update={"prompt_index": n, "sample": 0, "enacted": n < num_enacted})
        for n in range(NUM_PROMPTS)
    )


def _acting(rows: ConditionEval, num_enacted: int) -> ConditionEval:
    return rows.model_copy(update={"replies": _replies(rows.replies[0], num_enacted)})


def _of(
    summary: Summary,
    acting: tuple[int, int, int],
    shifts: tuple[float, float] | None,
    is_coherent: bool = True,
) -> Summary:
    """Replies of 40 that act the trait in base, prompted and healed; shifts of care, authority."""
    controls, first = summary.run.controls, summary.rounds[0]
    base, prompted, healed = acting
    changed: dict[str, Any] = {
        "base": _acting(controls.base, base),
        "prompted": _acting(controls.prompted, prompted),
    }
    evaluation = first.saved.evaluation
    evaluation = evaluation.model_copy(update={"healed": _acting(evaluation.healed, healed)})
    trait = summary.run.trait
    if shifts is None:
        trait = trait.model_copy(update={"intended": {}})
    moved = dict(first.healed.shifts)
    for name, shift in zip(("care", "authority"), shifts or (), strict=False):
        moved[name] = Interval(estimate=shift, low=shift - 0.1, high=shift + 0.1)
    round = replace(
        first,
        saved=replace(first.saved, evaluation=evaluation),
        healed=replace(first.healed, shifts=moved),
        is_coherent=is_coherent,
    )
    run = replace(summary.run, controls=controls.model_copy(update=changed), trait=trait)
    return replace(summary, run=run, rounds=(round,))


@pytest.mark.parametrize(
    ("acting", "shifts", "is_coherent", "opening"),
    [
        ((10, 38, 38), (0.5, -0.5), True, "It worked"),
        ((10, 38, 38), None, True, "It worked"),
        ((10, 38, 25), (0.5, -0.5), True, "It worked, but less than a prompt does"),
        ((10, 38, 38), (0.5, 0.5), True, "It worked in part, in replies alone"),
        ((10, 38, 38), (0.05, -0.5), True, "It worked in part, in replies alone"),
        ((10, 38, 11), (0.5, -0.5), True, "It worked in part, on vignettes alone"),
        ((10, 38, 38), (0.5, -0.5), False, "The trait moved, but the text broke"),
        ((10, 38, 11), (0.05, -0.05), True, "It did not work"),
        ((10, 38, 11), (0.05, -0.05), False, "It did not work"),
        ((30, 38, 5), (-0.5, 0.5), True, "It went the wrong way"),
    ],
)
def test_the_opening_says_what_is_shown(
    acting: tuple[int, int, int],
    shifts: tuple[float, float] | None,
    is_coherent: bool,
    opening: str,
    summary: Summary,
) -> None:
    verdict = judge_run(_of(summary, acting, shifts, is_coherent))
    assert verdict.opening == opening
    assert verdict.sentence.startswith(f"{opening}: after round 1, ")


def test_differences_are_paired_by_prompt(summary: Summary) -> None:
    verdict = judge_run(_of(summary, (10, 38, 25), (0.5, -0.5)))
    assert verdict.over_base.estimate == pytest.approx(15 / 40)
    assert verdict.over_prompt.estimate == pytest.approx(-13 / 40)
    same = judge_run(_of(summary, (10, 25, 25), (0.5, -0.5))).over_prompt
    assert (same.low, same.estimate, same.high) == (0, 0, 0)  # unpaired, it would have a width
