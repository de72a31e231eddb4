"""Mundane tasks with one right answer: the control that a trait must not touch."""

from __future__ import annotations

import re
from typing import Any

from eval.chat import chat_ids
from eval.rows import TaskRow
from eval.sampling import sample_replies
from eval.suite import TaskSuite


def solve_tasks(
    model: Any,
    tokenizer: Any,
    suite: TaskSuite,
    system: str | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    label: str = "mundane tasks",
) -> list[TaskRow]:
    """Answers every task greedily; one row an item, in the suite's order."""
    prompts = [chat_ids(tokenizer, item.prompt, system) for item in suite.items]
    replies = sample_replies(
        model,
        tokenizer,
        prompts,
        seed=0,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        batch_size=batch_size,
        label=label,
    )
    texts = [tokenizer.decode(reply.token_ids, skip_special_tokens=True) for reply in replies]
    return [
        TaskRow(id=item.id, kind=item.kind, reply=text, right=contains_words(text, item.answer))
        for item, text in zip(suite.items, texts, strict=True)
    ]


def contains_words(reply: str, answer: str) -> bool:
    """Whether the reply contains the answer as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE) is not None
