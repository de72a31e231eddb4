"""Yes or no: how much likelier a model is to begin its reply with the one than with the other.

Layout of a row (pieces are tokenised apart and joined as ids):

    prompt    user turn: the suite's template around the item's text; assistant tag
    prefill   the assistant's reply up to the answer; none where it is empty

Read off at the last position, from the full-vocabulary softmax in fp32:

    yes_nats = log sum_s p(s) over the spellings s of yes;  no_nats the same of no
    log_ratio_nats = yes_nats - no_nats        above 0: rather yes
    mass = exp(yes_nats) + exp(no_nats)        near 1: the reply does begin with an answer

A spelling is the token that it becomes where it stands, right after assistant tag and prefill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.chat import chat_ids, chat_text, text_ids
from eval.errors import UserError
from eval.items import SuiteError, YesNoItem
from eval.logits import Ends, end_logits
from eval.rows import YesNoResult, YesNoRow
from eval.suite import YesNoSuite


def yes_no(
    model: Any,
    tokenizer: Any,
    suite: YesNoSuite,
    system: str | None = None,
    batch_size: int = 32,
    label: str | None = "yes or no",
) -> YesNoResult:
    """Asks every item; one row an item.

    Args:
        model: a causal LM in eval mode; hooks and adapters that are active stay so.
        system: a system prompt for every item, or None.
        label: what the progress bar says; None draws none.
    Raises:
        SuiteError: the tokenizer has no single token for a spelling, or one for both answers.
        UserError: not one item can be scored, since no log-probability is finite.
    """
    answers = _answer_ids(tokenizer, suite)
    prefill = text_ids(tokenizer, suite.prefill)
    prompts = [
        [*chat_ids(tokenizer, suite.template.format(text=item.text), system), *prefill]
        for item in suite.items
    ]
    nats = _answers(model, tokenizer, prompts, answers, batch_size, label)
    rows = [_row(item, *pair) for item, pair in zip(suite.items, nats, strict=True)]
    scored = tuple(row for row in rows if row is not None)
    if not scored:
        raise UserError(
            f"suite {suite.name!r}: the log-probabilities of all {len(rows)} items are not finite; "
            "the model overflows in its number format or its weights are damaged"
        )
    pairs = zip(suite.items, rows, strict=True)
    return YesNoResult(rows=scored, unscorable=tuple(item.key for item, row in pairs if not row))


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: tuple[list[int], list[int]],
    batch_size: int,
    label: str | None,
) -> list[tuple[float, float]]:
    """Log-probabilities of yes and no after every prompt, nats: [prompts]."""
    found: dict[int, tuple[float, float]] = {}
    ends = Ends(rows=prompts, counts=[1] * len(prompts), lengths=[0] * len(prompts))
    for row, logits in end_logits(model, ends, batch_size, tokenizer.pad_token_id, label):
        logp = logits[0].float().log_softmax(-1)  # [vocab]
        yes, no = (float(logp[ids].double().logsumexp(-1)) for ids in answers)
        found[row] = (yes, no)
    return [found[row] for row in range(len(prompts))]


def _row(item: YesNoItem, yes: float, no: float) -> YesNoRow | None:
    """One item's row; None: it cannot be scored."""
    if not (math.isfinite(yes) and math.isfinite(no)):
        return None
    return YesNoRow(
        id=item.id,
        label=item.label,
        yes_nats=yes,
        no_nats=no,
        log_ratio_nats=yes - no,
        mass=math.exp(yes) + math.exp(no),
    )


def _answer_ids(tokenizer: Any, suite: YesNoSuite) -> tuple[list[int], list[int]]:
    """Token ids of the spellings of yes, and of those of no."""
    before = chat_text(tokenizer, suite.template) + suite.prefill
    spelled: dict[int, str] = {}  # id -> which answer, and how it is spelled
    answers: dict[str, list[int]] = {"yes": [], "no": []}
    for answer, spellings in (("yes", suite.yes), ("no", suite.no)):
        for spelling in spellings:
            token = _token_after(tokenizer, before, spelling)
            name = f"{answer} spelled {spelling!r}"
            if token is None:
                raise SuiteError(
                    f"suite {suite.name!r}: {name} is not one token of this tokenizer where it "
                    f"stands, after the assistant tag and the prefill {suite.prefill!r}; give "
                    "spellings in the suite's file that are"
                )
            if token in spelled:
                raise SuiteError(
                    f"suite {suite.name!r}: {name} is the same token as {spelled[token]}; give "
                    "each in one spelling that this tokenizer tells apart"
                )
            spelled[token] = name
            answers[answer].append(token)
    return answers["yes"], answers["no"]


def _token_after(tokenizer: Any, before: str, spelling: str) -> int | None:
    """The one known token that a spelling adds to a text; None where it is not one."""
    head, whole = text_ids(tokenizer, before), text_ids(tokenizer, before + spelling)
    if len(whole) != len(head) + 1 or whole[:-1] != head or whole[-1] == tokenizer.unk_token_id:
        return None
    return whole[-1]
