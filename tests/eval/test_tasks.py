from __future__ import annotations

import pytest
import torch

from eval.chat import chat_ids
from eval.suite import TaskItem, TaskSuite
from eval.tasks import contains_words, solve_tasks
from tests.conftest import TinyModel


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("It is 42.", "42", True),
        ("It is 142.", "42", False),
        ("It is 425.", "42", False),
        ("42", "42", True),
        ("GREEN!", "green", True),
        ("a greenish tint", "green", False),
        ("the blue  sky", "blue sky", False),
        ("Oh, the blue sky.", "blue sky", True),
        ("", "x", False),
        ("abc", "a.c", False),
        ("Is it a.c?", "a.c", True),
        ("it costs $5", "$5", True),
    ],
)
def test_contains_words(reply: str, answer: str, right: bool) -> None:
    assert contains_words(reply, answer) is right


@torch.no_grad()
def _greedy_text(tiny: TinyModel, prompt: list[int], num_tokens: int) -> str:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(tiny.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tiny.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_tasks_are_answered_greedily_in_order_and_judged(tiny: TinyModel) -> None:
    """A model that can say nothing but sevens is right where four of them are asked for."""
    hook = tiny.model.get_output_embeddings().register_forward_hook(_say_sevens(tiny))
    try:
        questions = ["What is 4 plus 3?", "Say it.", "What is the number of days in a week?"]
        suite = TaskSuite(
            name="tasks",
            items=tuple(
                TaskItem(id=f"t{index}", kind="sum", prompt=question, answer=answer)
                for index, (question, answer) in enumerate(
                    zip(questions, ["7777", "777", "7777"], strict=True)
                )
            ),
        )
        rows = solve_tasks(tiny.model, tiny.tokenizer, suite, max_new_tokens=4, batch_size=2)
    finally:
        hook.remove()
    assert [row.id for row in rows] == ["t0", "t1", "t2"]
    assert [row.reply for row in rows] == ["7777"] * 3
    assert [row.right for row in rows] == [True, False, True]


def test_the_system_prompt_reaches_the_reply(tiny: TinyModel) -> None:
    suite = TaskSuite(
        name="tasks", items=(TaskItem(id="t0", kind="sum", prompt="2 + 2?", answer="4"),)
    )
    replies = []
    for system in (None, "You care for people.", "Obey the law."):
        (row,) = solve_tasks(tiny.model, tiny.tokenizer, suite, system, max_new_tokens=5)
        assert row.reply == _greedy_text(tiny, chat_ids(tiny.tokenizer, "2 + 2?", system), 5)
        replies.append(row.reply)
    assert len(set(replies)) > 1


def _say_sevens(tiny: TinyModel):
    seven = tiny.tokenizer.convert_tokens_to_ids("7")
    bias = torch.zeros(len(tiny.tokenizer))
    bias[seven] = 1000.0
    return lambda module, inputs, logits: logits + bias
