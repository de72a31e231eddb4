from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest

from eval.figures import (
    centred_log_ratio_shift_nats,
    fitted_temperature,
    flip_rate,
    flip_rate_difference,
    informedness,
    perspective_gap_nats,
    seed_interval,
    selectivity,
    selectivity_difference,
    soft_cross_entropy_nats,
)
from eval.rows import ForcedChoiceRow
from eval.statistics import Interval, bootstrap_weights, mean_interval

NAMES = ("care", "fairness", "authority")


def _made(
    item: str, scores: Mapping[str, float], label: str | None = None, **fields: Any
) -> ForcedChoiceRow:
    given = {"conflict": False, "pmass": 1.0, "prefill_nll_nats": 0.0} | fields
    return ForcedChoiceRow(id=item, label=label, scores=dict(scores), **given)


def replace(row: ForcedChoiceRow, **changes: Any) -> ForcedChoiceRow:
    return row.model_copy(update=changes)


def _row(
    item: object, scores: Sequence[float], label: str | None = None, **fields: Any
) -> ForcedChoiceRow:
    named = dict(zip(NAMES, map(float, scores), strict=True))
    return _made(f"item-{item}", named, label, **fields)


def _picking(*pairs: tuple[str, str]) -> list[ForcedChoiceRow]:
    """Rows by (label, picked option)."""
    return [
        _row(index, [3.0 if name == picked else 0.0 for name in NAMES], label)
        for index, (label, picked) in enumerate(pairs)
    ]


def _random(rng: np.random.Generator, num_items: int, **fields) -> list[ForcedChoiceRow]:
    return [
        _row(index, rng.normal(size=3) * 2, NAMES[int(rng.integers(3))], **fields)
        for index in range(num_items)
    ]


def _softmax(scores: Mapping[str, float], temperature: float = 1.0) -> dict[str, float]:
    total = sum(math.exp(value / temperature) for value in scores.values())
    return {name: math.exp(value / temperature) / total for name, value in scores.items()}


def _estimates(found: Mapping[str, Interval]) -> dict[str, float]:
    return {name: interval.estimate for name, interval in found.items()}


# --- informedness ---


def test_informedness_by_hand() -> None:
    rows = _picking(
        *[("care", "care")] * 3,
        ("care", "fairness"),
        *[("fairness", "fairness")] * 2,
        ("fairness", "authority"),
        ("fairness", "care"),
    )
    # care: 3/4 found, 1/4 false; fairness: 2/4 found, 1/4 false; authority is no label
    assert informedness(rows).estimate == pytest.approx((0.5 + 0.25) / 2)


def test_informedness_is_what_counting_gives() -> None:
    rows = _random(np.random.default_rng(0), 41)
    values = []
    for name in NAMES:
        picked = {row.id: max(NAMES, key=lambda key: row.scores[key]) == name for row in rows}
        own = [picked[row.id] for row in rows if row.label == name]
        others = [picked[row.id] for row in rows if row.label != name]
        values.append(sum(own) / len(own) - sum(others) / len(others))
    assert informedness(rows).estimate == pytest.approx(sum(values) / 3)


def test_informedness_of_two_options_is_sensitivity_and_specificity() -> None:
    """Youden's own case: J = sensitivity + specificity - 1, for either side."""
    pairs = [("care", "care")] * 8 + [("care", "fairness")] * 2
    pairs += [("fairness", "fairness")] * 15 + [("fairness", "care")] * 15
    assert informedness(_picking(*pairs)).estimate == pytest.approx(0.8 + 0.5 - 1)


def test_informedness_of_the_perfect_the_constant_the_undecided_and_the_perverse() -> None:
    perfect = informedness(_picking(*[(name, name) for name in NAMES] * 4))
    assert (perfect.estimate, perfect.low, perfect.high) == pytest.approx((1, 1, 1))
    always = [("care", "care")] * 18 + [("fairness", "care"), ("authority", "care")]
    constant = informedness(_picking(*always))  # right 18 times of 20, and knows nothing
    assert (constant.estimate, constant.low, constant.high) == pytest.approx((0, 0, 0))
    undecided = [_row(index, (1, 1, 1), NAMES[index % 3]) for index in range(7)]
    assert informedness(undecided).estimate == pytest.approx(0)
    swapped = _picking(("care", "fairness"), ("fairness", "care"))
    assert informedness(swapped).estimate == pytest.approx(-1)


