"""Figures over rows: profiles, shifts, and paired bootstrap intervals.

Everything here works on saved rows; no model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from eval.errors import UserError
from eval.rows import ForcedChoiceRow, NeutralRow, YesNoRow

NUM_DRAWS = 10_000
Row = TypeVar("Row", ForcedChoiceRow, YesNoRow)


class Interval(BaseModel):
    """An estimate with its 95 % interval: a bootstrap over items unless it says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def choice_probabilities(rows: Sequence[ForcedChoiceRow]) -> np.ndarray:
    """Softmax of each row's scores: [items, foundations], in the first row's order."""
    return _probabilities(rows, list(rows[0].scores))


def _probabilities(rows: Sequence[ForcedChoiceRow], names: Sequence[str]) -> np.ndarray:
    """Softmax of each row's scores: [items, names]; saved rows may have their keys sorted."""
    for row in rows:
        if set(row.scores) != set(names):
            raise ValueError(f"item {row.id!r}: scores of {list(row.scores)}, not of {list(names)}")
    scores = np.array([[row.scores[name] for name in names] for row in rows])
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def profile_nats(rows: Sequence[ForcedChoiceRow]) -> dict[str, float]:
    """`<foundation>_nats`: log of the mean probability over the items, nats (0 at most)."""
    means = np.log(choice_probabilities(rows).mean(0))
    return dict(zip(rows[0].scores, means.tolist(), strict=True))


def mean_pmass(rows: Sequence[ForcedChoiceRow]) -> float:
    """Mean probability on the allowed answers, 0 to 1."""
    return float(np.mean([row.pmass for row in rows]))


def accuracy(rows: Sequence[ForcedChoiceRow], foundations: Sequence[str]) -> float:
    """Share of items of these foundations whose likeliest option is their label, 0 to 1."""
    judged = [row for row in rows if row.label in foundations]
    if not judged:
        raise ValueError(f"none of {len(rows)} items has a label among {list(foundations)}")
    return float(
        np.mean([max(row.scores, key=lambda k: row.scores[k]) == row.label for row in judged])
    )


def shift_nats(
    rows: Sequence[ForcedChoiceRow], base: Sequence[ForcedChoiceRow], seed: int = 0
) -> dict[str, Interval]:
    """Shift of `<foundation>_nats` from base, nats: positive means chosen more often than by base.

    Paired: items are drawn with replacement, the same ones for both.
    """
    require_same_items([row.key for row in rows], [row.key for row in base])
    names = list(rows[0].scores)
    after, before = _probabilities(rows, names), _probabilities(base, names)
    weights = bootstrap_weights([row.id for row in rows], seed)  # [draws, items]
    drawn = np.log(weights @ after) - np.log(weights @ before)  # [draws, foundations]
    exact = np.log(after.mean(0)) - np.log(before.mean(0))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {
        name: Interval(estimate=exact[index], low=low[index], high=high[index])
        for index, name in enumerate(names)
    }


def mean_interval(
    values: Sequence[float], seed: int = 0, ids: Sequence[str] | None = None
) -> Interval:
    """Mean of one value an item, with its interval; a paired difference if given differences.

    Args:
        ids: the items' ids, where some occur more than once; None: every value is another item's.
    """
    array = np.asarray(values, dtype=float)
    drawn = bootstrap_weights(ids or [str(index) for index in range(len(array))], seed) @ array
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(estimate=float(array.mean()), low=float(low), high=float(high))


