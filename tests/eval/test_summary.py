"""What is said of a difference beside its interval."""

from __future__ import annotations

import pytest

from eval.statistics import Interval
from eval.summary import differences_text


@pytest.mark.parametrize(
    ("estimate", "low", "high", "said"),
    [
        (0.2, 0.1, 0.3, "+0.200 [+0.100, +0.300]"),
        (0.2, -0.1, 0.5, "+0.200 [-0.100, +0.500]  no difference shown"),
        (0.0, 0.0, 0.0, "+0.000 [+0.000, +0.000]  no difference shown"),
        (-0.0002, -0.0003, -0.0001, "+0.000 [+0.000, +0.000]  a difference, but below 0.0005"),
    ],
)
def test_a_difference_says_whether_it_is_one(
    estimate: float, low: float, high: float, said: str
) -> None:
    interval = Interval(estimate=estimate, low=low, high=high)
    assert differences_text({"pmass": interval}) == f"pmass  {said}"
