"""Figures over rows: how well a probe sees, how near to people it is, what an intervention moved.

Everything here works on saved rows; no model is needed. `s[f]` is an item's score of foundation
`f`, nats; `p` is the softmax of the scores over the foundations. Intervals are 95 %, from a
bootstrap over ids (the same draws for both sides of a difference) but for `seed_interval`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from eval.rows import ForcedChoiceRow
from eval.statistics import Interval, bootstrap_weights, mean_interval, require_same_items

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
Pair = tuple[Sequence[ForcedChoiceRow], Sequence[ForcedChoiceRow]]  # rows after, rows before
OFF_WEIGHT = 0.1  # what a nat of unintended shift costs in `selectivity`, in nats of intended


class SoftCrossEntropy(BaseModel):
    """Distance from people's answers, and the least that it could be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nats: Interval  # mean over the items with human labels; lower is nearer to people
    floor_nats: float  # mean entropy of the human labels: what a perfect match would have
    num_items: int  # items with human labels


class FittedTemperature(BaseModel):
    """The temperature at which the answers are nearest to people's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float  # above 1: the answers are surer than people are; below 1: less sure
    nats: float  # the soft cross-entropy there
    at_bound: bool  # the best lies at or beyond the end of the range searched, 0.05 to 20


def informedness(rows: Sequence[ForcedChoiceRow], seed: int = 0) -> Interval:
    """How much better than chance the label is found: macro-averaged Youden's J, -1 to 1.

    J of a foundation = share picked among the items with that label (true positive rate) less share
    picked among the labelled items with another (false positive rate). The mean is over the
    foundations that occur as labels. The pick is the option with the highest score; options that
    tie share it evenly. 1: all found; 0: chance, also for a model that always says the same;
    below 0: worse than chance. Unlike `accuracy`, it does not rise with a guess at the commonest
    label. Items without a label are left out. A foundation that a draw of the bootstrap has no
    item of is left out of that draw's mean.

    Source: Youden 1950, "Index for rating diagnostic tests"; Powers 2011, "Evaluation: from
    precision, recall and F-measure to ROC, informedness, markedness and correlation".
    """
    judged = [row for row in rows if row.label is not None]
    names = _names(judged, "labelled rows")
    labels = np.array([[row.label == name for name in names] for row in judged], dtype=float)
    if not labels.any(1).all():
        other = judged[int(np.argmin(labels.any(1)))]
        raise ValueError(f"item {other.id!r}: label {other.label!r} is none of {names}")
    if (labels.sum(0) > 0).sum() < 2:
        raise ValueError(f"informedness needs labels of two foundations: {len(judged)} rows of one")
    picks = _shared_picks(_score_matrix(judged, names))

    def youden(weights: np.ndarray) -> np.ndarray:
        own, others = weights @ labels, weights @ (1 - labels)  # [draws, foundations]
        with np.errstate(invalid="ignore", divide="ignore"):
            found = weights @ (labels * picks) / own - weights @ ((1 - labels) * picks) / others
            known = (own > 0) & (others > 0)
            return np.where(known, found, 0.0).sum(1) / known.sum(1)  # [draws]

    return _interval(youden, judged, seed)


def soft_cross_entropy_nats(
    rows: Sequence[ForcedChoiceRow], temperature: float = 1.0, seed: int = 0
) -> SoftCrossEntropy:
    """How far the answers are from people's: nats an item, 0 or more, lower is nearer.

    Mean over the items with human labels of `-sum_f human[f] * log softmax(s / temperature)[f]`.
    Less its floor it is the mean Kullback-Leibler divergence of the answers from people's.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature:g}: above 0 and finite is expected")
    human, scores = _human_and_scores(rows)
    ids = [row.id for row in rows if row.human is not None]
    values = -(human * _log_softmax(scores / temperature)).sum(1)  # [items]
    logs = np.log(human, where=human > 0, out=np.zeros_like(human))  # 0 log 0 is 0
    return SoftCrossEntropy(
        nats=mean_interval(values.tolist(), seed, ids),
        floor_nats=float(-(human * logs).sum(1).mean()),
        num_items=len(values),
    )


