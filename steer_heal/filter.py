"""The filter: keeps completions that are coherent and that act the trait instead of narrating it.

Criteria in order; a completion is dropped by the first that it fails, which is its reason:

    unfinished        ran into the length limit (where the base's own do not)
    length            shorter or longer than the base's own completions
    tail              surprisal of the last quarter above the base's own: drift
    ragged            root mean square of the surprisal above the base's own: broken tokens
    repetition        a stretch of it repeats word 3-grams or character 12-grams: a loop
    vocabulary        too few different words (a loop) or too many (words at random)
    compressibility   compresses better (a loop) or worse (noise) than the base's own
    debris            letters apart or words run together, symbols, fragments, scripts mixed
    narration         talks about the trait or the persona instead of acting it
    refusal           declines
    enactment         no likelier under the positive persona than under the negative one
    surplus           passed, but `num_kept` were enough

Surprisal is the untouched base's, limits are quantiles of its own unsteered completions, those of
the four criteria on the text alone with a margin (`brokenness.py`). Of those that pass, as many
prompts as possible are kept, and of each prompt the most enacting.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from loguru import logger

from eval.errors import UserError
from steer_heal.artifacts import (
    Completion,
    Completions,
    DosePoint,
    Limits,
    Screened,
    ScreenedCompletion,
    TextLimits,
)
from steer_heal.brokenness import beyond, brokenness
from steer_heal.config import FilterConfig
from steer_heal.model import Student
from steer_heal.scoring import Scores, score_completions
from steer_heal.trait import Trait

SURPLUS = "surplus"
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
_ADVICE = {
    "enactment": "steer harder (generate.doses), or take personas that differ more",
    "narration": "word the personas as someone who acts, not as someone with a quality",
}


def screen(
    student: Student,
    drafts: Completions,
    limits: Limits,
    trait: Trait,
    config: FilterConfig,
    seed: int,
) -> Screened:
    """Scores every draft, drops with a reason, keeps at most `config.num_kept`.

    Raises:
        UserError: fewer than `config.min_kept` are left; says which criterion did it.
    """
    scores = score_completions(
        student,
        trait,
        [draft.prompt for draft in drafts.rows],
        [draft.token_ids for draft in drafts.rows],
        config.batch_size,
    )
    gates = _gates(limits, trait, config)
    reasons = [_reason(gates, *pair) for pair in zip(drafts.rows, scores, strict=True)]
    curve = _dose_curve(drafts.rows, scores, reasons)
    _require_enough(reasons, curve, config)
    for row in _surplus(drafts.rows, scores, reasons, config, seed):
        reasons[row] = SURPLUS
    rows = tuple(
        ScreenedCompletion(**draft.model_dump(), **_fields(score, limits.text), dropped=reason)
        for draft, score, reason in zip(drafts.rows, scores, reasons, strict=True)
    )
    logger.info("kept {} of {} drafts; dropped: {}", *_summary(reasons))
    return Screened(rows=rows, curve=curve)


Gate = Callable[[Completion, Scores], bool]


def _gates(limits: Limits, trait: Trait, config: FilterConfig) -> dict[str, Gate]:
    """Name -> whether a completion fails, in the order in which they are asked."""
    narration = [re.compile(pattern, re.IGNORECASE) for pattern in trait.narration]
    return {
        "unfinished": lambda draft, score: not draft.finished and limits.base_finishes,
        "length": lambda draft, score: (
            not limits.words_low <= score.figures.words <= limits.words_high
        ),
        "tail": lambda draft, score: score.surprisal.tail_nll_nats > limits.tail_nll_nats,
        "ragged": lambda draft, score: score.surprisal.rmse_nll_nats > limits.rmse_nll_nats,
        **{name: _text_gate(limits.text, *figures) for name, figures in _TEXT_FIGURES.items()},
        "narration": lambda draft, score: any(p.search(draft.text) for p in narration),
        "refusal": lambda draft, score: _REFUSAL.match(draft.text) is not None,
        "enactment": lambda draft, score: score.enactment_nats <= config.min_enactment_nats,
    }


def _text_gate(limits: TextLimits, *names: str) -> Gate:
    return lambda draft, score: beyond(score.figures, limits, *names)


def _reason(gates: dict[str, Gate], draft: Completion, score: Scores) -> str | None:
    return next((name for name, fails in gates.items() if fails(draft, score)), None)


def _dose_curve(
    drafts: Sequence[Completion], scores: Sequence[Scores], reasons: Sequence[str | None]
) -> tuple[DosePoint, ...]:
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
            )
        )
    return tuple(points)


def _require_enough(
    reasons: Sequence[str | None], curve: Sequence[DosePoint], config: FilterConfig
) -> None:
    passed, total, dropped = _summary(reasons)
    if passed >= config.min_kept:
        return
    left = f"the filter left {passed} of {total} completions, {config.min_kept} are needed"
    if passed == total:
        raise UserError(f"{left} (filter.min_kept). Try: more of them (generate.num_drafts)")
    worst = Counter(reason for reason in reasons if reason is not None).most_common(1)[0][0]
    advice = _ADVICE.get(worst, "steer more gently (generate.doses), or loosen filter.quantile")
    rates = ", ".join(f"dose {point.dose:g}: {point.pass_rate:.0%}" for point in curve)
    raise UserError(
        f"{left} (filter.min_kept); most were dropped by {worst!r} ({dropped}); "
        f"pass rates: {rates}. Try: {advice}"
    )


def _surplus(
    drafts: Sequence[Completion],
    scores: Sequence[Scores],
    reasons: Sequence[str | None],
    config: FilterConfig,
    seed: int,
) -> list[int]:
    """Rows that passed but are not needed: prompts take turns, each best first."""
    by_prompt: dict[int, list[int]] = defaultdict(list)
    for row, reason in enumerate(reasons):
        if reason is None:
            by_prompt[drafts[row].prompt_index].append(row)
    rng = random.Random(seed)
    queues = list(by_prompt.values())
    rng.shuffle(queues)
    for queue in queues:
        if config.rank_by_enactment:
            queue.sort(key=lambda row: (-scores[row].enactment_nats, row))
        else:
            rng.shuffle(queue)
    longest = max(len(queue) for queue in queues)
    order = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return order[config.num_kept :]


def _summary(reasons: Sequence[str | None]) -> tuple[int, int, str]:
    counts = Counter(reason for reason in reasons if reason is not None)
    listed = ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"
    return sum(reason is None for reason in reasons), len(reasons), listed


def _fields(score: Scores, limits: TextLimits) -> dict[str, object]:
    return {
        "surprisal": score.surprisal,
        "figures": score.figures,
        "brokenness": brokenness(score.figures, limits),
        "enactment_nats": score.enactment_nats,
    }
