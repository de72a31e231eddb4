"""What the two kinds of suite have in common: how they are asked, and what comes of it.

An evaluation in a folder (`eval/probe.py`) and the commands go by this table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.forced_choice import forced_choice
from eval.rows import ForcedChoiceResult, ForcedChoiceRow, YesNoResult, YesNoRow
from eval.suite import ProbeSuite, YesNoSuite
from eval.summary import Summary, format_difference, format_summary, summarise
from eval.think import Thinking
from eval.yes_no import yes_no
from eval.yes_no_figures import (
    YesNoSummary,
    format_yes_no_difference,
    format_yes_no_summary,
    summarise_yes_no,
)

Row = ForcedChoiceRow | YesNoRow  # each knows its item's key
Result = ForcedChoiceResult | YesNoResult
Figures = Summary | YesNoSummary
Intended = Mapping[str, int]  # foundation -> 1 (more is meant) or -1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of suite."""

    name: str
    can_think: bool  # whether the model may think before it answers
    row: type[Row]
    result: type[Result]
    # model, tokenizer, suite, system prompt, rows a forward pass, how to think
    ask: Callable[[Any, Any, Any, str | None, int, Thinking], Result]
    summarise: Callable[[Any], Figures]
    summary_text: Callable[[Any], str]
    # rows after, rows before, what is meant to move
    difference_text: Callable[[Sequence[Any], Sequence[Any], Intended], str]


def kind_of(suite: ProbeSuite) -> Kind:
    """The kind that a suite is of."""
    return YES_NO if isinstance(suite, YesNoSuite) else FORCED_CHOICE


FORCED_CHOICE = Kind(
    name="forced choice",
    can_think=True,
    row=ForcedChoiceRow,
    result=ForcedChoiceResult,
    ask=lambda model, tokenizer, suite, system, batch_size, thinking: forced_choice(
        model, tokenizer, suite, system, batch_size, None, thinking
    ),
    summarise=summarise,
    summary_text=format_summary,
    difference_text=format_difference,
)
YES_NO = Kind(
    name="yes or no",
    can_think=False,
    row=YesNoRow,
    result=YesNoResult,
    ask=lambda model, tokenizer, suite, system, batch_size, _: yes_no(
        model, tokenizer, suite, system, batch_size, None
    ),
    summarise=summarise_yes_no,
    summary_text=format_yes_no_summary,
    difference_text=lambda after, before, _: format_yes_no_difference(after, before),
)