def fitted_temperature(rows: Sequence[ForcedChoiceRow]) -> FittedTemperature:
    """The temperature, 0.05 to 20, that minimises `soft_cross_entropy_nats`.

    The cross-entropy is convex in `1 / temperature`, so its slope there,
    `mean(sum_f (p[f] - human[f]) * s[f])` with `p` at that temperature, changes sign once: it is
    found by bisection. Scores that are all alike fit every temperature equally: 20, at the bound.

    Source: Guo et al. 2017, "On calibration of modern neural networks" (temperature scaling), here
    with the shares of people in place of one right answer.
    """
    human, scores = _human_and_scores(rows)

    def slope(temperature: float) -> float:
        shares = np.exp(_log_softmax(scores / temperature))
        return float(((shares - human) * scores).sum(1).mean())

    low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE  # the slope falls as temperature rises
    at_bound = slope(high) >= 0 or slope(low) <= 0
    if at_bound:
        best = high if slope(high) >= 0 else low
    else:
        while high / low > 1 + 1e-12:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if slope(middle) > 0 else (low, middle)
        best = math.sqrt(low * high)
    nats = soft_cross_entropy_nats(rows, best).nats.estimate
    return FittedTemperature(temperature=best, nats=nats, at_bound=at_bound)


def centred_log_ratio_shift_nats(
    rows: Sequence[ForcedChoiceRow], base_rows: Sequence[ForcedChoiceRow], seed: int = 0
) -> dict[str, Interval]:
    """Shift of each foundation's centred log-ratio from base, nats; positive: chosen more often.

    `clr(p)[f] = log p[f] - mean_g log p[g]`; the shift is the mean over items of after less before.
    The shifts of all foundations sum to 0. Each item counts the same, however near 0 its `p` is,
    where `shift_nats` is governed by the items with most of the mass.

    Source: Aitchison 1986, "The statistical analysis of compositional data".
    """
    names = _paired_names(rows, base_rows)
    shifts = _centred(rows, names) - _centred(base_rows, names)  # [items, foundations]
    return _intervals(lambda weights: weights @ shifts, names, rows, seed)


def selectivity(
    rows: Sequence[ForcedChoiceRow],
    base_rows: Sequence[ForcedChoiceRow],
    intended: Mapping[str, int],
    seed: int = 0,
) -> Interval:
    """How much of the shift is the one meant, coherence kept: nats, higher is better.

    `(on - 0.1 * off) * min(1, pmass / pmass_base)^2`: `on` is the mean over the intended
    foundations of sign times their `centred_log_ratio_shift_nats`, `off` the mean absolute shift of
    the others (0 where there are none), pmass the mean over items. 0: nothing moved; below 0: the
    intended moved the wrong way, or only the others moved.

    Args:
        intended: foundation -> 1 where more is meant, -1 where less is.
    """
    return _interval(_selectivity(rows, base_rows, intended), rows, seed)


def selectivity_difference(
    after: Pair, before: Pair, intended: Mapping[str, int], seed: int = 0
) -> Interval:
    """`selectivity` of one pair of evaluations less that of another, nats.

    Positive: the first is more selective. Each pair is (rows, base_rows), each with a base of its
    own; all four are of the same items, which are drawn together.
    """
    _paired_names(after[0], before[0])
    sides = [_selectivity(*pair, intended) for pair in (after, before)]
    return _interval(lambda weights: sides[0](weights) - sides[1](weights), after[0], seed)


def flip_rate(
    rows: Sequence[ForcedChoiceRow],
    base_rows: Sequence[ForcedChoiceRow],
    intended: Mapping[str, int],
    seed: int = 0,
) -> Interval:
    """Signed share of items whose picked option changed as intended, -1 to 1.

    An item counts +1 where its pick moves to a foundation meant to gain or away from one meant to
    lose, -1 for the reverse, and 0 where both are true at once (from one meant to gain to another),
    or neither. Ties: options that share the highest score share the pick, whose worth is then the
    mean of their signs (0 for a foundation not in `intended`); an item counts +1 where that worth
    rises and -1 where it falls. So no order of the options decides a tie.

    Args:
        intended: foundation -> 1 where more is meant, -1 where less is.
    """
    flips = _flips(rows, base_rows, intended)
    return mean_interval(flips.tolist(), seed, [row.id for row in rows])


