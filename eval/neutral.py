"""Neutral text: how well a model still predicts what no intervention is meant to touch.

    ratio = exp( sum_i (nll_i - base nll_i) / sum_i tokens_i )

over fixed dialogues i: nll_i is the surprisal of the reply's tokens given the user turn, summed,
nats. The ratio is that of the two perplexities: 1 nothing lost, 2 every token costs the model
0.69 nats more than it costs the base. No text of its own is involved: unlike the perplexity of what
a model says, it cannot be kept low by saying little or by saying the same again.
"""

from __future__ import annotations

from typing import Any

from eval.chat import chat_ids, text_ids
from eval.logits import token_logprobs
from eval.rows import NeutralRow
from eval.suite import NeutralSuite


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
