"""How broken a text is: limits by hand, every kind of damage, and real broken text.

The limits never come from the texts they are held against: they are set by plain texts that the
project ships, or by a sweep's cells of the other layers.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from eval.coherence import TextFigures, is_loop, text_figures
from steer_heal.artifacts import TextLimit, TextLimits
from steer_heal.brokenness import beyond, brokenness, text_limits
from steer_heal.trait import load_trait

ROOT = Path(__file__).parents[1]
SWEEP = ROOT.parent / "shared" / "data" / "steered-generations"
FIGURES = tuple(TextLimits.model_fields)

_DRAW = random.Random(0)


def chunks(text: str, characters: int = 350) -> list[str]:
    return [text[at : at + characters] for at in range(0, len(text) - characters + 1, characters)]


def sentences() -> str:
    trait = load_trait("care-over-authority")
    return " ".join([*trait.contexts, *trait.prompts, *trait.held_out_prompts])


def documentation() -> str:
    return "\n".join((ROOT / name).read_text() for name in ("README.md", "eval/README.md"))


def limits_of(texts: Sequence[str], quantile: float = 0.95) -> TextLimits:
    return text_limits([text_figures(text) for text in texts], quantile)


@pytest.fixture(scope="module")
def plain() -> TextLimits:
    """Limits from the project's own plain English, in pieces as long as a reply."""
    return limits_of([*chunks(sentences()), *chunks(documentation())])


def share_dropped(texts: Sequence[str], limits: TextLimits) -> float:
    return float(np.mean([beyond(text_figures(text), limits, *FIGURES) for text in texts]))


# ---------------------------------------------------------------------------------------- by hand


def figures(**given: float) -> TextFigures:
    usual = dict.fromkeys(FIGURES, 0.0) | {"words": 9}
    return TextFigures(**(usual | given))  # type: ignore[arg-type]


def test_limits_by_hand() -> None:
    """Eleven texts: their quantiles at 0.1, 0.5 and 0.9 are the second, sixth and tenth value."""
    texts = [
        figures(word_repetition=n / 20, vocabulary=1 + n / 10, odd_word_share=0.0)
        for n in range(11)
    ]
    found = text_limits(texts, 0.9)
    repetition, vocabulary = found.word_repetition, found.vocabulary
    assert repetition.low is None and repetition.typical == pytest.approx(0.25)
    assert repetition.high == pytest.approx(0.45 + 0.55 / 3)
    assert vocabulary.low == pytest.approx(1.1 * 2 / 3)
    assert vocabulary.typical == pytest.approx(1.5)
    assert vocabulary.high == pytest.approx(1.9 * 4 / 3)
    assert found.odd_word_share.high == pytest.approx(0.05)  # a base without one


def band(low: float | None, typical: float, high: float) -> TextLimit:
    return TextLimit(low=low, typical=typical, high=high)


WIDE = TextLimits(**dict.fromkeys(FIGURES, band(None, 0.0, 1e9)))


@pytest.mark.parametrize(
    ("value", "excess"),
    [(1.0, 0.0), (1.5, 0.5), (2.0, 1.0), (3.0, 2.0), (0.75, 0.5), (0.5, 1.0), (0.0, 2.0)],
)
def test_the_excess_counts_from_the_typical_text_to_the_limit(value: float, excess: float) -> None:
    limits = WIDE.model_copy(update={"vocabulary": band(0.5, 1.0, 2.0)})
    text = figures(vocabulary=value)
    assert brokenness(text, limits) == pytest.approx(excess, abs=1e-6)
    assert beyond(text, limits, "vocabulary") == (excess > 1)
    assert not beyond(text, limits, "word_repetition")


def test_mild_signs_add_up() -> None:
    limits = WIDE.model_copy(
        update={"vocabulary": band(0.5, 1.0, 2.0), "word_repetition": band(None, 0.1, 0.5)}
    )
    text = figures(vocabulary=1.6, word_repetition=0.42)
    assert brokenness(text, limits) == pytest.approx(math.hypot(0.6, 0.8))
    assert not beyond(text, limits, *FIGURES)
    assert brokenness(figures(vocabulary=1.0), limits) == 0.0  # nothing repeated is no damage


def test_texts_that_set_the_limits_at_quantile_1_are_inside(plain: TextLimits) -> None:
    texts = chunks(documentation())
    assert share_dropped(texts, limits_of(texts, quantile=1)) == 0