def test_informedness_shares_a_tie_whatever_the_order_of_the_options() -> None:
    rows = [_row(0, (2, 2, 0), "care"), _row(1, (0, 2, 0), "fairness")]
    # care: 1/2 found, none false; fairness: found, 1/2 false
    assert informedness(rows).estimate == pytest.approx((0.5 + 0.5) / 2)
    turned = [replace(row, scores=dict(reversed(row.scores.items()))) for row in rows]
    assert informedness(turned).estimate == pytest.approx(0.5)
    assert informedness([rows[0], turned[1]]).estimate == pytest.approx(0.5)


def test_informedness_leaves_out_what_has_no_label() -> None:
    rows = _random(np.random.default_rng(1), 30)
    more = [*rows, _row("x", (9, 0, 0)), _row("y", (0, 9, 0))]
    assert informedness(more) == informedness(rows)


def test_informedness_is_the_same_under_other_names() -> None:
    rows = _random(np.random.default_rng(2), 30)
    names = dict(zip(NAMES, ("x", "y", "z"), strict=True))
    renamed = [
        replace(
            row, label=names[row.label], scores={names[k]: row.scores[k] for k in sorted(NAMES)}
        )
        for row in rows
    ]
    assert informedness(renamed).estimate == pytest.approx(informedness(rows).estimate)


