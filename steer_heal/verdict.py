"""The verdict on a run: did it work, in one sentence, and by how much.

Judged is the best round, or the last where none is coherent. Differences are of the share of
replies that act the trait, paired by held-out prompt, with a 95 % bootstrap interval over prompts.

    shown in replies     the interval of healed minus base lies above 0
    shown on vignettes   the interval of every intended foundation's shift lies on the wanted side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.statistics import Interval, mean_interval
from steer_heal.artifacts import ReplyRow
from steer_heal.saved import prompt_means
from steer_heal.summary import RoundFigures, Summary
from steer_heal.wording import percent

_WORKED = "It worked"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is said of a run at a glance."""

    round: RoundFigures  # the one that is judged
    over_base: Interval  # share of replies that act the trait, healed minus base
    over_prompt: Interval  # the same, healed minus base with the persona prompt
    in_replies: bool
    on_vignettes: bool | None  # None: the trait names no foundation
    opening: str  # the verdict in a few words
    sentence: str


def judge_run(summary: Summary) -> Verdict:
    """The verdict on a run of which at least one round is finished."""
    round = summary.best or summary.rounds[-1]
    controls, healed = summary.run.controls, round.saved.evaluation.healed
    over_base = _difference(healed.replies, controls.base.replies)
    in_replies = over_base.low > 0
    on_vignettes = _on_vignettes(summary, round)
    over_prompt = _difference(healed.replies, controls.prompted.replies)
    opening = _opening(round.is_coherent, over_base, in_replies, on_vignettes)
    if opening == _WORKED and over_prompt.high < 0:
        opening = f"{_WORKED}, but less than a prompt does"
    return Verdict(
        round=round,
        over_base=over_base,
        over_prompt=over_prompt,
        in_replies=in_replies,
        on_vignettes=on_vignettes,
        opening=opening,
        sentence=f"{opening}: after round {round.number}, with no prompt, the model acts the trait "
        f"in {percent(round.healed.enacted.estimate)} of its replies to new prompts, where the "
        f"untouched model does in {percent(summary.base.enacted.estimate)}, and in "
        f"{percent(summary.prompted.enacted.estimate)} when a prompt asks it to.",
    )


def _opening(
    is_coherent: bool, over_base: Interval, in_replies: bool, on_vignettes: bool | None
) -> str:
    if not in_replies and not on_vignettes:
        return "It went the wrong way" if over_base.high < 0 else "It did not work"
    if not is_coherent:
        return "The trait moved, but the text broke"
    if in_replies and on_vignettes is not False:
        return _WORKED
    return f"It worked in part, {'in replies' if in_replies else 'on vignettes'} alone"


def _on_vignettes(summary: Summary, round: RoundFigures) -> bool | None:
    """Whether every foundation that is meant to move is shown to have moved as wanted."""
    signs = summary.run.trait.intended
    if not signs:
        return None
    shifts = {name: round.healed.shifts[name] for name in signs}
    return all(
        shift.low > 0 if signs[name] > 0 else shift.high < 0 for name, shift in shifts.items()
    )


def _difference(after: Sequence[ReplyRow], before: Sequence[ReplyRow]) -> Interval:
    later, earlier = (prompt_means(rows, lambda reply: reply.enacted) for rows in (after, before))
    return mean_interval([a - b for a, b in zip(later, earlier, strict=True)])
