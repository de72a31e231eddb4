"""What the doctor's checks look at, one model on its own, and how they say what they found.

Differences of logits are given as a share of the logits' own standard deviation, so that they can
be told from rounding whatever the model:

    gap = max |logits - others| / std(logits)        up to 0.001 in fp32, 0.5 in 16 bits

Padding alone, measured on random Qwen3, Qwen3.5 and Gemma 3 of 12 and 36 layers of width 512: up to
2e-5 in fp32 and 0.16 in bf16; with the padding read as text 5.4 to 7.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from eval.batching import left_pad
from eval.chat import text_ids
from eval.errors import UserError
from steer_heal.config import RunConfig
from steer_heal.hooks import record_last
from steer_heal.model import Student
from steer_heal.reach import Reach, adapter_reach
from steer_heal.trait import Trait

TEXTS = (
    "Hi.",
    "What is 12 plus 30, and what colour is grass when it has not rained for a month?",
    "The nurse told the guard that the order was unfair.",
)
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.5


class Finding(BaseModel):
    """What one check came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    status: Literal["ok", "warn", "fail"]
    measured: str
    advice: str = ""  # what to do; nothing where it is ok

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.check}: {self.measured}{advice}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on its own, and what a run would do with it."""

    student: Student
    trait: Trait
    config: RunConfig

    @property
    def tokenizer(self) -> Any:
        return self.student.tokenizer

    @property
    def model(self) -> Any:
        return self.student.loaded.model

    @cached_property
    def rows(self) -> list[list[int]]:
        """Token ids that need no template: [rows][tokens]."""
        return [text_ids(self.tokenizer, text) for text in TEXTS]

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The rows padded on the left: [rows, tokens]."""
        return left_pad(self.rows, self.tokenizer.pad_token_id, self.model.device)

    @cached_property
    def plain(self) -> torch.Tensor:
        """Logits of the rows, nothing acting: [rows, tokens, vocab]."""
        return self.logits(self.inputs)

    @cached_property
    def reach(self) -> Reach:
        return adapter_reach(self.student, self.config.heal.layers)

    @property
    def tolerance(self) -> float:
        return _TOLERANCE.get(self.model.dtype, _TOLERANCE_16_BITS)

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """fp32: [rows, tokens, vocab]."""
        with torch.no_grad():
            return self.model(**inputs, use_cache=False).logits.float()

    def last_states(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """What these layers give at each row's last token: [rows, hidden] each.

        Raises:
            UserError: one of them does not run, or gives something else.
        """
        layers = [self.student.loaded.layers[index] for index in indices]
        with torch.no_grad(), record_last(layers) as states:
            self.model(**self.inputs, use_cache=False)
        if idle := [index for index, state in zip(indices, states, strict=True) if not len(state)]:
            raise UserError(
                f"{type(self.model).__name__}: the decoder layers {idle} do not run where they "
                "were found, so nothing can be read off them or added to them; take another family"
            )
        return states

    def gap(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        """Largest difference as a share of the spread; a NaN is no difference that is small."""
        return float((found - expected).abs().max() / expected.std())

    def judged(self, check: str, what: str, gap: float, advice: str) -> Finding:
        """A finding on two ways to the same logits."""
        good = gap <= self.tolerance  # NaN is not
        return Finding(
            check=check,
            status="ok" if good else "fail",
            measured=f"{what} differ by {gap:.1e} of their spread (up to {self.tolerance:g})",
            advice="" if good else advice,
        )