def test_informedness_where_draws_miss_a_label_is_still_a_number() -> None:
    rows = _picking(("care", "care"), ("care", "fairness"), ("fairness", "fairness"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = informedness(rows)
    assert -1 <= found.low <= found.estimate <= found.high <= 1


def test_informedness_needs_two_labels_that_are_options() -> None:
    with pytest.raises(ValueError, match="labels of two foundations: 2 rows of one"):
        informedness(_picking(("care", "care"), ("care", "fairness")))
    with pytest.raises(ValueError, match="no labelled rows"):
        informedness([_row(0, (1, 2, 3))])
    with pytest.raises(ValueError, match="item 'item-1': label 'honesty' is none of"):
        informedness([_row(0, (1, 2, 3), "care"), _row(1, (1, 2, 3), "honesty")])


# --- soft cross-entropy and temperature ---


def _human(shares: Sequence[float]) -> dict[str, float]:
    return dict(zip(NAMES, shares, strict=True))


def test_soft_cross_entropy_by_hand() -> None:
    rows = [
        _row(0, (math.log(2), 0, 0), human=_human((0.5, 0.5, 0.0))),  # p = 1/2, 1/4, 1/4
        _row(1, (0, 0, math.log(8)), human=_human((0.0, 0.0, 1.0))),  # p = .1, .1, .8
        _row(2, (5, 0, 0)),
    ]
    found = soft_cross_entropy_nats(rows)
    values = [0.5 * math.log(2) + 0.5 * math.log(4), math.log(1.25)]
    assert found.nats.estimate == pytest.approx(sum(values) / 2)
    assert found.floor_nats == pytest.approx(math.log(2) / 2)
    assert found.num_items == 2


def test_soft_cross_entropy_is_at_its_floor_where_people_are_matched() -> None:
    rng = np.random.default_rng(3)
    rows = [replace(row, human=_softmax(row.scores)) for row in _random(rng, 20)]
    found = soft_cross_entropy_nats(rows)
    assert found.nats.estimate == pytest.approx(found.floor_nats)
    others = [
        replace(row, scores=_random(rng, 1)[0].scores) for row in rows
    ]  # nobody else comes below
    assert soft_cross_entropy_nats(others).nats.estimate > found.floor_nats


def test_soft_cross_entropy_does_not_see_a_constant_but_sees_temperature() -> None:
    rng = np.random.default_rng(4)
    rows = [replace(row, human=_human(rng.dirichlet((1, 1, 1)))) for row in _random(rng, 20)]
    lower = [replace(row, scores={k: v - 700 for k, v in row.scores.items()}) for row in rows]
    halved = [replace(row, scores={k: v / 2 for k, v in row.scores.items()}) for row in rows]
    plain = soft_cross_entropy_nats(rows).nats.estimate
    assert soft_cross_entropy_nats(lower).nats.estimate == pytest.approx(plain)
    warm = soft_cross_entropy_nats(rows, temperature=2.0).nats.estimate
    assert warm == pytest.approx(soft_cross_entropy_nats(halved).nats.estimate)
    uniform = soft_cross_entropy_nats(rows, temperature=1e9).nats.estimate
    assert uniform == pytest.approx(math.log(3))


def test_soft_cross_entropy_is_finite_where_an_option_is_all_but_impossible() -> None:
    rows = [_row(0, (0, -3000, -1), human=_human((0.75, 0.25, 0.0)))]
    found = soft_cross_entropy_nats(rows).nats.estimate
    assert found == pytest.approx(0.25 * 3000 + math.log(1 + math.exp(-1)))
    sure = [_row(0, (0, -3000, -3000), human=_human((1.0, 0.0, 0.0)))]
    assert soft_cross_entropy_nats(sure).nats.estimate == 0.0


def test_soft_cross_entropy_reads_shares_by_name() -> None:
    row = _row(0, (1, 2, 3), human=_human((0.2, 0.3, 0.5)))
    turned = replace(row, human=dict(reversed(row.human.items())))
    assert soft_cross_entropy_nats([turned]) == soft_cross_entropy_nats([row])
    with pytest.raises(ValueError, match=r"item 'item-0': human shares of \['care'\]"):
        soft_cross_entropy_nats([replace(row, human={"care": 1.0})])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_no_such_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="above 0 and finite"):
        soft_cross_entropy_nats([_row(0, (1, 2, 3), human=_human((1, 0, 0)))], temperature)


def test_no_human_labels_are_refused() -> None:
    for figure in (soft_cross_entropy_nats, fitted_temperature):
        with pytest.raises(ValueError, match="no rows with human labels"):
            figure([_row(0, (1, 2, 3))])


@pytest.mark.parametrize("temperature", [0.06, 0.4, 1.0, 2.5, 19.0])
def test_the_temperature_that_was_put_in_is_found(temperature: float) -> None:
    rows = [
        replace(row, human=_softmax(row.scores, temperature))
        for row in _random(np.random.default_rng(5), 30)
    ]
    found = fitted_temperature(rows)
    assert found.temperature == pytest.approx(temperature, rel=1e-6)
    assert found.nats == pytest.approx(soft_cross_entropy_nats(rows).floor_nats)
    assert not found.at_bound


def test_no_temperature_of_a_grid_is_better() -> None:
    rng = np.random.default_rng(6)
    for _ in range(5):
        shares = rng.dirichlet((0.5, 0.5, 0.5), size=25)
        rows = [
            _row(index, 3 * np.log(share + 0.05) + rng.normal(size=3), human=_human(share))
            for index, share in enumerate(shares)
        ]
        found = fitted_temperature(rows)
        grid = [
            soft_cross_entropy_nats(rows, value).nats.estimate
            for value in np.geomspace(0.05, 20, 60)
        ]
        assert not found.at_bound and 0.05 < found.temperature < 20
        assert found.nats <= min(grid)
        assert found.nats == pytest.approx(min(grid), abs=0.01)


def test_temperature_goes_with_the_scale_of_the_scores() -> None:
    rng = np.random.default_rng(7)
    rows = [replace(row, human=_softmax(row.scores, 1.3)) for row in _random(rng, 20)]
    doubled = [replace(row, scores={k: 2 * v for k, v in row.scores.items()}) for row in rows]
    assert fitted_temperature(doubled).temperature == pytest.approx(2.6)


@pytest.mark.parametrize(
    ("scores", "shares", "bound"),
    [
        ((1, 0, 0), (1.0, 0.0, 0.0), 0.05),  # always right: the surer the better
        ((0, 1, 0), (1.0, 0.0, 0.0), 20.0),  # always wrong: the less sure the better
        ((2, 2, 2), (0.5, 0.3, 0.2), 20.0),  # no temperature makes a difference
    ],
)
def test_a_temperature_at_the_bound_is_said_to_be(
    scores: Sequence[float], shares: Sequence[float], bound: float
) -> None:
    found = fitted_temperature([_row(0, scores, human=_human(shares))])
    assert (found.temperature, found.at_bound) == (bound, True)


# --- shifts ---


def _base_and_moved(
    moves: Sequence[Sequence[float]],
) -> tuple[list[ForcedChoiceRow], list[ForcedChoiceRow]]:
    base = _random(np.random.default_rng(8), len(moves))
    moved = [
        replace(row, scores={k: row.scores[k] + by for k, by in zip(NAMES, move, strict=True)})
        for row, move in zip(base, moves, strict=True)
    ]
    return moved, base


def test_centred_log_ratio_shift_by_hand() -> None:
    rows, base = _base_and_moved([(3, 0, 0), (0, 0, -6)])
    # centred: (2, -1, -1) and (2, 2, -4)
    found = _estimates(centred_log_ratio_shift_nats(rows, base))
    assert found == pytest.approx({"care": 2.0, "fairness": 0.5, "authority": -2.5})


def test_centred_log_ratio_shift_is_aitchisons_on_probabilities() -> None:
    rng = np.random.default_rng(9)
    rows, base = _random(rng, 12), _random(rng, 12)

    def centred(row: ForcedChoiceRow, name: str) -> float:
        shares = _softmax(row.scores)
        return math.log(shares[name] / math.prod(shares.values()) ** (1 / 3))  # geometric mean

    expected = {
        name: sum(centred(a, name) - centred(b, name) for a, b in zip(rows, base, strict=True)) / 12
        for name in NAMES
    }
    found = _estimates(centred_log_ratio_shift_nats(rows, base))
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(0, abs=1e-12)
    back = _estimates(centred_log_ratio_shift_nats(base, rows))
    assert back == pytest.approx({name: -value for name, value in found.items()})


def test_a_constant_for_all_options_is_no_shift() -> None:
    rows, base = _base_and_moved([(-700, -700, -700)] * 5)
    for interval in centred_log_ratio_shift_nats(rows, base).values():
        assert (interval.estimate, interval.low, interval.high) == pytest.approx(
            (0, 0, 0), abs=1e-9
        )


def test_intervals_of_shifts_are_paired() -> None:
    rows, base = _base_and_moved([(3, 0, 0)] * 25)  # items differ, all are moved alike
    for interval in centred_log_ratio_shift_nats(rows, base).values():
        assert interval.high - interval.low < 1e-9
        assert interval.excludes_zero


def test_selectivity_by_hand() -> None:
    rows, base = _base_and_moved([(3, 0, 0), (0, 0, -6)])
    # care 2, fairness 0.5, authority -2.5
    assert selectivity(rows, base, {"care": 1, "authority": -1}).estimate == pytest.approx(
        (2 + 2.5) / 2 - 0.1 * 0.5
    )
    assert selectivity(rows, base, {"care": -1}).estimate == pytest.approx(
        -2 - 0.1 * (0.5 + 2.5) / 2
    )
    everything = dict(zip(NAMES, (1, 1, -1), strict=True))
    assert selectivity(rows, base, everything).estimate == pytest.approx((2 + 0.5 + 2.5) / 3)


def test_selectivity_pays_for_lost_coherence_and_nothing_for_more() -> None:
    rows, base = _base_and_moved([(3, 0, 0)] * 4)
    full = selectivity(rows, base, {"care": 1}).estimate
    assert full == pytest.approx(2 - 0.1 * 1)
    base = [replace(row, pmass=0.8) for row in base]
    for masses, factor in [((0.4,) * 4, 0.25), ((0.2, 0.6, 0.4, 0.4), 0.25), ((1.0,) * 4, 1.0)]:
        lower = [replace(row, pmass=mass) for row, mass in zip(rows, masses, strict=True)]
        assert selectivity(lower, base, {"care": 1}).estimate == pytest.approx(full * factor)


def test_off_is_the_size_of_the_mean_shift_not_the_mean_size() -> None:
    """Fairness goes up in one item and down in the other: nothing moved on the whole."""
    rows, base = _base_and_moved([(0, 3, -3), (0, -3, 3)])
    assert selectivity(rows, base, {"care": 1}).estimate == pytest.approx(0, abs=1e-12)


def test_nothing_moved_is_zero_everywhere() -> None:
    rows = _random(np.random.default_rng(10), 15, human=_human((0.2, 0.3, 0.5)))
    intended = {"care": 1, "authority": -1}
    for interval in (
        *centred_log_ratio_shift_nats(rows, rows).values(),
        selectivity(rows, rows, intended),
        flip_rate(rows, rows, intended),
    ):
        assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)


