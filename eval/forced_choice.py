"""The seven-way forced choice over a vignette, in two frames.

Layout of a row (pieces are tokenised apart and joined as ids):

    prompt    user turn: scenario, blank line, question, newline, schema; assistant tag; think_open
    think     none: the answer is read straight away
    closing   think_close, the assistant's turn closed, the nudge as a user turn, the assistant tag
    prefill   the assistant's answer up to the opening quote of the option's index

Where the template writes the think into the assistant tag itself, think_open (an opened think) or
both (a shut one) are left out of prompt and closing; a think that the tag opens in the second turn
is shut with think_close before the prefill.

Read off: log-probabilities of the option indices ("0".."6") at the last position. Two frames, the
options in order and reversed; the score of an option is the mean of its two log-probabilities; `p`
is the softmax of the scores.

What the two frames cancel: with a content-free preference of b[d] nats for digit d of n, option i
gains (b[i] + b[n-1-i]) / 2. An option and its mirror gain the same, so whatever falls or rises
steadily with the digit is gone. A preference for the ends over the middle is not: it stays in the
scores, the same for every item, and drops out of a paired difference of scores.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from eval.batching import Batch, batches
from eval.chat import chat_text, next_turn_text, text_ids
from eval.errors import EvalError
from eval.suite import ForcedChoiceSuite, SuiteError

Order = Literal["forward", "reversed"]
ORDERS: tuple[Order, ...] = ("forward", "reversed")


class ForcedChoicePieces(BaseModel):
    """Token ids of one row, before they are joined."""

    model_config = ConfigDict(frozen=True)

    prompt_ids: tuple[int, ...]  # with the think opened, or shut where the template shuts it
    closing_ids: tuple[int, ...]
    prefill_ids: tuple[int, ...]

    @property
    def input_ids(self) -> list[int]:
        """The row with an empty think: [tokens]."""
        return [*self.prompt_ids, *self.closing_ids, *self.prefill_ids]


class ForcedChoiceRow(BaseModel):
    """What the model answered to one item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    label: str | None
    conflict: bool
    scores: dict[str, float]  # foundation -> mean log-probability over the two frames, nats
    pmass: float  # full-vocabulary probability on the option indices, mean over the frames


def option_order(suite: ForcedChoiceSuite, order: Order) -> list[str]:
    """Foundations by the index they are shown at."""
    names = list(suite.options)
    return names if order == "forward" else names[::-1]


def forced_choice_pieces(
    tokenizer: Any, suite: ForcedChoiceSuite, text: str, order: Order, system: str | None = None
) -> ForcedChoicePieces:
    """Token ids of the pieces of one vignette in one frame.

    Args:
        text: the scenario.
        system: a system prompt; at the head of the user turn where the template has no such role.
    """
    lines = [
        suite.schema_line.format(index=index, option=suite.options[name])
        for index, name in enumerate(option_order(suite, order))
    ]
    schema = suite.schema_head + "\n".join(lines) + suite.schema_tail
    prompt = chat_text(tokenizer, f"{text}\n\n{suite.question}\n{schema}", system)
    closing = next_turn_text(tokenizer, suite.nudge)
    opened = prompt.rstrip().endswith(suite.think_open.strip())  # DeepSeek-R1's assistant tag
    shut = prompt.rstrip().endswith(suite.think_close.strip())  # Qwen3's, asked not to think
    if opened:
        closing += suite.think_close  # the second turn's tag opens one too
    if not shut:
        closing = suite.think_close + closing
    if not shut and not opened:
        prompt += suite.think_open
    return ForcedChoicePieces(
        prompt_ids=tuple(text_ids(tokenizer, prompt)),
        closing_ids=tuple(text_ids(tokenizer, closing)),
        prefill_ids=tuple(text_ids(tokenizer, suite.prefill)),
    )


def forced_choice(
    model: Any,
    tokenizer: Any,
    suite: ForcedChoiceSuite,
    system: str | None = None,
    batch_size: int = 32,
    label: str = "forced choice",
) -> list[ForcedChoiceRow]:
    """Asks every item in both frames; one row an item, in the suite's order.

    Args:
        model: a causal LM in eval mode; hooks and adapters that are active stay so.
        system: a system prompt for every item, or None.
    Raises:
        SuiteError: the tokenizer has no single distinct token for every index.
        EvalError: an item's log-probabilities are not finite.
    """
    digits = _digit_ids(tokenizer, suite)
    rows = [
        forced_choice_pieces(tokenizer, suite, item.text, order, system).input_ids
        for item in suite.items
        for order in ORDERS
    ]
    answers = torch.empty(len(rows), len(digits), dtype=torch.float64)  # log-probabilities, nats
    for batch in batches(rows, batch_size, tokenizer.pad_token_id, model.device, label):
        answers[batch.rows] = _answer_logprobs(model, batch, digits)
    if not answers.isfinite().all():
        broken = suite.items[int((~answers.isfinite()).any(1).nonzero()[0]) // len(ORDERS)].id
        raise EvalError(f"item {broken!r} of suite {suite.name!r}: log-probabilities not finite")
    return [
        _row(suite, index, answers[2 * index], answers[2 * index + 1])
        for index in range(len(suite.items))
    ]


@torch.inference_mode()
def _answer_logprobs(model: Any, batch: Batch, digits: list[int]) -> torch.Tensor:
    """Log-probabilities of the digits at the last position: [batch, options]."""
    logits = model(**batch.inputs, logits_to_keep=1, use_cache=False).logits  # [batch, 1, vocab]
    return logits[:, -1].float().log_softmax(-1)[:, digits].double().cpu()


def _row(
    suite: ForcedChoiceSuite, index: int, forward: torch.Tensor, reverse: torch.Tensor
) -> ForcedChoiceRow:
    item = suite.items[index]
    scores = (forward + reverse.flip(0)) / 2  # [options], both by the suite's order
    return ForcedChoiceRow(
        id=item.id,
        label=item.label,
        conflict=item.conflict,
        scores=dict(zip(suite.foundations, scores.tolist(), strict=True)),
        pmass=float((forward.exp().sum() + reverse.exp().sum()) / 2),
    )


def _digit_ids(tokenizer: Any, suite: ForcedChoiceSuite) -> list[int]:
    pieces = [text_ids(tokenizer, str(index)) for index in range(len(suite.options))]
    single = all(len(piece) == 1 for piece in pieces)
    if not single or len({piece[0] for piece in pieces}) < len(pieces):
        raise SuiteError(
            f"the tokenizer does not spell the digits 0 to {len(pieces) - 1} as single distinct "
            "tokens: the forced choice cannot be read off this model"
        )
    return [piece[0] for piece in pieces]
