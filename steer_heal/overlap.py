"""Overlap of word n-grams: of a reply with the persona's own words, and of replies with each other.

    persona_share(reply) = share of its word 4-grams that stand in the persona or a paraphrase of it
    similarity(a, b)     = |A & B| / |A | B|,  A, B the sets of their word 3-grams   (Jaccard 1912)

A reply that tells the trait says the persona's sentence in the first person, so what the persona is
told ("you are someone who") counts as it would be said ("I am someone who"), too. Acting the trait
uses the persona's words, but hardly four of them in its order; it does use three ("I am told").

Near-duplicates by the Jaccard similarity of shingles: Broder 1997, "On the resemblance and
containment of documents".
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from steer_heal.trait import Trait

_PERSONA_WORDS = 4
_SIMILARITY_WORDS = 3
_FIRST_PERSON = {"you": "i", "your": "my", "yours": "mine", "yourself": "myself", "are": "am"}

Gram = tuple[str, ...]


class PersonaWords:
    """The n-grams of a positive persona and its paraphrases, in the second and the first person."""

    def __init__(self, trait: Trait) -> None:
        told = [_words(text) for text in (trait.positive, *trait.positive_paraphrases)]
        said = [[_FIRST_PERSON.get(word, word) for word in words] for words in told]
        self._grams = {gram for words in told + said for gram in _grams(words, _PERSONA_WORDS)}

    def share(self, text: str) -> float:
        """Share of a text's n-grams that are the persona's, 0 to 1."""
        grams = _grams(_words(text), _PERSONA_WORDS)
        return sum(gram in self._grams for gram in grams) / max(1, len(grams))


class SaidBefore:
    """Texts that were taken, by their n-grams: tells whether another nearly repeats one of them.

    An index from each n-gram to the texts it is in, so that a text is held only to those with which
    it has one in common.
    """

    def __init__(self, least_similarity: float) -> None:
        self._least = least_similarity
        self._sizes: list[int] = []  # n-grams of each text
        self._texts_with: defaultdict[Gram, list[int]] = defaultdict(list)

    def repeats(self, text: str) -> bool:
        """Whether its similarity with a text that was taken is at least the least."""
        grams = _shingles(text)
        shared = Counter(index for gram in grams for index in self._texts_with.get(gram, ()))
        return any(
            common >= self._least * (len(grams) + self._sizes[index] - common)
            for index, common in shared.items()
        )

    def take(self, text: str) -> None:
        """Later texts are held to this one, too."""
        grams = _shingles(text)
        for gram in grams:
            self._texts_with[gram].append(len(self._sizes))
        self._sizes.append(len(grams))


def _shingles(text: str) -> set[Gram]:
    """The n-grams of a text; of one that is shorter, its words as they are."""
    words = _words(text)
    return set(_grams(words, _SIMILARITY_WORDS)) or {tuple(words)}


def _grams(words: Sequence[str], n: int) -> list[Gram]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
