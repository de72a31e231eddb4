from __future__ import annotations

import math

import numpy as np
import pytest

from eval.rows import ForcedChoiceRow
from eval.statistics import (
    Interval,
    accuracy,
    choice_probabilities,
    mean_interval,
    mean_pmass,
    profile_nats,
    rank_correlation,
    ratio_interval,
    require_same_items,
    shift_nats,
)

NAMES = ("care", "fairness", "authority")


def _row(
    item: int, probabilities: tuple[float, ...], label: str | None = None, pmass: float = 1.0
) -> ForcedChoiceRow:
    """Scores are logs of the probabilities, lowered by the log of pmass: softmax undoes that."""
    scores = [math.log(p * pmass) for p in probabilities]
    return ForcedChoiceRow(
        id=f"item-{item}",
        label=label,
        conflict=False,
        scores=dict(zip(NAMES, scores, strict=True)),
        pmass=pmass,
        prefill_nll_nats=0.0,
    )


def _synthetic(
    rng: np.random.Generator, num_items: int
) -> tuple[list[ForcedChoiceRow], list[ForcedChoiceRow]]:
    """Base and shifted rows of the same items: items differ, the shift is drawn a row."""
    item = rng.normal(size=(num_items, 3))
    shift = rng.normal([0.6, 0.0, -0.6], 0.5, size=(num_items, 3))
    pairs = []
    for logits in (item, item + shift):
        weights = np.exp(logits)
        shares = weights / weights.sum(1, keepdims=True)
        pairs.append([_row(index, tuple(share)) for index, share in enumerate(shares.tolist())])
    return pairs[1], pairs[0]


def test_probabilities_are_the_softmax_of_the_scores() -> None:
    rows = [_row(0, (0.5, 0.3, 0.2), pmass=0.4), _row(1, (0.1, 0.1, 0.8))]
    assert choice_probabilities(rows) == pytest.approx(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))


def test_very_unlikely_options_do_not_underflow() -> None:
    scores = {"care": -2000.0, "fairness": -2000.0 + math.log(3)}
    row = _row(0, (0.5, 0.3, 0.2)).model_copy(update={"scores": scores})
    assert choice_probabilities([row]) == pytest.approx(np.array([[0.25, 0.75]]))


def test_profile_by_hand() -> None:
    rows = [_row(0, (0.5, 0.3, 0.2)), _row(1, (0.1, 0.1, 0.8))]
    assert profile_nats(rows) == pytest.approx(
        {"care": math.log(0.3), "fairness": math.log(0.2), "authority": math.log(0.5)}
    )


def test_rows_saved_with_sorted_keys_are_read_by_name() -> None:
    rows = [_row(0, (0.5, 0.3, 0.2)), _row(1, (0.1, 0.1, 0.8))]
    shuffled = [row.model_copy(update={"scores": dict(sorted(row.scores.items()))}) for row in rows]
    assert list(shuffled[0].scores) == ["authority", "care", "fairness"]
    assert profile_nats(shuffled) == pytest.approx(profile_nats(rows))
    assert profile_nats([rows[0], shuffled[1]]) == pytest.approx(profile_nats(rows))
    for interval in shift_nats(shuffled, rows).values():
        assert interval.estimate == interval.low == interval.high == 0.0


def test_other_foundations_are_refused() -> None:
    other = _row(0, (0.5, 0.3, 0.2)).model_copy(update={"scores": {"care": -1.0, "x": -2.0}})
    with pytest.raises(ValueError, match=r"item 'item-0': scores of \['care', 'x'\]"):
        shift_nats([_row(0, (0.5, 0.3, 0.2))], [other])


def test_mean_pmass_by_hand() -> None:
    rows = [_row(0, (0.5, 0.3, 0.2), pmass=0.9), _row(1, (0.5, 0.3, 0.2), pmass=0.5)]
    assert mean_pmass(rows) == pytest.approx(0.7)


def test_accuracy_by_hand() -> None:
    rows = [
        _row(0, (0.5, 0.3, 0.2), "care"),
        _row(1, (0.1, 0.1, 0.8), "care"),
        _row(2, (0.2, 0.6, 0.2), "fairness"),
        _row(3, (0.2, 0.6, 0.2), None),
    ]
    assert accuracy(rows, ["care"]) == 0.5
    assert accuracy(rows, ["fairness"]) == 1.0
    assert accuracy(rows, NAMES) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"none of 4 items .*\['authority'\]"):
        accuracy(rows, ["authority"])


def test_identical_rows_shift_by_exactly_nothing() -> None:
    rows, _ = _synthetic(np.random.default_rng(0), 37)
    copies = [row.model_copy(deep=True) for row in rows]
    for interval in shift_nats(rows, copies).values():
        assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, 0.0)
        assert not interval.excludes_zero


def test_shift_by_hand_and_its_sign() -> None:
    base = [_row(index, (0.2, 0.3, 0.5)) for index in range(4)]
    rows = [_row(index, (0.4, 0.3, 0.3)) for index in range(4)]
    shift = shift_nats(rows, base)
    assert shift["care"].estimate == pytest.approx(math.log(2))  # chosen more: positive
    assert shift["authority"].estimate == pytest.approx(math.log(0.6))
    assert shift["care"].low == pytest.approx(math.log(2))  # items do not differ
    assert shift["care"].excludes_zero and shift["authority"].excludes_zero
    assert not shift["fairness"].estimate > 1e-12


