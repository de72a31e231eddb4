"""The doses of a round: walked down by what the stack carries, or found by a probe."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loguru import logger

from eval.chat import chat_ids
from eval.errors import UserError
from steer_heal.artifacts import Completions, DosePoint, Doses, Limits, SteeringVector
from steer_heal.config import FilterConfig, GenerateConfig, VectorConfig
from steer_heal.dose import choose_doses
from steer_heal.drafts import sample_steered
from steer_heal.filter import screen
from steer_heal.model import Student, load_student
from steer_heal.trait import Trait, load_trait
from steer_heal.vector import extract_vector
from tests.conftest import TinyModel
from tests.small import small_trait
from tests.test_filter import limits
from tests.test_stack import random_adapter

FILTER = FilterConfig(min_kept=1, num_kept=99, min_enactment_nats=-100, max_similarity=2)
AUTO = GenerateConfig(
    doses="auto",
    dose_grid=(0.05, 1.6),
    num_grid_doses=6,
    num_probes=8,
    max_new_tokens=16,
    target_pass_rate=0.01,
    dose_share=1,
)
GRID = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


@pytest.fixture(scope="module")
def trait(tmp_path_factory: pytest.TempPathFactory) -> Trait:
    return load_trait(str(small_trait(tmp_path_factory.mktemp("trait"))))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged."""
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}", level="INFO")
    yield lines
    logger.remove(sink)


def steered(tiny: TinyModel, trait: Trait) -> tuple[Student, SteeringVector]:
    student = load_student(str(tiny.folder), [], "cpu")
    student = student.grown(random_adapter(student, "r00", [0], 2, 1, seed=1))
    config = VectorConfig(num_contexts=8, band=(0.5, 1.0))
    return student, extract_vector(student, trait, config, seed=0)


def open_limits(**changes: Any) -> Limits:
    """A random model hardly ever ends a reply."""
    return limits(base_finishes=False, **changes)


def chosen(
    student: Student,
    vector: SteeringVector,
    trait: Trait,
    config: GenerateConfig,
    gates: Limits | None = None,
    seed: int = 5,
) -> Doses:
    gates = gates or open_limits()
    return choose_doses(student, vector, gates, trait, config, FILTER, seed)


