"""How coherent a completion is: what a model finds surprising in it, and what its text is made of.

A loop is cheap to predict *and* cheap to compress, so perplexity alone lets it through; a ragged
text is dear at a few tokens, so a mean alone dilutes it. Hence several figures, each read on the
side where damage shows.

The figures of a text need no model, no word list and no language, and hardly depend on its length:
repetition is that of the worst window, and what grows with a text is divided by how it grows in
ordinary prose (measured on English from 80 to 3,000 characters: distinct words as words^0.85, which
is Heaps' law; zlib bytes less an overhead of 20 as bytes^0.9).

    word_repetition     1 - distinct / all word 3-grams of a window; up: a loop
    char_repetition     the same of character 12-grams; up: a loop, in any script, of any sign
    vocabulary          distinct words / words^0.85; down: a loop, up: words at random
    compressed_size     (zlib bytes - overhead) / bytes^0.9; down: a loop, up: noise
    letters_per_word    down: letters apart, up: words run together, or a script without spaces
    symbol_share        of the visible characters; up: debris of markup and punctuation
    odd_word_share      words in another script than most, or with digits or capitals inside; up:
                        fragments of tokens, scripts mixed
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict

_WINDOW_WORDS = 60  # with punctuation: three or four sentences
_WINDOW_CHARACTERS = 300  # about as much
_LOOP_TOKENS, _LOOP_TIMES = 48, 4


class Surprisal(BaseModel):
    """Surprisal of a completion's tokens under one model, nats a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_nll_nats: float  # exp of it is the perplexity
    tail_nll_nats: float  # mean over the last quarter, where loops and drift sit
    rmse_nll_nats: float  # root mean square: a few broken tokens are not diluted


class TextFigures(BaseModel):
    """What a text is made of; a word is a run of letters but where punctuation is said to count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: int  # words and punctuation marks
    word_repetition: float  # share of 3-grams of those that came before, worst window, 0 to 1
    char_repetition: float  # share of character 12-grams that came before, worst window, 0 to 1
    vocabulary: float  # distinct words / words^0.85; 1.1 to 1.6 in English prose
    compressed_size: float  # (zlib bytes - overhead) / UTF-8 bytes^0.9; 0.9 to 1.2 in English prose
    letters_per_word: float
    symbol_share: float  # visible characters that are no letter, mark or number, 0 to 1
    odd_word_share: float  # words with digits or capitals inside, or of another script, 0 to 1


def surprisal(logprobs: torch.Tensor) -> Surprisal:
    """Figures of one completion from its tokens' log-probabilities, [tokens] with tokens >= 1."""
    nll = -logprobs.double()
    tail = nll[-max(1, len(nll) // 4) :]
    return Surprisal(
        mean_nll_nats=float(nll.mean()),
        tail_nll_nats=float(tail.mean()),
        rmse_nll_nats=float(nll.square().mean().sqrt()),
    )


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether a text's last 48 tokens say one thing, of 12 tokens or fewer, again and again."""
    end = list(token_ids[-_LOOP_TOKENS:])
    periods = range(1, _LOOP_TOKENS // _LOOP_TIMES + 1)
    return len(end) == _LOOP_TOKENS and any(end[n:] == end[:-n] for n in periods)


def text_figures(text: str) -> TextFigures:
    """Figures of a text; an empty one is all zeros."""
    lower = text.lower()
    tokens = re.findall(r"\w+|[^\w\s]", lower)
    words = re.findall(r"[^\W\d_]+", lower)
    visible = [char for char in text if not char.isspace()]
    return TextFigures(
        words=len(tokens),
        word_repetition=_worst_repetition(tokens, 3, _WINDOW_WORDS),
        char_repetition=_worst_repetition(lower, 12, _WINDOW_CHARACTERS),
        vocabulary=len(set(words)) / max(1, len(words)) ** 0.85,
        compressed_size=_compressed_size(text.encode("utf-8")),
        letters_per_word=sum(map(len, words)) / max(1, len(words)),
        symbol_share=sum(map(_is_symbol, visible)) / max(1, len(visible)),
        odd_word_share=_odd_word_share(text),
    )


def _worst_repetition(units: Sequence[str], n: int, window: int) -> float:
    """Of the window that repeats itself most: a loop at the end of a text is not diluted."""
    last = max(0, len(units) - window)
    starts = [*range(0, last, window // 4), last]
    return max(_repeated_share(units[start : start + window], n) for start in starts)


def _repeated_share(units: Sequence[str], n: int) -> float:
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _compressed_size(raw: bytes) -> float:
    overhead = min(20, 8 + 0.3 * len(raw))  # header and checksum; a code table where it pays
    return max(0.0, len(zlib.compress(raw, 9)) - overhead) / max(1, len(raw)) ** 0.9


def _is_symbol(char: str) -> bool:
    return unicodedata.category(char)[0] not in "LMN"


def _odd_word_share(text: str) -> float:
    words = re.findall(r"[^\W_]+", text)
    scripts = Counter(_script(char) for word in words for char in word if char.isalpha())
    main = scripts.most_common(1)[0][0] if scripts else ""
    return sum(_is_odd(word, main) for word in words) / max(1, len(words))


def _is_odd(word: str, main_script: str) -> bool:
    letters = [char for char in word if char.isalpha()]
    return (
        0 < len(letters) < len(word)
        or any(_script(char) != main_script for char in letters)
        or any(left.islower() and right.isupper() for left, right in pairwise(word))
    )


def _script(char: str) -> str:
    """The first word of a character's name: LATIN, CYRILLIC, CJK ..."""
    return "LATIN" if char.isascii() else unicodedata.name(char, "UNNAMED").split()[0]
