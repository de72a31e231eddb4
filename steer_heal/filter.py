"""The filter: keeps completions that are coherent and that act the trait instead of narrating it.

Criteria in order; a completion is dropped by the first that it fails, which is its reason:

    loop              was ended, as its last 48 tokens said one thing four times or more
    unfinished        ran into the length limit (where the base's own do not)
    length            shorter or longer than the base's own completions
    tail              surprisal of the last quarter above the base's own: drift
    ragged            root mean square of the surprisal above the base's own: broken tokens
    repetition        a stretch of it repeats word 3-grams or character 12-grams: a loop
    vocabulary        too few different words (a loop) or too many (words at random)
    compressibility   compresses better (a loop) or worse (noise) than the base's own
    debris            letters apart or words run together, symbols, fragments, scripts mixed
    narration         talks about the trait instead of acting it: by the trait's regexes, or as more
                      of its word 4-grams are the persona's own than of the base's
    refusal           declines
    enactment         no likelier under the positive persona than under the negative one
    duplicate         passed, but nearly repeats one that is kept
    surplus           passed, but `num_kept` were enough

Surprisal is the untouched base's, limits are quantiles of its own unsteered completions, those of
the four criteria on the text alone with a margin (`brokenness.py`). Of those that pass, as many
prompts as possible are kept, and of each prompt the most enacting: prompts take turns, each with
its best. In that order a completion is set aside that is too much like one before it
(`overlap.py`), so that the kept set does not collapse onto a few phrasings. Of the embedded
model's base no two replies are more alike than 0.40 (three runs, 192 replies each); at the default
of 0.7 two replies of one length share more than four fifths of their word 3-grams.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from loguru import logger

from eval.errors import UserError
from steer_heal.artifacts import (
    Completion,
    Completions,
    DosePoint,
    Limits,
    Screened,
    ScreenedCompletion,
)
from steer_heal.brokenness import brokenness
from steer_heal.config import FilterConfig
from steer_heal.gates import advice, commonest, dose_curve, failed_gates
from steer_heal.model import Student
from steer_heal.overlap import PersonaWords, SaidBefore
from steer_heal.scoring import Scores, score_completions
from steer_heal.trait import Trait

DUPLICATE, SURPLUS = "duplicate", "surplus"


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
    reasons = failed_gates(drafts.rows, scores, limits, trait, config)
    curve = dose_curve(drafts.rows, scores, reasons)
    order = _ranked(drafts.rows, scores, reasons, config, seed)
    for row, reason in _set_aside(drafts.rows, order, config).items():
        reasons[row] = reason
    _require_enough(reasons, curve, config)
    persona = PersonaWords(trait)
    rows = tuple(
        ScreenedCompletion(
            **draft.model_dump(),
            surprisal=score.surprisal,
            figures=score.figures,
            brokenness=brokenness(score.figures, limits.text),
            persona_share=persona.share(draft.text),
            enactment_nats=score.enactment_nats,
            dropped=reason,
        )
        for draft, score, reason in zip(drafts.rows, scores, reasons, strict=True)
    )
    screened = Screened(rows=rows, curve=curve)
    logger.info(
        "kept {} of {} drafts, to {} of {} prompts; dropped: {}",
        *(len(screened.kept), len(rows), screened.num_kept_prompts, len(trait.prompts)),
        _dropped(reasons),
    )
    return screened


def _require_enough(
    reasons: Sequence[str | None], curve: Sequence[DosePoint], config: FilterConfig
) -> None:
    passed, total = sum(reason in (None, SURPLUS) for reason in reasons), len(reasons)
    if passed >= config.min_kept:
        return
    left = f"the filter left {passed} of {total} completions, {config.min_kept} are needed"
    if passed == total:
        raise UserError(f"{left} (filter.min_kept). Try: more of them (generate.num_drafts)")
    worst = commonest(reasons)
    rates = ", ".join(f"dose {point.dose:g}: {point.pass_rate:.0%}" for point in curve)
    raise UserError(
        f"{left} (filter.min_kept); most were dropped by {worst!r} ({_dropped(reasons)}); "
        f"pass rates: {rates}. Try: {advice(worst)}"
    )


def _ranked(
    drafts: Sequence[Completion],
    scores: Sequence[Scores],
    reasons: Sequence[str | None],
    config: FilterConfig,
    seed: int,
) -> list[int]:
    """Rows that passed, in the order of keeping: prompts take turns, each best first."""
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
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _set_aside(
    drafts: Sequence[Completion], order: Sequence[int], config: FilterConfig
) -> dict[int, str]:
    """Of rows that passed those that are not kept, and why not."""
    kept, aside, num_kept = SaidBefore(config.max_similarity), {}, 0
    for row in order:
        if num_kept == config.num_kept:
            aside[row] = SURPLUS
        elif kept.repeats(drafts[row].text):
            aside[row] = DUPLICATE
        else:
            kept.take(drafts[row].text)
            num_kept += 1
    return aside


def _dropped(reasons: Sequence[str | None]) -> str:
    counts = Counter(reason for reason in reasons if reason is not None)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"