@torch.no_grad()
def mean_state(student: Student, prompts: list[list[int]], layer: int) -> torch.Tensor:
    """Mean output of a layer at the last token, a prompt at a time, by a hook of the test's own."""
    states: list[torch.Tensor] = []
    handle = student.loaded.layers[layer].register_forward_hook(
        lambda module, args, out: states.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    with student.running() as model:
        for prompt in prompts:
            model(input_ids=torch.tensor([prompt]))
    handle.remove()
    return torch.stack(states).double().mean(0)


def slow_carried(student: Student, vector: SteeringVector, trait: Trait) -> float:
    prompts = [chat_ids(student.tokenizer, prompt) for prompt in trait.prompts]
    shares = []
    for layer in vector.band:
        shift = mean_state(student, prompts, layer) - mean_state(student.base, prompts, layer)
        direction = vector.directions[layer].double()
        shares.append(float(shift @ direction / (direction @ direction)))
    return sum(shares) / len(shares)


# -------------------------------------------------------------------------------------- walk down


def test_doses_are_walked_down_by_what_the_stack_adds_of_the_vector(
    tiny: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny, trait)
    carried = slow_carried(student, vector, trait)
    along = replace(vector, directions=vector.directions if carried > 0 else -vector.directions)
    against = replace(vector, directions=-along.directions)
    config = GenerateConfig(doses=(0.7, 0.2, 0.1, 1.5), walk_down=0.5 / abs(carried))
    found = chosen(student, along, trait, config)
    assert found.doses == pytest.approx((0.2, 0.0, 0.0, 1.0), abs=1e-4)
    assert found.asked == (0.7, 0.2, 0.1, 1.5)
    assert found.carried == pytest.approx(abs(carried), rel=1e-4)
    assert found.probe == ()
    found = chosen(student, against, trait, config)
    assert found.doses == found.asked  # never up
    assert found.carried == pytest.approx(-abs(carried), rel=1e-4)


def test_a_first_round_takes_its_doses_as_they_are(tiny_qwen3: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny_qwen3, trait)
    config = GenerateConfig(doses=(0.3, 0.1), walk_down=3.0)
    found = chosen(student.base, vector, trait, config)
    assert found == Doses(doses=(0.3, 0.1), asked=(0.3, 0.1), carried=0.0, probe=(), passing=())


def test_without_walking_down_nothing_is_measured(tiny_qwen3: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny_qwen3, trait)
    found = chosen(student, vector, trait, GenerateConfig(doses=(0.3,), walk_down=0))
    assert found == Doses(doses=(0.3,), asked=(0.3,), carried=None, probe=(), passing=())


def test_the_log_says_in_words_what_the_stack_does_to_the_doses(
    tiny_qwen3: TinyModel, trait: Trait, said: list[str]
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    carried = slow_carried(student, vector, trait)
    along = replace(vector, directions=vector.directions * math.copysign(1, carried))
    config = GenerateConfig(doses=(0.35, 0.7), walk_down=0.5 / abs(carried))
    said.clear()
    chosen(student, along, trait, config)
    assert said == [
        f"the earlier rounds already add {abs(carried):.2f} of the vector by themselves, so this "
        "round steers at 0.00 and 0.20 instead of 0.35 and 0.70\n"
    ]


# ------------------------------------------------------------------------------------------ probe


def test_the_grid_is_geometric_and_each_dose_meets_the_same_prompts(
    tiny_qwen3: TinyModel, trait: Trait, monkeypatch: pytest.MonkeyPatch
) -> None:
    import steer_heal.dose

    asked: list[tuple[int, float]] = []

    def spied(student: Any, vector: Any, trait: Any, prompts: Any, doses: Any, *rest: Any) -> Any:
        asked.extend(zip(prompts, doses, strict=True))
        return sample_steered(student, vector, trait, prompts, doses, *rest)

    monkeypatch.setattr(steer_heal.dose, "sample_steered", spied)
    student, vector = steered(tiny_qwen3, trait)
    for num_probes, times in ((8, [1] * 8), (4, [1] * 4), (20, [3] * 4 + [2] * 4)):
        asked.clear()
        config = AUTO.model_copy(update={"num_probes": num_probes})
        found = chosen(student.base, vector, trait, config)
        assert found.asked == pytest.approx(GRID)
        assert [point.dose for point in found.probe] == list(found.asked)
        prompts = [[p for p, other in asked if other == dose] for dose in found.asked]
        assert all(each == prompts[0] for each in prompts)
        assert sorted(Counter(prompts[0]).values(), reverse=True) == times


def test_the_probe_is_what_the_filter_says_of_the_same_drafts(
    tiny_llama: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_llama, trait)
    student = student.base
    found = chosen(student, vector, trait, AUTO)
    rows = [(row, dose) for dose in found.asked for row in random.Random(5).sample(range(8), 8)]
    drafts = sample_steered(
        *(student, vector, trait, [row for row, _ in rows], [dose for _, dose in rows]),
        *(AUTO, 5, "again"),
    )
    tails = sorted(
        row.surprisal.tail_nll_nats
        for row in screen(
            student, Completions(rows=drafts), open_limits(), trait, FILTER, seed=0
        ).rows
    )
    gates = open_limits(tail_nll_nats=tails[len(tails) // 2])  # half of them fail
    found = chosen(student, vector, trait, AUTO, gates)
    screened = screen(student, Completions(rows=drafts), gates, trait, FILTER, seed=0)
    assert found.probe == screened.curve
    passed = Counter(row.dose for row in screened.rows if row.dropped is None)
    assert {p.dose: p.pass_rate * 8 for p in found.probe if p.pass_rate} == dict(passed)
    assert 0 < sum(passed.values()) < 48
    kl = [np.median([d.kl_p95_nats for d in drafts if d.dose == p.dose]) for p in found.probe]
    assert [p.kl_p95_nats for p in found.probe] == pytest.approx(kl)
    assert kl[0] < kl[3] < kl[5]


def taken(probe: tuple[DosePoint, ...], config: GenerateConfig) -> list[float]:
    """The choice, written another way: down from the largest, until there are enough."""
    found: list[float] = []
    for point in sorted(probe, key=lambda point: -point.dose):
        fine = point.pass_rate >= config.target_pass_rate
        fine &= config.target_kl_nats is None or point.kl_p95_nats <= config.target_kl_nats
        if fine and len(found) < config.num_doses:
            found.insert(0, point.dose)
    return found


def test_the_largest_doses_that_reach_the_targets_are_taken(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    student = student.base
    first = chosen(student, vector, trait, AUTO)
    assert first.doses == first.asked[-2:]
    middle = first.probe[3].kl_p95_nats
    assert first.probe[2].kl_p95_nats < middle < first.probe[5].kl_p95_nats
    gates = open_limits(tail_nll_nats=6.0)
    seen = set()
    for changes in (
        {"target_kl_nats": middle},
        {"target_kl_nats": middle, "num_doses": 1},
        {"num_doses": 9},
        {"target_pass_rate": 0.5},
        {"target_pass_rate": 0.5, "num_doses": 1, "target_kl_nats": middle},
    ):
        config = AUTO.model_copy(update=changes)
        found = chosen(student, vector, trait, config, gates)
        assert list(found.doses) == taken(found.probe, config)
        seen.add(found.doses)
    assert len(seen) >= 4
    assert any(0 < point.pass_rate < 1 for point in found.probe)


def test_doses_tried_are_walked_down_and_equal_ones_tried_once(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    carried = slow_carried(student, vector, trait)
    along = replace(vector, directions=vector.directions * math.copysign(1, carried))
    config = AUTO.model_copy(update={"walk_down": 0.3 / abs(carried)})
    found = chosen(student, along, trait, config)
    assert found.asked == pytest.approx(GRID)
    expected = (0.0, 0.1, 0.5, 1.3)
    assert [point.dose for point in found.probe] == pytest.approx(expected, abs=1e-4)
    assert found.doses == pytest.approx((0.5, 1.3), abs=1e-4)
    assert [point.num_drafts for point in found.probe] == [8] * 4
    assert found.probe[0].kl_p95_nats == 0


def test_a_share_of_what_passes_is_taken_with_what_the_stack_adds_counted_in(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    carried = slow_carried(student, vector, trait)
    along = replace(vector, directions=vector.directions * math.copysign(1, carried))
    config = AUTO.model_copy(update={"walk_down": 0.3 / abs(carried), "dose_share": 0.5})
    found = chosen(student, along, trait, config)
    assert found.passing == pytest.approx((0.5, 1.3), abs=1e-4)
    assert found.doses == pytest.approx((0.8 / 2 - 0.3, 1.6 / 2 - 0.3), abs=1e-4)
    found = chosen(student, along, trait, config.model_copy(update={"dose_share": 0.1}))
    assert found.doses == (0.0, 0.0)


def test_same_seed_same_probe_and_another_seed_another(tiny_qwen3: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny_qwen3, trait)
    one, two, three = (chosen(student, vector, trait, AUTO, seed=seed) for seed in (5, 5, 6))
    assert one == two
    assert one != three


def test_where_no_dose_passes_the_round_stops_with_the_curve(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    config = AUTO.model_copy(update={"target_pass_rate": 0.75})
    with pytest.raises(UserError) as caught:
        chosen(student.base, vector, trait, config, open_limits(tail_nll_nats=0.0))
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "no dose passes: of 6 tried none has 75% of 8 drafts past the filter",
        *(f"{dose:.3f}: 0%, " for dose in GRID),
        ", tail",
        "Try: steer more gently (generate.dose_grid)",
        "generate.target_pass_rate",
    ):
        assert part in message


def test_where_nearly_enough_pass_a_lower_target_is_the_first_advice(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    gentle = AUTO.model_copy(update={"dose_grid": (0.05, 0.4), "num_grid_doses": 4})
    config = gentle.model_copy(update={"target_pass_rate": 0.999})
    gates = open_limits(tail_nll_nats=6.0)
    reached = chosen(student.base, vector, trait, gentle, gates).probe
    assert 0.5 < max(point.pass_rate for point in reached) < 1
    with pytest.raises(UserError) as caught:
        chosen(student.base, vector, trait, config, gates)
    assert "none has 99.9% of 8 drafts" in str(caught.value)
    assert "Try: a lower generate.target_pass_rate, or " in str(caught.value)
    assert str(caught.value).endswith("with run=NAME")


def test_where_only_the_kl_is_too_large_the_message_says_so(
    tiny_qwen3: TinyModel, trait: Trait
) -> None:
    student, vector = steered(tiny_qwen3, trait)
    config = AUTO.model_copy(update={"target_kl_nats": 1e-9})
    with pytest.raises(UserError, match=r"KL p95 of at most 1e-09 nats.*target_kl_nats") as caught:
        chosen(student.base, vector, trait, config)
    assert "0.050: 100%, 0." in str(caught.value)
    assert "target_pass_rate" not in str(caught.value)


def test_too_little_of_the_trait_asks_for_more(tiny_qwen3: TinyModel, trait: Trait) -> None:
    student, vector = steered(tiny_qwen3, trait)
    shut = FILTER.model_copy(update={"min_enactment_nats": 1e3})
    with pytest.raises(UserError, match=r"enactment.*Try: steer harder \(generate.dose_grid\)"):
        choose_doses(student.base, vector, open_limits(), trait, AUTO, shut, 5)