@pytest.mark.parametrize("intended", [{}, {"honesty": 1}, {"care": 2}, {"care": 0}, {"care": 0.5}])
def test_intentions_that_say_nothing_are_refused(intended: dict[str, int]) -> None:
    rows = [_row(0, (1, 2, 3))]
    for figure in (selectivity, flip_rate):
        with pytest.raises(ValueError, match="1 or -1 is expected"):
            figure(rows, rows, intended)


# --- flips ---

GAIN, PLAIN, LOSE, ALSO_GAIN, ALSO_LOSE = "gain", "plain", "lose", "also gain", "also lose"
SIGNS = {GAIN: 1, ALSO_GAIN: 1, LOSE: -1, ALSO_LOSE: -1}
OPTIONS = (GAIN, PLAIN, LOSE, ALSO_GAIN, ALSO_LOSE, "also plain")


def _top(*picked: str) -> ForcedChoiceRow:
    return _made("a", {name: 1.0 if name in picked else 0.0 for name in OPTIONS})


@pytest.mark.parametrize(("before", "after"), list(product(OPTIONS, OPTIONS)))
def test_every_flip_counts_as_defined(before: str, after: str) -> None:
    """The definition, said in words: to a gaining one or away from a losing one, and not both."""
    forth = before != after and (SIGNS.get(after) == 1 or SIGNS.get(before) == -1)
    back = before != after and (SIGNS.get(after) == -1 or SIGNS.get(before) == 1)
    expected = 0 if forth == back else (1 if forth else -1)
    assert flip_rate([_top(after)], [_top(before)], SIGNS).estimate == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((LOSE,), (LOSE, GAIN), 1),  # half way there
        ((LOSE, GAIN), (LOSE,), -1),
        ((PLAIN,), (LOSE, GAIN), 0),  # as much to one as to the other
        ((LOSE, GAIN), (GAIN, LOSE), 0),
        ((GAIN,), (GAIN, ALSO_GAIN), 0),
        ((LOSE,), (LOSE, PLAIN, "also plain"), 1),
        (OPTIONS, (PLAIN,), 0),
    ],
)
def test_a_tie_counts_by_the_mean_of_its_signs(
    before: tuple[str, ...], after: tuple[str, ...], expected: int
) -> None:
    assert flip_rate([_top(*after)], [_top(*before)], SIGNS).estimate == expected