def test_pairing_takes_the_spread_of_the_items_out() -> None:
    """Items that differ a lot, all shifted alike: a bootstrap of two samples would be wide."""
    rng = np.random.default_rng(1)
    care = rng.uniform(0.05, 0.45, size=50)
    base = [_row(index, (p, 0.3, 0.7 - p)) for index, p in enumerate(care)]
    rows = [_row(index, (2 * p, 0.05, 0.95 - 2 * p)) for index, p in enumerate(care)]
    found = shift_nats(rows, base)["care"]
    assert found.high - found.low < 1e-9
    assert found.estimate == pytest.approx(math.log(2))


def test_shift_interval_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    after, before = _synthetic(rng, 40_000)
    truth = np.log(choice_probabilities(after).mean(0) / choice_probabilities(before).mean(0))
    covered = []
    for _ in range(80):
        found = shift_nats(*_synthetic(rng, 60))
        covered += [
            found[name].low <= value <= found[name].high
            for name, value in zip(NAMES, truth, strict=True)
        ]
    assert 0.90 <= np.mean(covered) <= 0.985


def test_mean_interval_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(3)
    found = [mean_interval(rng.normal(0.3, 2.0, size=60).tolist()) for _ in range(150)]
    assert 0.90 <= np.mean([each.low <= 0.3 <= each.high for each in found]) <= 0.985
    widths = [each.high - each.low for each in found]  # 2 x 1.96 standard errors
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(60), rel=0.05)


def test_mean_interval_of_equal_values_is_a_point() -> None:
    found = mean_interval([2.0] * 8)
    assert (found.estimate, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_intervals_are_reproducible() -> None:
    values = np.random.default_rng(4).normal(size=30).tolist()
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)


@pytest.mark.parametrize(
    ("low", "high", "excludes"), [(-1, 1, False), (0.1, 1, True), (-1, -0.1, True), (0, 1, False)]
)
def test_excludes_zero(low: float, high: float, excludes: bool) -> None:
    assert Interval(estimate=0.0, low=low, high=high).excludes_zero is excludes


def test_other_items_are_refused_and_named() -> None:
    left, right = [_row(0, (0.5, 0.3, 0.2))], [_row(1, (0.5, 0.3, 0.2))]
    with pytest.raises(ValueError, match=r"\(1 and 1\).*item-0.*item-1"):
        shift_nats(left, right)
    require_same_items(["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="in another order"):
        require_same_items(["a", "b"], ["b", "a"])


# --- ratios and rank correlations ---


def test_a_ratio_is_of_means_and_draws_both_sides_together() -> None:
    rng = np.random.default_rng(1)
    before = rng.uniform(10, 40, size=9)
    after = before * rng.uniform(0.9, 1.4, size=9)
    found = ratio_interval(after.tolist(), before.tolist(), seed=4)
    assert found.estimate == pytest.approx(sum(after) / sum(before))
    drawn = [
        float(counts @ after) / float(counts @ before)
        for counts in np.random.default_rng(4).multinomial(9, np.full(9, 1 / 9), 10_000)
    ]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    same = ratio_interval(before.tolist(), before.tolist())
    assert (same.estimate, same.low, same.high) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="ratio of 2 values to 1"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="mean above 0"):
        ratio_interval([1.0, 2.0], [0.0, 0.0])


def test_rank_correlation_by_hand() -> None:
    ids = ["a", "b", "c", "d", "e"]
    squares = rank_correlation([1, 2, 3, 4, 5], [1, 4, 9, 16, 2500], ids)
    assert squares is not None and squares.estimate == pytest.approx(1)
    fallen = rank_correlation([1, 2, 3, 4, 5], [9, 7, 4, 2, 0], ids)
    assert fallen is not None and fallen.estimate == pytest.approx(-1)
    # 1 - 6 * sum of squared differences of ranks / (n (n^2 - 1)), where there are no ties
    found = rank_correlation([10, 20, 30, 40, 50], [3, 1, 2, 5, 4], ids)
    differences = (1 - 3, 2 - 1, 3 - 2, 4 - 5, 5 - 4)
    assert found is not None
    assert found.estimate == pytest.approx(1 - 6 * sum(d * d for d in differences) / (5 * 24))


def test_rank_correlation_with_ties_is_that_of_the_shared_ranks() -> None:
    left, right = [1, 1, 2, 3, 3, 3], [0, 1, 1, 0, 1, 1]
    ranks = [1.5, 1.5, 3, 5, 5, 5], [1.5, 4.5, 4.5, 1.5, 4.5, 4.5]
    found = rank_correlation(left, right, list("abcdef"))
    assert found is not None
    assert found.estimate == pytest.approx(float(np.corrcoef(*ranks)[0, 1]))
    assert -1 <= found.low <= found.estimate <= found.high <= 1


def test_rank_correlation_of_rows_of_few_ids_is_less_certain() -> None:
    rng = np.random.default_rng(2)
    left = np.repeat(rng.normal(size=12), 4)  # what comes from one id is alike
    right = 0.7 * left + np.repeat(rng.normal(size=12), 4)
    own = rank_correlation(left.tolist(), right.tolist(), [str(n) for n in range(48)])
    shared = rank_correlation(left.tolist(), right.tolist(), [str(n // 4) for n in range(48)])
    assert own is not None and shared is not None
    assert own.estimate == shared.estimate
    assert shared.high - shared.low > 1.5 * (own.high - own.low)


def test_what_never_varies_has_no_rank_correlation() -> None:
    assert rank_correlation([1, 1, 1], [1, 2, 3], list("abc")) is None
    assert rank_correlation([1, 2, 3], [0.5, 0.5, 0.5], list("abc")) is None
