"""What a model answered, a row an item, so that any figure can be computed again without the model.

Imports nothing heavy: figures and reports read rows and need no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from eval.items import Perspective, Sign, item_key


class ForcedChoiceRow(BaseModel):
    """What the model answered to one item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    label: str | None
    conflict: bool
    perspective: Perspective = "other"
    human: dict[str, float] | None = None  # share of people who chose each foundation
    scores: dict[str, float]  # foundation -> mean log-probability over the two frames, nats
    pmass: float  # full-vocabulary probability on the option indices, mean over the frames
    prefill_nll_nats: float  # a token of the prefill, mean over frames and thinks
    natural: int = 0  # answers that were read inside a think
    thinks: tuple[str, ...] = ()  # frame by frame, sample by sample; empty without any

    @property
    def key(self) -> str:
        """The item's id in its perspective, as two evaluations are paired."""
        return item_key(self.id, self.perspective)


@dataclass(frozen=True, kw_only=True)
class ForcedChoiceResult:
    """What the model answered to a suite."""

    rows: tuple[ForcedChoiceRow, ...]  # in the suite's order
    unscorable: tuple[str, ...]  # keys of items with a log-probability that is not finite


class YesNoRow(BaseModel):
    """What the model answered to one item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    label: Sign | None  # the sign with which a "yes" counts towards what the suite measures
    yes_nats: float  # log-probability of yes, 0 at most
    no_nats: float  # log-probability of no, 0 at most
    log_ratio_nats: float  # the first less the second
    mass: float  # probability of either, 0 to 1

    @property
    def key(self) -> str:
        """As two evaluations are paired."""
        return self.id


@dataclass(frozen=True, kw_only=True)
class YesNoResult:
    """What the model answered to a suite."""

    rows: tuple[YesNoRow, ...]  # in the suite's order
    unscorable: tuple[str, ...]  # ids of items with a log-probability that is not finite


class TaskRow(BaseModel):
    """What the model answered to one task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    kind: str
    reply: str
    right: bool


class NeutralRow(BaseModel):
    """What one fixed reply costs a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    tokens: int  # of the reply, without an end-of-turn token
    nll_nats: float | None  # surprisal summed over them; None: not finite