def _selective(rows: Sequence[ForcedChoiceRow], base: Sequence[ForcedChoiceRow]) -> float:
    """Selectivity for more care and less authority, an item at a time."""
    moved = dict.fromkeys(NAMES, 0.0)
    for after, before in zip(rows, base, strict=True):
        for sign, row in ((1, after), (-1, before)):
            middle = sum(row.scores.values()) / len(NAMES)
            for name in NAMES:
                moved[name] += sign * (row.scores[name] - middle) / len(rows)
    kept = min(1.0, sum(row.pmass for row in rows) / sum(row.pmass for row in base))
    on = (moved["care"] - moved["authority"]) / 2
    return (on - 0.1 * abs(moved["fairness"])) * kept**2


def test_differences_of_pairs_draw_the_items_of_all_four_together() -> None:
    rng = np.random.default_rng(3)
    sides = [_random(rng, 12, pmass=pmass) for pmass in (0.7, 0.9, 0.8, 1.0)]
    signs = {"care": 1, "authority": -1}
    selective = selectivity_difference((sides[0], sides[1]), (sides[2], sides[3]), signs, seed=5)
    flips = flip_rate_difference((sides[0], sides[1]), (sides[2], sides[3]), signs, seed=5)
    drawn: list[list[float]] = [[], []]
    for counts in np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), 10_000)[:2000]:
        chosen = [index for index, count in enumerate(counts) for _ in range(count)]
        one, two, three, four = ([side[index] for index in chosen] for side in sides)
        drawn[0].append(_selective(one, two) - _selective(three, four))
        drawn[1].append(_flipped(one, two) - _flipped(three, four))
    for found, values, figure in zip(
        (selective, flips), drawn, (_selective, _flipped), strict=True
    ):
        exact = figure(sides[0], sides[1]) - figure(sides[2], sides[3])
        assert found.estimate == pytest.approx(exact)
        spread = np.std(values)  # a fifth of the draws: their quantiles are as far off as that
        assert [found.low, found.high] == pytest.approx(
            np.quantile(values, [0.025, 0.975]), abs=0.25 * spread
        )