@pytest.mark.parametrize("base", ["", "42", "yes", "The same reply. The same reply."])
def test_a_base_that_always_says_the_same_passes_itself(base: str) -> None:
    limits = limits_of([base] * 9)
    assert not beyond(text_figures(base), limits, *FIGURES)
    assert brokenness(text_figures(base), limits) == 0.0
    assert math.isfinite(brokenness(text_figures("something else, and quite long"), limits))


# --------------------------------------------------------------------------------- ordinary text


def test_limits_carry_from_one_kind_of_plain_text_to_another() -> None:
    one, other = chunks(sentences()), chunks(documentation())
    assert share_dropped(other, limits_of(one)) <= 0.1  # tables repeat, code has odd words
    assert share_dropped(one, limits_of(other)) <= 0.01


@pytest.mark.parametrize("characters", [80, 150, 700, 1500])
def test_limits_carry_from_one_length_to_another(plain: TextLimits, characters: int) -> None:
    assert share_dropped(chunks(sentences(), characters), plain) <= 0.03


@pytest.mark.parametrize(
    "text",
    [
        "Als der Zug endlich in den Bahnhof einfuhr, standen nur noch drei Leute auf dem "
        "Bahnsteig. Eine ältere Frau mit einem grünen Koffer fragte mich, ob dies der richtige "
        "Zug nach Hamburg sei. Ich wusste es nicht genau, aber der Schaffner nickte freundlich.",
        "Когда мы вышли из дома, дождь уже почти закончился, и на улице пахло мокрой листвой. "
        "Старик у ворот кормил голубей и разговаривал с ними, как с детьми. Моя сестра "
        "остановилась, чтобы спросить у него дорогу до вокзала.",
    ],
    ids=["German", "Russian"],
)
def test_no_figure_is_about_english(plain: TextLimits, text: str) -> None:
    assert not beyond(text_figures(text), plain, *FIGURES)


def test_a_base_without_spaces_sets_its_own_limits(plain: TextLimits) -> None:
    text = (
        "昨天下午我们去了城外的一个小村子,那里的人还在用老办法做豆腐。一位老太太请我们进屋喝茶,"
        "给我们讲她年轻时候的故事。她说以前这条路很难走,下雨天根本出不了门。"
    )
    assert beyond(text_figures(text), plain, "letters_per_word")
    assert not beyond(text_figures(text), limits_of([text] * 9), *FIGURES)


# ------------------------------------------------------------------------------- kinds of damage


