"""Every completion of a run with its scores, packed for the page: columns as JSON, gzip, base64.

A browser unpacks it when somebody asks for it. Figures are cut to three digits; texts are whole,
with what cannot be shown made visible.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Sequence

from steer_heal.artifacts import ScreenedCompletion
from steer_heal.saved import BegunRound
from steer_heal.wording import finite, visible

KEPT = "kept"


def packed_completions(rounds: Sequence[BegunRound]) -> str:
    """The completions of all rounds that were filtered, in the order of their sampling.

    Unpacked it is an object: `outcomes` and `prompts`, lists of texts, and `columns`, a list a
    field with a value a completion, where `outcome` and `prompt` are places in those lists.
    """
    rows = [
        (round.number, row)
        for round in rounds
        if round.screened is not None
        for row in round.screened.rows
    ]
    outcomes = [KEPT, *sorted({row.dropped for _, row in rows if row.dropped is not None})]
    prompts = list(dict.fromkeys(row.prompt for _, row in rows))
    table = {
        "outcomes": outcomes,
        "prompts": [visible(prompt) for prompt in prompts],
        "columns": {
            "round": [number for number, _ in rows],
            "outcome": _places([row.dropped or KEPT for _, row in rows], outcomes),
            "prompt": _places([row.prompt for _, row in rows], prompts),
            "text": [visible(row.text) for _, row in rows],
            **{name: [_short(of(row)) for _, row in rows] for name, of in _FIGURES.items()},
        },
    }
    return pack(json.dumps(finite(table), ensure_ascii=False, separators=(",", ":")))


def pack(text: str) -> str:
    """A text as gzip in base64; the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 6, mtime=0)).decode("ascii")


_FIGURES: dict[str, Callable[[ScreenedCompletion], float | None]] = {
    "dose": lambda row: row.dose,
    "enactment": lambda row: row.enactment_nats,
    "surprisal": lambda row: row.surprisal.mean_nll_nats,
    "tail": lambda row: row.surprisal.tail_nll_nats,
    "rmse": lambda row: row.surprisal.rmse_nll_nats,
    "kl": lambda row: row.kl_p95_nats,
    "words": lambda row: row.figures.words,
    "repetition": lambda row: row.figures.word_repetition,
    "brokenness": lambda row: row.brokenness,
    "persona": lambda row: row.persona_share,
}


def _places(values: Sequence[str], among: Sequence[str]) -> list[int]:
    place = {value: index for index, value in enumerate(among)}
    return [place[value] for value in values]


def _short(value: float | None) -> float | None:
    """Three significant digits."""
    return None if value is None else float(f"{value:.3g}")