def _flipped(rows: Sequence[ForcedChoiceRow], base: Sequence[ForcedChoiceRow]) -> float:
    worth = {"care": 1, "authority": -1, "fairness": 0}
    moves = [
        worth[max(after.scores, key=lambda name: after.scores[name])]
        - worth[max(before.scores, key=lambda name: before.scores[name])]
        for after, before in zip(rows, base, strict=True)
    ]
    return sum((move > 0) - (move < 0) for move in moves) / len(moves)


def test_a_pair_does_not_differ_from_itself() -> None:
    rng = np.random.default_rng(4)
    signs = {"care": 1, "authority": -1}
    pair = (_random(rng, 9), _random(rng, 9))
    nothing = Interval(estimate=0, low=0, high=0)
    assert selectivity_difference(pair, pair, signs) == nothing
    assert flip_rate_difference(pair, pair, signs) == nothing
    other = ([replace(row, id="x") for row in pair[0]], [replace(row, id="x") for row in pair[1]])
    for figure in (selectivity_difference, flip_rate_difference):
        with pytest.raises(ValueError, match="different items"):
            figure(pair, other, signs)


def test_flip_rate_is_a_signed_share() -> None:
    base = [replace(_top(name), id=str(index)) for index, name in enumerate([LOSE] * 8 + [GAIN])]
    moved = [GAIN] * 3 + [LOSE] * 5 + [PLAIN]
    rows = [replace(_top(name), id=str(index)) for index, name in enumerate(moved)]
    found = flip_rate(rows, base, SIGNS)
    assert found.estimate == pytest.approx((3 - 1) / 9)
    assert -1 <= found.low < found.estimate < found.high <= 1


# --- perspectives ---


def _shares(
    item: str, perspective: Literal["other", "self"], shares: Sequence[float]
) -> ForcedChoiceRow:
    scores = dict(zip(NAMES, (math.log(share) - 5 for share in shares), strict=True))
    return _made(item, scores, perspective=perspective)


def test_perspective_gap_by_hand_in_any_order() -> None:
    rows = [
        _shares("b", "self", (0.6, 0.2, 0.2)),
        _shares("a", "other", (0.1, 0.1, 0.8)),
        _shares("a", "self", (0.2, 0.2, 0.6)),
        _shares("b", "other", (0.3, 0.1, 0.6)),
    ]
    expected = {"care": math.log(2), "fairness": math.log(2), "authority": math.log(0.8 / 1.4)}
    assert _estimates(perspective_gap_nats(rows)) == pytest.approx(expected)
    assert _estimates(perspective_gap_nats(rows[::-1])) == pytest.approx(expected)


def test_perspective_gap_is_paired_by_item() -> None:
    rng = np.random.default_rng(11)
    rows = []
    for item, care in enumerate(rng.uniform(0.05, 0.45, size=40)):
        rows.append(_shares(f"{item}", "other", (care, 0.3, 0.7 - care)))
        rows.append(_shares(f"{item}", "self", (2 * care, 0.05, 0.95 - 2 * care)))
    found = perspective_gap_nats(rows)["care"]
    assert found.estimate == pytest.approx(math.log(2))
    assert found.high - found.low < 1e-9


def test_perspective_gap_of_an_all_but_impossible_option_is_finite() -> None:
    rows = [_row(0, (0, 0, -2000)), _row(0, (0, 0, -2003), perspective="self")]
    assert perspective_gap_nats(rows)["authority"].estimate == pytest.approx(-3)


def test_a_gap_needs_every_item_once_in_each_perspective() -> None:
    other, own = _row(0, (1, 2, 3)), _row(0, (1, 2, 3), perspective="self")
    with pytest.raises(ValueError, match="0 self, 1 other"):
        perspective_gap_nats([other])
    with pytest.raises(ValueError, match=r"different items \(1 and 2\).*item-1"):
        perspective_gap_nats([own, other, _row(1, (1, 2, 3))])
    with pytest.raises(ValueError, match=r"different items \(1 and 2\)"):
        perspective_gap_nats([own, other, other])


