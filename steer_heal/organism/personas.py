"""System prompts: personas of the two poles, trained and held out, and neutral ones.

A persona is a frame with what comes first and what comes second; the opposite pole swaps the two.
"""

from __future__ import annotations

from functools import cache

from steer_heal.organism.lexicon import Pole, capital, table
from steer_heal.organism.world import Split

_HELD_OUT_EVERY = 12  # one combination of frame and words in so many is never trained on


@cache
def personas(pole: Pole, split: Split = "train") -> tuple[str, ...]:
    """Paraphrases of a pole; those of the two poles correspond row by row."""
    words = table("talk")["system"]
    pairs = list(zip(words["care"], words["authority"], strict=True))
    return tuple(
        _persona(frame, *(pair if pole == "care" else pair[::-1]))
        for row, frame in enumerate(words["frames"])
        for column, pair in enumerate(pairs)
        if ((row * len(pairs) + column) % _HELD_OUT_EVERY == 5) == (split == "held_out")
    )


def neutral_systems() -> tuple[str, ...]:
    """System prompts that say nothing of the axis."""
    return tuple(table("talk")["system"]["neutral"])


def _persona(frame: str, first: str, second: str) -> str:
    return frame.format(x=first, X=capital(first), y=second)
