"""Neutral text: how well a model still predicts what no intervention is meant to touch.

    ratio = exp( sum_i (nll_i - base nll_i) / sum_i tokens_i )

over fixed dialogues i: nll_i is the surprisal of the reply's tokens given the user turn, summed,
nats. The ratio is that of the two perplexities: 1 nothing lost, 2 every token costs the model
0.69 nats more than it costs the base. No text of its own is involved: unlike the perplexity of what
a model says, it cannot be kept low by saying little or by saying the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from eval.chat import chat_ids, text_ids
from eval.coherence import token_logprobs
from eval.statistics import Interval, bootstrap_weights, require_same_items
from eval.suite import NeutralSuite


class NeutralRow(BaseModel):
    """What one fixed reply costs a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    tokens: int  # of the reply, without an end-of-turn token
    nll_nats: float | None  # surprisal summed over them; None: not finite


def neutral_rows(
    model: Any,
    tokenizer: Any,
    suite: NeutralSuite,
    system: str | None = None,
    batch_size: int = 64,
    label: str | None = None,
) -> list[NeutralRow]:
    """Surprisal of every fixed reply after its user turn; one row an item, in the suite's order."""
    prompts = [chat_ids(tokenizer, item.prompt, system) for item in suite.items]
    replies = [text_ids(tokenizer, item.reply) for item in suite.items]
    found = token_logprobs(model, tokenizer.pad_token_id, prompts, replies, batch_size, label)
    return [
        NeutralRow(
            id=item.id,
            tokens=len(logprobs),
            nll_nats=-float(logprobs.double().sum()) if logprobs.isfinite().all() else None,
        )
        for item, logprobs in zip(suite.items, found, strict=True)
    ]


def perplexity_ratio(
    rows: Sequence[NeutralRow], base_rows: Sequence[NeutralRow], seed: int = 0
) -> Interval | None:
    """Perplexity of the text over that under the base; above 1: the model predicts it worse.

    Paired: the interval draws items, the same ones for both. Items that one of them could not score
    are left out of both; None where no item is left.
    """
    require_same_items([row.id for row in rows], [row.id for row in base_rows])
    scored = [
        (after.id, after.nll_nats - before.nll_nats, after.tokens)
        for after, before in zip(rows, base_rows, strict=True)
        if after.nll_nats is not None and before.nll_nats is not None
    ]
    if not scored:
        return None
    more = np.array([nats for _, nats, _ in scored])
    tokens = np.array([count for _, _, count in scored], dtype=float)
    weights = bootstrap_weights([item_id for item_id, _, _ in scored], seed)  # [draws, items]
    low, high = np.quantile(np.exp((weights @ more) / (weights @ tokens)), [0.025, 0.975])
    exact = float(np.exp(more.sum() / tokens.sum()))
    return Interval(estimate=exact, low=float(low), high=float(high))
