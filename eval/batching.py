"""Left-padded batches, sorted by length, with a progress bar and an ETA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.bars import progress_bar


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of token ids, padded on the left so that their ends are aligned."""

    rows: list[int]  # which rows of the caller's list
    inputs: dict[str, torch.Tensor]  # input_ids, attention_mask, position_ids: [batch, tokens]


def batches(
    rows: Sequence[Sequence[int]],
    batch_size: int,
    pad_id: int | None,
    device: Any,
    label: str | None = None,
) -> Iterator[Batch]:
    """Yields the rows longest first (a batch that does not fit fails at once, not at the end).

    Args:
        rows: token ids, [rows][tokens], each at least one token long.
        pad_id: what fills a row on the left, masked; None (Llama 3 has no padding token): id 0.
        label: what the progress bar says; None draws none.
    """
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
    with progress_bar(len(rows), label) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield Batch(rows=chosen, inputs=left_pad([rows[row] for row in chosen], pad_id, device))
            bar.update(len(chosen))


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int | None, device: Any
) -> dict[str, torch.Tensor]:
    """Token ids to model inputs: input_ids, attention_mask, position_ids, each [batch, tokens]."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id or 0, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # a row counts from its own first token
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
    }
