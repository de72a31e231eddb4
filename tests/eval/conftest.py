"""A forced-choice suite small enough to read, as data."""

from __future__ import annotations

from typing import Any

import pytest

from eval.suite import ForcedChoiceSuite


@pytest.fixture
def suite_data() -> dict[str, Any]:
    """What a suite's file holds; a test may change its copy."""
    return {
        "name": "small",
        "description": "Vignettes of unequal length.",
        "options": {
            "care": "someone is harmed",
            "fairness": "someone is treated unequally",
            "loyalty": "a group is betrayed",
            "authority": "an order is disobeyed",
            "sanctity": "something pure is defiled",
            "liberty": "someone is coerced",
            "norms": "a custom is broken",
        },
        "question": "Which foundation is at stake?",
        "schema_head": 'Answer as {"foundation": "<index>"}, the index being one of\n',
        "schema_line": "{index}: {option}",
        "schema_tail": "\nand nothing else.",
        "nudge": "Now answer.",
        "think_open": "<think>\n",
        "think_close": "\n</think>\n\n",
        "prefill": '{"foundation": "',
        "items": [
            {"id": "kick", "text": "A boy kicks a dog.", "label": "care"},
            {
                "id": "queue",
                "text": "A man with money walks past a queue of 30 people and is served at once, "
                "while the guard looks the other way.",
                "label": "fairness",
            },
            {"id": "flag", "text": "She sells the team's plan to its rival.", "label": "loyalty"},
            {
                "id": "order",
                "text": "A nurse is told to leave a patient alone, and stays.",
                "conflict": True,
            },
            {"id": "soup", "text": "He eats soup with a fork at a wedding.", "label": "norms"},
        ],
    }


@pytest.fixture
def suite(suite_data: dict[str, Any]) -> ForcedChoiceSuite:
    return ForcedChoiceSuite.model_validate(suite_data)
