"""The seven-way forced choice over a vignette, in two frames.

Layout of a row (pieces are tokenised apart and joined as ids):

    prompt    user turn: scenario, blank line, question, newline, schema; assistant tag; think_open
    think     exactly k tokens of the model's own; none where k is 0
    closing   think_close, the assistant's turn closed, the nudge as a user turn, the assistant tag
    prefill   the assistant's answer up to the opening quote of the option's index

Where the template writes the think into the assistant tag itself, think_open (an opened think) or
both (a shut one) are left out of prompt and closing; a think that the tag opens in the second turn
is shut with think_close before the prefill. A think that has written the prefill itself is read
there (`natural`): the row ends after it.

Read off: log-probabilities of the option indices ("0".."6") at the last position. Two frames, the
options in order and reversed, each with its own think; several thinks of a frame are averaged as
probabilities; the score of an option is the mean of its two log-probabilities; `p` is the softmax
of the scores.

What the two frames cancel: with a content-free preference of b[d] nats for digit d of n, option i
gains (b[i] + b[n-1-i]) / 2. An option and its mirror gain the same, so whatever falls or rises
steadily with the digit is gone. A preference for the ends over the middle is not: it stays in the
scores, the same for every item, and drops out of a paired difference of scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from eval.chat import chat_text, next_turn_text, text_ids
from eval.errors import UserError
from eval.items import ForcedChoiceItem, SuiteError
from eval.logits import alike_ends, end_logits
from eval.processes import spread
from eval.rows import ForcedChoiceResult, ForcedChoiceRow
from eval.suite import ForcedChoiceSuite
from eval.think import Thinking, natural_answer, think

Order = Literal["forward", "reversed"]
ORDERS: tuple[Order, ...] = ("forward", "reversed")


class ForcedChoicePieces(BaseModel):
    """Token ids of one row, before they are joined."""

    model_config = ConfigDict(frozen=True)

    prompt_ids: tuple[int, ...]  # with the think opened, or shut where the template shuts it
    closing_ids: tuple[int, ...]
    prefill_ids: tuple[int, ...]

    def input_ids(self, think_ids: Sequence[int] = ()) -> list[int]:
        """The row around a think: [tokens]."""
        return [*self.prompt_ids, *think_ids, *self.closing_ids, *self.prefill_ids]


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """One row as it goes through the model."""

    ids: list[int]  # up to where the index stands
    num_prefill: int  # tokens at its end that spell the prefill
    natural: bool
    thought: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What one row came to."""

    logprobs: torch.Tensor  # of the indices, nats: [options]
    prefill_nll_nats: float


def option_order(suite: ForcedChoiceSuite, order: Order) -> list[str]:
    """Foundations by the index they are shown at."""
    names = list(suite.options)
    return names if order == "forward" else names[::-1]


def forced_choice_pieces(
    tokenizer: Any,
    suite: ForcedChoiceSuite,
    text: str,
    order: Order,
    system: str | None = None,
    thinking: bool = False,
) -> ForcedChoicePieces:
    """Token ids of the pieces of one vignette in one frame.

    Args:
        text: the scenario.
        system: a system prompt; at the head of the user turn where the template has no such role.
        thinking: the prompt ends in an opened think, also where the template would shut it.
    """
    lines = [
        suite.schema_line.format(index=index, option=suite.options[name])
        for index, name in enumerate(option_order(suite, order))
    ]
    schema = suite.schema_head + "\n".join(lines) + suite.schema_tail
    prompt = chat_text(tokenizer, f"{text}\n\n{suite.question}\n{schema}", system, thinking)
    closing = next_turn_text(tokenizer, suite.nudge)
    if _ends_in(closing, suite.think_open):  # DeepSeek-R1's assistant tag, in the second turn too
        closing += suite.think_close
    if thinking or not _ends_in(prompt, suite.think_close):  # Qwen3's tag shuts it, asked not to
        closing = suite.think_close + closing
        prompt += "" if _ends_in(prompt, suite.think_open) else suite.think_open
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
    label: str | None = "forced choice",
    thinking: Thinking | None = None,
) -> ForcedChoiceResult:
    """Asks every item in both frames; one row an item.

    Args:
        model: a causal LM in eval mode; hooks and adapters that are active stay so.
        system: a system prompt for every item, or None.
        label: what the progress bars say; None draws none.
        thinking: how it thinks before it answers; by default it does not.
    Raises:
        SuiteError: the tokenizer has no single distinct token for every index.
        UserError: not one item can be scored, since no log-probability is finite.
    """
    thinking = thinking or Thinking()
    digits = digit_ids(tokenizer, suite)
    pieces = [
        forced_choice_pieces(tokenizer, suite, item.text, order, system, thinking.tokens > 0)
        for item in suite.items
        for order in ORDERS
        for _ in range(thinking.samples)
    ]
    thoughts = think(
        model,
        tokenizer,
        [piece.prompt_ids for piece in pieces],
        suite.think_close.strip(),
        thinking,
        batch_size,
        label and f"{label}, thinking",
    )
    readings = [
        _reading(tokenizer, suite, *pair, thinking) for pair in zip(pieces, thoughts, strict=True)
    ]
    count = len(ORDERS) * thinking.samples
    answers = _answers(model, tokenizer, readings, digits, count, batch_size, label)
    trials = list(zip(readings, answers, strict=True))
    rows = {
        item.key: _row(tokenizer, suite, item, trials[count * index :][:count])
        for index, item in enumerate(suite.items)
    }
    scored = tuple(row for row in rows.values() if row is not None)
    if not scored:
        raise UserError(
            f"suite {suite.name!r}: the log-probabilities of all {len(rows)} items are not finite; "
            "the model overflows in its number format or its weights are damaged"
        )
    unscorable = tuple(key for key, row in rows.items() if row is None)
    return ForcedChoiceResult(rows=scored, unscorable=unscorable)


