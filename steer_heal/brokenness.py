"""How broken a text is beside what the base writes itself, by its figures alone (no model).

    excess[k]  = |x[k] - typical[k]| / |limit[k] - typical[k]|, the limit being that on x's side
    brokenness = ( sum_k excess[k]^2 )^(1/2)

x[k] are the text's figures, typical[k] the median of the base's own unsteered completions. An
excess is 0 where the base is, 1 at the limit; over 1 the filter drops. The brokenness is one
figure for a text, lower is better: several mild signs add up in it.

A limit stands beyond the base's own quantile by a margin, as the most repetitive of a sample of the
base's own replies is not yet broken: at `q + margin * (1 - q)` for a share, which is 1 where a text
is nothing else, at `(1 + margin) * q` and `(1 - margin) * q` for a ratio. So a base that never
repeats itself has limits too, and one that is formulaic, or writes without spaces, has wider ones.
The margins are such that limits set by one kind of plain text (a trait's sentences, documentation
with its tables) let nine tenths of the other kind pass, as neither is damaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eval.coherence import TextFigures
from steer_heal.artifacts import TextLimit, TextLimits

_SHARE_MARGINS = {  # only an upper limit
    "word_repetition": 1 / 3,
    "char_repetition": 1 / 3,
    "symbol_share": 1 / 3,
    "odd_word_share": 0.05,  # one odd word in twenty is strange, long before one in three
}
_RATIO_MARGINS = {
    "vocabulary": 1 / 3,
    "compressed_size": 1 / 3,
    "letters_per_word": 1 / 2,  # style alone moves it, damage moves it further
}


def text_limits(figures: Sequence[TextFigures], quantile: float) -> TextLimits:
    """Limits from texts of the base's own."""
    return TextLimits(
        **{
            name: _limit([float(getattr(each, name)) for each in figures], quantile, name)
            for name in TextLimits.model_fields
        }
    )


def brokenness(figures: TextFigures, limits: TextLimits) -> float:
    """One figure for a text, 0 and up; lower is better."""
    return math.hypot(*(_excess(figures, limits, name) for name in TextLimits.model_fields))


def beyond(figures: TextFigures, limits: TextLimits, *names: str) -> bool:
    """Whether one of the named figures is outside of its limits."""
    return any(_excess(figures, limits, name) > 1 for name in names)


def _limit(values: Sequence[float], quantile: float, name: str) -> TextLimit:
    low, typical, high = (float(np.quantile(values, at)) for at in (1 - quantile, 0.5, quantile))
    if name in _SHARE_MARGINS:
        margin = _SHARE_MARGINS[name]
        return TextLimit(low=None, typical=typical, high=high + margin * (1 - high))
    margin = _RATIO_MARGINS[name]
    return TextLimit(low=(1 - margin) * low, typical=typical, high=(1 + margin) * high)


def _excess(figures: TextFigures, limits: TextLimits, name: str) -> float:
    """Distance from the base's typical figure, in units of that of the limit on its side."""
    value, limit = float(getattr(figures, name)), getattr(limits, name)
    if value > limit.typical:
        return (value - limit.typical) / max(limit.high - limit.typical, 1e-9)
    if limit.low is None:
        return 0.0
    return (limit.typical - value) / max(limit.typical - limit.low, 1e-9)