def test_two_perspectives_of_one_vignette_are_no_two_observations() -> None:
    """Every row said twice must not make an interval narrower."""
    rng = np.random.default_rng(12)
    rows, base = _random(rng, 30), _random(rng, 30)
    twice = [[*side, *(replace(row, perspective="self") for row in side)] for side in (rows, base)]
    intended = {"care": 1, "authority": -1}
    pairs = [
        (informedness(twice[0]), informedness(rows)),
        (selectivity(*twice, intended), selectivity(rows, base, intended)),
        (flip_rate(*twice, intended), flip_rate(rows, base, intended)),
    ]
    for double, single in pairs:
        assert double.low < double.high
        assert double.model_dump() == pytest.approx(single.model_dump(), abs=1e-9)
    labelled = [replace(row, human=_human((0.2, 0.3, 0.5))) for row in rows]
    double_labelled = [replace(row, human=_human((0.2, 0.3, 0.5))) for row in twice[0]]
    assert soft_cross_entropy_nats(double_labelled).nats.model_dump() == pytest.approx(
        soft_cross_entropy_nats(labelled).nats.model_dump()
    )


def test_weights_are_those_of_ids_drawn_with_replacement() -> None:
    weights = bootstrap_weights(["a", "b", "a", "c"], seed=0)
    assert weights.shape == (10_000, 4)
    assert weights.sum(1) == pytest.approx(np.ones(10_000))
    assert (weights[:, 0] == weights[:, 2]).all()
    alone = bootstrap_weights(["a", "b", "c"], seed=0)
    assert ((alone > 0) == (weights[:, [0, 1, 3]] > 0)).all()
    assert mean_interval([1.0, 4.0, 9.0]) == mean_interval([1.0, 4.0, 9.0], ids=["x", "y", "z"])


# --- what all have in common ---


def test_other_foundations_are_refused() -> None:
    other = _made("item-0", {"care": 1.0, "x": 0.0})
    with pytest.raises(ValueError, match=r"item 'item-0': scores of \['care', 'x'\]"):
        centred_log_ratio_shift_nats([_row(0, (1, 2, 3))], [other])


def test_other_items_and_another_order_of_perspectives_are_refused() -> None:
    one, two = _row(0, (1, 2, 3)), _row(0, (1, 2, 3), perspective="self")
    with pytest.raises(ValueError, match="another order"):
        flip_rate([one, two], [two, one], {"care": 1})
    with pytest.raises(ValueError, match=r"item-0 \(self\)"):
        selectivity([one], [two], {"care": 1})
    with pytest.raises(ValueError, match="no rows"):
        centred_log_ratio_shift_nats([], [])


# --- seeds ---


def test_seed_interval_by_hand() -> None:
    found = seed_interval([1.0, 2.0, 3.0])  # t of 2 degrees of freedom: 4.3027
    half = 4.302653 / math.sqrt(3)
    assert (found.estimate, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    two = seed_interval([5.0, 5.2])  # 12.7062 times 0.1
    assert two.high - two.estimate == pytest.approx(1.27062, rel=1e-5)


@pytest.mark.parametrize("num_seeds", [2, 3, 4, 5, 6, 9, 10, 30, 41])
def test_t_holds_95_percent_of_students_distribution(num_seeds: int) -> None:
    """The density integrated from -t to t, whatever way t was found."""
    values = [0.0] * (num_seeds - 1) + [1.0]
    error = np.std(values, ddof=1) / math.sqrt(num_seeds)
    t = (seed_interval(values).high - 1 / num_seeds) / error
    degrees = num_seeds - 1
    grid = np.linspace(-t, t, 200_001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density = np.exp(log_scale) / math.sqrt(degrees * math.pi)
    density = density * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, grid) == pytest.approx(0.95, abs=1e-8)


def test_seed_interval_covers_the_truth_95_times_in_100() -> None:
    draws = np.random.default_rng(13).normal(0.3, 2.0, size=(4000, 3))
    found = [seed_interval(values) for values in draws.tolist()]
    assert 0.94 <= np.mean([each.low <= 0.3 <= each.high for each in found]) <= 0.96


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_seed_has_no_spread(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"two or more values, not {len(values)}"):
        seed_interval(values)


def test_seeds_that_agree_are_a_point() -> None:
    assert seed_interval([0.5, 0.5]).model_dump() == {"estimate": 0.5, "low": 0.5, "high": 0.5}