def _ends_in(text: str, marker: str) -> bool:
    return text.rstrip().endswith(marker.strip())


def _reading(
    tokenizer: Any,
    suite: ForcedChoiceSuite,
    pieces: ForcedChoicePieces,
    thought: tuple[int, ...],
    thinking: Thinking,
) -> _Reading:
    found = natural_answer(tokenizer, thought, suite.prefill) if thinking.natural else None
    if found is None:
        ids, num_prefill = pieces.input_ids(thought), len(pieces.prefill_ids)
    else:
        first, end = found
        ids, num_prefill = [*pieces.prompt_ids, *thought[:end]], end - first
    return _Reading(ids=ids, num_prefill=num_prefill, natural=found is not None, thought=thought)


def _answers(
    model: Any,
    tokenizer: Any,
    readings: Sequence[_Reading],
    digits: list[int],
    num_trials: int,
    batch_size: int,
    label: str | None,
) -> list[_Answer]:
    """Reads the indices at the end of every row, and the prefill before it.

    Args:
        num_trials: rows of one item, which stand together.
    """

    def read(rows: list[int]) -> list[_Answer]:
        some = [readings[row] for row in rows]
        counts = [reading.num_prefill + 1 for reading in some]
        ends = alike_ends([reading.ids for reading in some], counts, num_trials)
        answers: dict[int, _Answer] = {}
        for at, logits in end_logits(model, ends, batch_size, tokenizer.pad_token_id, label):
            logp = logits.float().log_softmax(-1)  # [prefill + 1, vocab]
            prefill = torch.tensor(some[at].ids[-some[at].num_prefill :], device=logp.device)
            said = logp[:-1].gather(-1, prefill[:, None])
            answers[at] = _Answer(
                logprobs=logp[-1, digits].double().cpu(), prefill_nll_nats=float(-said.mean())
            )
        return [answers[at] for at in range(len(some))]

    return spread(read, [row // num_trials for row in range(len(readings))])


def _row(
    tokenizer: Any,
    suite: ForcedChoiceSuite,
    item: ForcedChoiceItem,
    trials: Sequence[tuple[_Reading, _Answer]],
) -> ForcedChoiceRow | None:
    """One item's row from its trials, forward samples, then reversed; None: it cannot be scored."""
    logprobs = torch.stack([answer.logprobs for _, answer in trials])  # [trials, options]
    nll = float(np.mean([answer.prefill_nll_nats for _, answer in trials]))
    frames = logprobs.view(len(ORDERS), -1, logprobs.shape[-1])  # [frames, samples, options]
    averaged = frames.logsumexp(1) - math.log(frames.shape[1])  # [frames, options], nats
    scores = (averaged[0] + averaged[1].flip(0)) / 2  # [options], both by the suite's order
    if not (bool(logprobs.isfinite().all()) and math.isfinite(nll)):
        return None
    return ForcedChoiceRow(
        id=item.id,
        label=item.label,
        conflict=item.conflict,
        perspective=item.perspective,
        human=item.human,
        scores=dict(zip(suite.foundations, scores.tolist(), strict=True)),
        pmass=float(averaged.exp().sum(-1).mean()),
        prefill_nll_nats=nll,
        natural=sum(reading.natural for reading, _ in trials),
        thinks=tuple(tokenizer.decode(each.thought) for each, _ in trials if each.thought),
    )


def digit_ids(tokenizer: Any, suite: ForcedChoiceSuite) -> list[int]:
    """The token that each option's index is after the prefill: [options].

    What a digit is by itself does not matter: SentencePiece tokenizers (Mistral 7B, Phi-3) put a
    space in front of whatever they are given.

    Raises:
        SuiteError: the tokenizer has no single distinct token for every index there.
    """
    head = text_ids(tokenizer, suite.prefill)
    wholes = [text_ids(tokenizer, suite.prefill + str(n)) for n in range(len(suite.options))]
    single = all(len(whole) == len(head) + 1 and whole[:-1] == head for whole in wholes)
    if not single or len({whole[-1] for whole in wholes}) < len(wholes):
        raise SuiteError(
            f"the tokenizer does not spell the digits 0 to {len(wholes) - 1} as single distinct "
            "tokens: the forced choice cannot be read off this model"
        )
    return [whole[-1] for whole in wholes]