def _salad(length: int) -> str:
    vocabulary = sorted(set(re.findall(r"[a-z]+", sentences().lower())))
    return " ".join(_DRAW.choices(vocabulary, k=length // 6))


def _fragments(length: int) -> str:
    words = re.findall(r"[a-z]{4,}", sentences())
    parts = [_DRAW.choice([word[:4].title(), word[-3:]]) for word in _DRAW.choices(words, k=length)]
    return "".join(part + _DRAW.choice([" ", "", "", ""]) for part in parts)[:length]


def _scripts(length: int) -> str:
    words = _DRAW.choices(re.findall(r"[a-z]+", sentences()), k=length // 6)
    return " ".join(_DRAW.choice([word, word, "важно", "没有人", word + "ность"]) for word in words)


BROKEN: dict[str, tuple[str, Callable[[int], str]]] = {
    "a phrase again and again": ("word_repetition", lambda n: ("I am a man. " * n)[:n]),
    "a word again and again": ("vocabulary", lambda n: ("never " * n)[:n]),
    "a loop at the end": (
        "word_repetition",
        lambda n: sentences()[: n // 2] + (" and then I left" * n)[: n // 2],
    ),
    "a loop that counts": (
        "compressed_size",
        lambda n: "".join(f" I owe you {k} and I pay you {k}." for k in range(n))[:n],
    ),
    "punctuation again and again": ("char_repetition", lambda n: ("!?" * n)[:n]),
    "markup debris": (
        "symbol_share",
        lambda n: " ".join(_DRAW.choices(["**", "##", "}}", ");", "|", "<div>", "the"], k=n))[:n],
    ),
    "spaces gone": ("letters_per_word", lambda n: sentences().replace(" ", "")[:n]),
    "letters apart": ("letters_per_word", lambda n: " ".join(sentences().replace(" ", ""))[:n]),
    "token fragments": ("letters_per_word", _fragments),
    "digits in words": (
        "odd_word_share",
        lambda n: " ".join(
            word + _DRAW.choice(["", "", "", "6", "Ds"]) for word in sentences()[:n].split()
        ),
    ),
    "scripts mixed": ("odd_word_share", _scripts),
    "noise": (
        "compressed_size",
        lambda n: "".join(chr(_DRAW.randrange(33, 127)) for _ in range(n)),
    ),
}


@pytest.mark.parametrize("characters", [350, 1500])
@pytest.mark.parametrize("kind", BROKEN)
def test_every_kind_of_damage_is_seen_by_its_figure(
    plain: TextLimits, kind: str, characters: int
) -> None:
    figure, make = BROKEN[kind]
    broken = text_figures(make(characters))
    assert beyond(broken, plain, figure)
    assert brokenness(broken, plain) > 1


def test_words_at_random_are_seen_in_a_long_text_alone(plain: TextLimits) -> None:
    """A short prose has few words twice either: there a model's surprisal has to see it."""
    assert beyond(text_figures(_salad(2400)), plain, "vocabulary")
    assert not beyond(text_figures(_salad(200)), plain, "vocabulary")


# ----------------------------------------------------------------------------- real broken text


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A layer and a coefficient of the sweep, with the generations it has."""

    layer: int
    coherence: float  # an independent judge's, 1 to 5, of all generations together
    texts: tuple[str, ...]


published = pytest.mark.skipif(
    not SWEEP.exists(), reason="needs the steered generations in ../shared, which are not shipped"
)


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    """The cells with text: a collapsed one has none, so that there is nothing to tell."""
    lines = {
        name: [json.loads(line) for line in (SWEEP / f"{name}_small.jsonl").open()]
        for name in ("sweep_qwen", "judge_deepseek")
    }
    judged = {(line["layer"], line["coef"]): line["coherence"] for line in lines["judge_deepseek"]}
    found = [
        Cell(
            layer=line["layer"],
            coherence=judged[line["layer"], line["coef"]],
            texts=tuple(row["gen"] for row in line["generations"] if row["gen"] is not None),
        )
        for line in lines["sweep_qwen"]
    ]
    return [cell for cell in found if cell.texts]


def auc(lower: Sequence[float], higher: Sequence[float]) -> float:
    """Share of pairs in the right order, ties half."""
    return float(np.mean([(b > a) + 0.5 * (b == a) for a in lower for b in higher]))


def held_against(cells: Sequence[Cell], limits: Callable[[Cell], TextLimits]) -> tuple[float, ...]:
    """AUC over cells by their mean brokenness, and the share of good generations dropped."""
    means, dropped = [], []
    for cell in cells:
        found = [text_figures(text) for text in cell.texts]
        means.append(float(np.mean([brokenness(each, limits(cell)) for each in found])))
        dropped.append([beyond(each, limits(cell), *FIGURES) for each in found])
    good = [index for index, cell in enumerate(cells) if cell.coherence >= 4]
    bad = [index for index, cell in enumerate(cells) if cell.coherence <= 2]
    assert (len(good), len(bad)) == (10, 7)
    return auc([means[index] for index in good], [means[index] for index in bad]), float(
        np.mean([value for index in good for value in dropped[index]])
    )


@published
def test_what_would_be_ended_for_a_loop_is_broken(cells: list[Cell], plain: TextLimits) -> None:
    """Words and signs stand for tokens, which the published texts do not have."""
    num_loops = 0
    for cell in cells:
        for text in cell.texts:
            parts = [hash(part) for part in re.findall(r"\w+|[^\w\s]", text)]
            if any(is_loop(parts[:at]) for at in range(8, len(parts) + 1, 8)):
                num_loops += 1
                assert cell.coherence <= 2
                assert beyond(text_figures(text), plain, *FIGURES)  # it would be dropped anyway
    assert num_loops > 20


@published
@pytest.mark.parametrize("quantile", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("texts", ["sentences", "documentation", "both"])
def test_broken_cells_are_told_from_good_ones(
    cells: list[Cell], texts: str, quantile: float
) -> None:
    """With limits from plain texts of the project, whichever they are."""
    pieces = chunks(sentences()) if texts != "documentation" else []
    pieces += chunks(documentation()) if texts != "sentences" else []
    limits = limits_of(pieces, quantile)
    area, dropped = held_against(cells, lambda cell: limits)
    assert area >= 0.97 and dropped <= 0.03


@published
@pytest.mark.parametrize("quantile", [0.9, 0.95, 0.99])
def test_and_with_limits_from_the_good_cells_of_the_other_layers(
    cells: list[Cell], quantile: float
) -> None:
    limits = {
        layer: limits_of(
            [
                text
                for cell in cells
                if cell.layer != layer and cell.coherence >= 4
                for text in cell.texts
            ],
            quantile,
        )
        for layer in {cell.layer for cell in cells}
    }
    area, dropped = held_against(cells, lambda cell: limits[cell.layer])
    assert area >= 0.97 and dropped <= 0.03
