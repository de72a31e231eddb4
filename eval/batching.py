"""Padded batches, sorted by length, with a progress bar and an ETA; halved where memory ends.

A batch is what is held at once; a pass is what goes through the model at once. On a CPU a pass has
no more tokens than its caches hold the activations of, and what is read of a batch is read in
several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from loguru import logger

from eval.bars import progress_bar
from eval.errors import UserError

Result = TypeVar("Result")

# Of a pass, for each thread of a CPU. With 12,800 a token takes the embedded model 1.3 times as
# long, 6 layers of 512 1.2 times, 8 of 1,024 in bf16 1.1 times.
_PASS_TOKENS = 2048


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
    """Yields the rows, a pass at a time, longest first.

    Args:
        rows: token ids, [rows][tokens], each at least one token long.
        batch_size: at most so many of them.
        pad_id: what fills a row on the left, masked; None (Llama 3 has no padding token): id 0.
        label: what the progress bar says; None draws none.
    """
    order = longest_first(rows)
    with progress_bar(len(rows), label) as bar:
        for chosen in passes(order, [len(rows[row]) for row in order], batch_size, device):
            yield Batch(rows=chosen, inputs=left_pad([rows[row] for row in chosen], pad_id, device))
            bar.update(len(chosen))


def longest_first(rows: Sequence[Sequence[int]]) -> list[int]:
    """Row numbers by length: a batch that does not fit fails at once, and little is padding."""
    return sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))


def passes(
    rows: Sequence[int], lengths: Sequence[int], batch_size: int, device: Any
) -> Iterator[list[int]]:
    """Yields the rows in order, as many at a time as go through the model at once.

    Args:
        lengths: tokens of each of these rows.
        batch_size: at most so many rows; on a CPU, where they are long, fewer.
    """
    is_cpu = torch.device(device).type == "cpu"
    most = _PASS_TOKENS * torch.get_num_threads() if is_cpu else math.inf
    taken: list[int] = []
    width = 0
    for row, length in zip(rows, lengths, strict=True):
        width = max(width, length)
        if taken and (len(taken) == batch_size or width * (len(taken) + 1) > most):
            yield taken
            taken, width = [], length
        taken.append(row)
    if taken:
        yield taken


def fitting(
    work: Callable[[list[int]], Result], rows: list[int], label: str | None = None
) -> Iterator[tuple[list[int], Result]]:
    """Yields rows with what `work` makes of them: all at once, or in halves that fit into memory.

    Args:
        label: of the work, for the message.
    Raises:
        UserError: one row alone does not fit.
    """
    pending = [rows]
    while pending:
        part = pending.pop()
        try:
            result = work(part)
        except RuntimeError as error:
            _require_memory(error, len(part), label)
        else:
            yield part, result
            continue
        half = _half(len(part))
        pending += [part[half:], part[:half]]


def halving(work: Callable[[int], None], most: int, label: str | None = None) -> None:
    """Calls `work` with the most rows it may hold at a time, until that fits into memory.

    Args:
        work: is called again where memory ended, and then goes on with what it has not done.
        label: of the work, for the message.
    Raises:
        UserError: one row alone does not fit.
    """
    while True:
        try:
            return work(most)
        except RuntimeError as error:
            _require_memory(error, most, label)
        most = _half(most)


def _require_memory(error: RuntimeError, num_rows: int, label: str | None) -> None:
    """Raises what halving does not help against."""
    if not should_reduce_batch_size(error):
        raise error
    if num_rows == 1:
        raise UserError(_too_large(error, label)) from error


def _half(num_rows: int) -> int:
    """Of rows that do not fit; not inside `except`, whose traceback holds what was made so far."""
    clear_device_cache(garbage_collection=True)
    logger.warning("{} rows do not fit into memory together: {} at a time", num_rows, num_rows // 2)
    return num_rows // 2


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int | None, device: Any
) -> dict[str, torch.Tensor]:
    """Token ids to model inputs with their ends aligned, each [batch, tokens].

    Returns:
        input_ids, attention_mask, position_ids; a row counts from its own first token.
    """
    width = max(len(row) for row in rows)
    return _inputs(rows, [width - len(row) for row in rows], pad_id, device)


def right_pad(
    rows: Sequence[Sequence[int]], pad_id: int | None, device: Any
) -> dict[str, torch.Tensor]:
    """The same with their beginnings aligned: what a causal model reads is not moved."""
    return _inputs(rows, [0] * len(rows), pad_id, device)


def _inputs(
    rows: Sequence[Sequence[int]], starts: Sequence[int], pad_id: int | None, device: Any
) -> dict[str, torch.Tensor]:
    width = max(start + len(row) for start, row in zip(starts, rows, strict=True))
    ids = torch.full((len(rows), width), pad_id or 0, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, (start, row) in enumerate(zip(starts, rows, strict=True)):
        ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, start : start + len(row)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
    }


def _too_large(error: RuntimeError, label: str | None) -> str:
    return (
        f"{label or 'a forward pass'}: one row alone does not fit into memory "
        f"({str(error).splitlines()[0]}): take a smaller model, shorter replies (max_new_tokens), "
        "or a machine with more memory"
    )