def flip_rate_difference(
    after: Pair, before: Pair, intended: Mapping[str, int], seed: int = 0
) -> Interval:
    """`flip_rate` of one pair of evaluations less that of another, -2 to 2.

    Positive: in the first more picks changed as intended. Pairs as in `selectivity_difference`.
    """
    _paired_names(after[0], before[0])
    gained = _flips(*after, intended) - _flips(*before, intended)
    return mean_interval(gained.tolist(), seed, [row.id for row in after[0]])


def perspective_gap_nats(rows: Sequence[ForcedChoiceRow], seed: int = 0) -> dict[str, Interval]:
    """`<foundation>_nats` where the one asked does it, less where another does, nats.

    Each side is the log of the mean over its items of `p[f]`; positive: the foundation is named
    more often of one's own deeds. Paired by id: every id is needed once in each perspective.
    """
    names = _names(rows, "rows")
    sides = {
        perspective: sorted(
            (row for row in rows if row.perspective == perspective), key=lambda row: row.id
        )
        for perspective in ("self", "other")
    }
    own, others = sides["self"], sides["other"]
    if not own or not others:
        raise ValueError(
            f"a gap needs both perspectives: {len(own)} self, {len(others)} other rows"
        )
    require_same_items([row.id for row in own], [row.id for row in others])
    logs = [_log_softmax(_score_matrix(side, names)) for side in (own, others)]

    def gap(weights: np.ndarray) -> np.ndarray:
        return _log_mean(weights, logs[0]) - _log_mean(weights, logs[1])

    return _intervals(gap, names, own, seed)


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over a few seeds with its 95 % interval by Student's t, in the values' unit.

    `mean ± t * standard deviation / sqrt(n)`, the standard deviation with `n - 1`, and `t` the
    97.5 % quantile at `n - 1` degrees of freedom (12.7 for two seeds). It assumes values that are
    spread about normally; a bootstrap of so few would be far too narrow.

    Source: Student 1908, "The probable error of a mean".
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two or more values, not {len(values)}")
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    half = _student_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(estimate=mean, low=mean - half, high=mean + half)


def _selectivity(
    rows: Sequence[ForcedChoiceRow],
    base_rows: Sequence[ForcedChoiceRow],
    intended: Mapping[str, int],
) -> Callable[[np.ndarray], np.ndarray]:
    """Selectivity as a function of the items' weights: [draws, items] -> [draws], nats."""
    names = _paired_names(rows, base_rows)
    signs = _signs(intended, names)  # [foundations]
    meant = signs != 0
    shifts = _centred(rows, names) - _centred(base_rows, names)
    after = np.array([row.pmass for row in rows])
    before = np.array([row.pmass for row in base_rows])

    def figure(weights: np.ndarray) -> np.ndarray:
        moved = weights @ shifts  # [draws, foundations]
        on = (moved * signs)[:, meant].mean(1)
        off = np.abs(moved[:, ~meant]).mean(1) if not meant.all() else np.zeros(len(moved))
        kept = np.minimum(1.0, (weights @ after) / (weights @ before))
        return (on - OFF_WEIGHT * off) * kept**2

    return figure


def _flips(
    rows: Sequence[ForcedChoiceRow],
    base_rows: Sequence[ForcedChoiceRow],
    intended: Mapping[str, int],
) -> np.ndarray:
    """1 where an item's pick moved as intended, -1 where it moved the other way, or 0: [items]."""
    names = _paired_names(rows, base_rows)
    signs = _signs(intended, names)
    worth = [_shared_picks(_score_matrix(each, names)) @ signs for each in (rows, base_rows)]
    change = worth[0] - worth[1]
    return np.where(np.abs(change) < 1e-9, 0.0, np.sign(change))  # thirds do not sum to 1 exactly


