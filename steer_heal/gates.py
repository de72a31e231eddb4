"""The criteria of the filter, in the order in which they are asked, and the dose curve they give.

A completion fails a criterion or passes it by its scores and its text alone: whatever passes all of
them may be kept. What each means is said in `filter.py`; its limits are made in `calibrate.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from eval.coherence import is_loop
from steer_heal.artifacts import Completion, DosePoint, Limits, TextLimits
from steer_heal.brokenness import beyond
from steer_heal.config import FilterConfig
from steer_heal.overlap import PersonaWords
from steer_heal.scoring import Scores
from steer_heal.trait import Trait

Gate = Callable[[Completion, Scores], bool]

_REFUSAL = re.compile(  # the boilerplate that opens a refusal, not every "I will not"
    r"\s*((i('m| am) (so |very )?)?sorry\b(?! (to hear|about|for|you|that you)\b)"  # not sympathy
    r"|as an ai\b|i (can't|cannot) (help|assist)|i must decline)",
    re.IGNORECASE,
)
_TEXT_FIGURES = {  # criterion -> the figures it reads
    "repetition": ("word_repetition", "char_repetition"),
    "vocabulary": ("vocabulary",),
    "compressibility": ("compressed_size",),
    "debris": ("letters_per_word", "symbol_share", "odd_word_share"),
}
_ADVICE = {  # criterion -> what to try where most fail it
    "enactment": "steer harder ({doses}), or take personas that differ more",
    "narration": "word the personas as someone who acts, not as someone with a quality",
    "duplicate": "sample more (generate.num_drafts), or a higher filter.max_similarity",
}
_GENTLER = "steer more gently ({doses}), or loosen filter.quantile"


def failed_gates(
    drafts: Sequence[Completion],
    scores: Sequence[Scores],
    limits: Limits,
    trait: Trait,
    config: FilterConfig,
) -> list[str | None]:
    """The first criterion that each completion fails; None: it passes them all."""
    gates = _gates(limits, trait, config)
    return [
        next((name for name, fails in gates.items() if fails(draft, score)), None)
        for draft, score in zip(drafts, scores, strict=True)
    ]


def dose_curve(
    drafts: Sequence[Completion], scores: Sequence[Scores], reasons: Sequence[str | None]
) -> tuple[DosePoint, ...]:
    """A point a dose, the lowest first."""
    points = []
    for dose in sorted({draft.dose for draft in drafts}):
        rows = [row for row, draft in enumerate(drafts) if draft.dose == dose]
        measured = (drafts[row].kl_p95_nats for row in rows)
        points.append(
            DosePoint(
                dose=dose,
                num_drafts=len(rows),
                pass_rate=sum(reasons[row] is None for row in rows) / len(rows),
                kl_p95_nats=float(np.median([kl for kl in measured if kl is not None])),
                enactment_nats=float(np.mean([scores[row].enactment_nats for row in rows])),
                commonest_drop=commonest([reasons[row] for row in rows]),
            )
        )
    return tuple(points)


def commonest(reasons: Sequence[str | None]) -> str | None:
    """The most frequent reason to drop; None where there is none."""
    found = Counter(reason for reason in reasons if reason is not None).most_common(1)
    return found[0][0] if found else None


def advice(reason: str | None, doses: str = "generate.doses") -> str:
    """What to try where most were dropped for it.

    Args:
        doses: the setting that says how hard to steer.
    """
    return _ADVICE.get(reason or "", _GENTLER).format(doses=doses)


def _gates(limits: Limits, trait: Trait, config: FilterConfig) -> dict[str, Gate]:
    """Name -> whether a completion fails, in the order in which they are asked."""
    narration = [re.compile(pattern, re.IGNORECASE) for pattern in trait.narration]
    persona = PersonaWords(trait)
    return {
        "loop": lambda draft, score: not draft.finished and is_loop(draft.token_ids),
        "unfinished": lambda draft, score: not draft.finished and limits.base_finishes,
        "length": lambda draft, score: (
            not limits.words_low <= score.figures.words <= limits.words_high
        ),
        "tail": lambda draft, score: score.surprisal.tail_nll_nats > limits.tail_nll_nats,
        "ragged": lambda draft, score: score.surprisal.rmse_nll_nats > limits.rmse_nll_nats,
        **{name: _text_gate(limits.text, *figures) for name, figures in _TEXT_FIGURES.items()},
        "narration": lambda draft, score: (
            any(pattern.search(draft.text) for pattern in narration)
            or persona.share(draft.text) > limits.persona_share
        ),
        "refusal": lambda draft, score: _REFUSAL.match(draft.text) is not None,
        "enactment": lambda draft, score: score.enactment_nats <= config.min_enactment_nats,
    }


def _text_gate(limits: TextLimits, *names: str) -> Gate:
    return lambda draft, score: beyond(score.figures, limits, *names)