def ratio_interval(
    values: Sequence[float], base_values: Sequence[float], seed: int = 0
) -> Interval:
    """Mean of the values over the mean of base's, an item each in both; 1: no difference.

    Paired: items are drawn with replacement, the same ones for both.
    """
    after, before = np.asarray(values, dtype=float), np.asarray(base_values, dtype=float)
    if after.shape != before.shape or not before.mean() > 0:
        raise ValueError(f"a ratio of {len(after)} values to {len(before)} with mean above 0")
    weights = bootstrap_weights([str(index) for index in range(len(after))], seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have zeros of base alone
        low, high = np.nanquantile((weights @ after) / (weights @ before), [0.025, 0.975])
    estimate = float(after.mean() / before.mean())
    return Interval(estimate=estimate, low=float(low), high=float(high))


def rank_correlation(
    left: Sequence[float], right: Sequence[float], ids: Sequence[str], seed: int = 0
) -> Interval | None:
    """Spearman's correlation of two values a row, -1 to 1; positive: they rise together.

    The correlation of their ranks, ties sharing the mean of theirs. The ranks are those among all
    rows, in every draw too. None where one of the two is the same in every row.

    Args:
        ids: rows with one id are drawn together.
    Source: Spearman 1904, "The proof and measurement of association between two things".
    """
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (left, right)]
    if any(np.ptp(each) == 0 for each in ranks):
        return None

    def correlation(weights: np.ndarray) -> np.ndarray:  # [draws, rows] -> [draws]
        means = [weights @ each for each in ranks]
        (xy, xx, yy) = (
            weights @ (ranks[one] * ranks[two]) - means[one] * means[two]
            for one, two in ((0, 1), (0, 0), (1, 1))
        )
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have one value alone
            return np.clip(xy / np.sqrt(xx * yy), -1, 1)

    exact = correlation(np.full((1, len(ids)), 1 / len(ids)))[0]
    low, high = np.nanquantile(correlation(bootstrap_weights(ids, seed)), [0.025, 0.975])
    return Interval(estimate=float(exact), low=float(low), high=float(high))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs: [rows]."""
    below = (values[None, :] < values[:, None]).sum(1)
    same = (values[None, :] == values[:, None]).sum(1)
    return below + (same + 1) / 2


def common_items(*sides: Sequence[Row]) -> list[list[Row]]:
    """The rows of the items that every side has: an item may be unscorable in one of them."""
    shared = set.intersection(*({row.key for row in rows} for rows in sides))
    if not shared:
        raise UserError("no item was scored in every one of the evaluations")
    return [[row for row in rows if row.key in shared] for rows in sides]


def require_same_items(left: Sequence[str], right: Sequence[str]) -> None:
    """Raises ValueError where two evaluations were not made on the same items in one order."""
    if list(left) != list(right):
        only = sorted(set(left) ^ set(right))[:5] or "the same ones in another order"
        raise ValueError(f"evaluated on different items ({len(left)} and {len(right)}): {only}")


def bootstrap_weights(ids: Sequence[str], seed: int) -> np.ndarray:
    """Draws of items with replacement, as the share that each has of a draw: [draws, items].

    `weights @ values` is the mean of every draw; two sides of a difference are paired by one call.
    Items of one id are drawn together: the two perspectives of a vignette are no two independent
    observations, and an interval that took them so would be too narrow.
    """
    order = {item_id: index for index, item_id in enumerate(dict.fromkeys(ids))}
    draws = _draws(len(order), seed)  # [draws, ids]
    if len(order) == len(ids):
        return draws
    weights = draws[:, [order[item_id] for item_id in ids]]
    return weights / weights.sum(1, keepdims=True)


@lru_cache(maxsize=8)  # a report asks for the same draws again and again
def _draws(num_ids: int, seed: int) -> np.ndarray:
    """Each row the shares of a draw with replacement: [draws, ids]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_ids, np.full(num_ids, 1 / num_ids), NUM_DRAWS) / num_ids


def perplexity_ratio(
    rows: Sequence[NeutralRow], base_rows: Sequence[NeutralRow], seed: int = 0
) -> Interval | None:
    """Perplexity of the text over that under the base; above 1: the model predicts it worse.

    Paired: the interval draws items, the same ones for both. Items that one of them could not score
    are left out of both; None where no item is left.
    """
    require_same_items([row.id for row in rows], [row.id for row in base_rows])
    scored = [
        (after.id, after.nll_nats - before.nll_nats, after.tokens)
        for after, before in zip(rows, base_rows, strict=True)
        if after.nll_nats is not None and before.nll_nats is not None
    ]
    if not scored:
        return None
    more = np.array([nats for _, nats, _ in scored])
    tokens = np.array([count for _, _, count in scored], dtype=float)
    weights = bootstrap_weights([item_id for item_id, _, _ in scored], seed)  # [draws, items]
    low, high = np.quantile(np.exp((weights @ more) / (weights @ tokens)), [0.025, 0.975])
    exact = float(np.exp(more.sum() / tokens.sum()))
    return Interval(estimate=exact, low=float(low), high=float(high))