def _names(rows: Sequence[ForcedChoiceRow], what: str) -> list[str]:
    """The foundations of the first row, by whose order every row is read."""
    if not rows:
        raise ValueError(f"no {what}")
    return list(rows[0].scores)


def _paired_names(
    rows: Sequence[ForcedChoiceRow], base_rows: Sequence[ForcedChoiceRow]
) -> list[str]:
    names = _names(rows, "rows")
    require_same_items([row.key for row in rows], [row.key for row in base_rows])
    return names


def _score_matrix(rows: Sequence[ForcedChoiceRow], names: Sequence[str]) -> np.ndarray:
    """Scores, nats: [items, names]."""
    for row in rows:
        if set(row.scores) != set(names):
            raise ValueError(f"item {row.id!r}: scores of {list(row.scores)}, not of {list(names)}")
    return np.array([[row.scores[name] for name in names] for row in rows], dtype=float)


def _human_and_scores(rows: Sequence[ForcedChoiceRow]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of people, and scores, of the items that have both: [items, foundations] each."""
    known = [row for row in rows if row.human is not None]
    names = _names(known, "rows with human labels")
    shares = []
    for row in known:
        human = row.human or {}
        if set(human) != set(names):
            raise ValueError(f"item {row.id!r}: human shares of {list(human)}, not of {names}")
        shares.append([human[name] for name in names])
    return np.array(shares, dtype=float), _score_matrix(known, names)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


def _centred(rows: Sequence[ForcedChoiceRow], names: Sequence[str]) -> np.ndarray:
    """Centred log-ratios, [items, names]: the softmax's constant drops out of the centring."""
    scores = _score_matrix(rows, names)
    return scores - scores.mean(1, keepdims=True)


def _log_mean(weights: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Log of the weighted mean of exp(logs): [draws, items], [items, names] -> [draws, names]."""
    highest = logs.max(0)  # so that probabilities far below 1e-308 do not become log 0
    return np.log(weights @ np.exp(logs - highest)) + highest


def _shared_picks(scores: np.ndarray) -> np.ndarray:
    """1 at an item's highest score, shared evenly where several are highest: [items, names]."""
    highest = (scores == scores.max(1, keepdims=True)).astype(float)
    return highest / highest.sum(1, keepdims=True)


def _signs(intended: Mapping[str, int], names: Sequence[str]) -> np.ndarray:
    """1, -1, or 0 for a foundation that is not meant to move: [names]."""
    unknown = sorted(set(intended) - set(names))
    if not intended or unknown or any(sign not in (1, -1) for sign in intended.values()):
        raise ValueError(
            f"intended {dict(intended)}: 1 or -1 is expected for one or more of {list(names)}"
        )
    return np.array([float(intended.get(name, 0)) for name in names])


def _interval(
    figure: Callable[[np.ndarray], np.ndarray], rows: Sequence[ForcedChoiceRow], seed: int
) -> Interval:
    """A figure of the rows' weights, [draws, rows] -> [draws], on all rows and over the draws."""
    return _intervals(lambda weights: figure(weights)[:, None], ["figure"], rows, seed)["figure"]


def _intervals(
    figure: Callable[[np.ndarray], np.ndarray],
    names: Sequence[str],
    rows: Sequence[ForcedChoiceRow],
    seed: int,
) -> dict[str, Interval]:
    """The same for a figure a name: [draws, rows] -> [draws, names]."""
    exact = figure(np.full((1, len(rows)), 1 / len(rows)))[0]
    drawn = figure(bootstrap_weights([row.id for row in rows], seed))
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)  # a draw may leave J undefined
    return {
        name: Interval(estimate=float(exact[index]), low=float(low[index]), high=float(high[index]))
        for index, name in enumerate(names)
    }


def _student_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t for a whole number of degrees of freedom."""
    low, high = 0.0, 13.0  # one degree of freedom has the largest, 12.71
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _student_within(t: float, degrees: int) -> float:
    """P(|T| < t), a finite sum: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for step in range(1 + odd, degrees, 2):  # the k-th term has k cosines
        total += term
        term *= math.cos(angle) ** 2 * step / (step + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
