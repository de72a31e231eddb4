"""Logits, or final hidden states, at the ends of rows, in batches: what scores are read off.

    row = prefix + rest;   wanted: those at the last `count` tokens of the rest

Rows that begin with the same prefix share the work on it: each prefix is read once into a cache
(left-padded), whose entries are then handed to the rests (right-padded, so that nothing stands
between the two). That differs from reading whole rows by rounding alone. Where no two rows share,
or the family keeps no such cache (Mamba), whole rows are read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch

from eval.bars import progress_bar
from eval.batching import fitting, left_pad, passes, right_pad
from eval.processes import spread

Around = Callable[[list[int]], AbstractContextManager]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Rows of token ids, and what is read of them."""

    rows: Sequence[Sequence[int]]  # [rows][tokens]
    counts: Sequence[int]  # tokens at a row's end whose logits are wanted, at least 1
    lengths: Sequence[int]  # of a row's prefix, at most its length less its count
    kinds: Sequence[Hashable] | None = None  # rows of different kinds share nothing

    def prefix(self, row: int) -> Sequence[int]:
        return self.rows[row][: self.lengths[row]]

    def sharing(self) -> dict[int, list[int]]:
        """All rows of a prefix and a kind by the first of them, the longest prefixes first."""
        found: dict[Hashable, list[int]] = {}
        for row in sorted(range(len(self.rows)), key=lambda row: -self.lengths[row]):
            kind = None if self.kinds is None else self.kinds[row]
            found.setdefault((kind, tuple(self.prefix(row))), []).append(row)
        return {rows[0]: rows for rows in found.values()}


def completion_ends(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    kinds: Sequence[Hashable] | None = None,
) -> Ends:
    """From what predicts a completion's first token, the prompt's last, to its own last token."""
    return Ends(
        rows=[[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)],
        counts=[len(ids) + 1 for ids in completions],
        lengths=[len(prompt) - 1 for prompt in prompts],
        kinds=kinds,
    )


def alike_ends(rows: Sequence[Sequence[int]], counts: Sequence[int], num_alike: int) -> Ends:
    """Ends of rows of which each `num_alike` that stand together share what they begin with."""
    lengths = []
    for start in range(0, len(rows), num_alike):
        alike = slice(start, start + num_alike)
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows[alike], strict=False))
        common = sum(1 for _ in same)
        most = (len(row) - count for row, count in zip(rows[alike], counts[alike], strict=True))
        lengths += [min(common, *most)] * len(rows[alike])
    return Ends(rows=rows, counts=counts, lengths=lengths)


def end_logits(
    model: Any,
    ends: Ends,
    batch_size: int,
    pad_id: int | None,
    label: str | None = None,
    around: Around = lambda rows: nullcontext(),
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields each row's index and its wanted logits, [count, vocab], a batch after another.

    Args:
        pad_id: what fills a row, masked; None (Llama 3 has no padding token): id 0.
        label: what the progress bar says; None draws none.
        around: entered around every forward pass with the indices of its rows, in batch order; a
            prefix stands there as the first row that has it.
    Raises:
        UserError: one row alone does not fit into memory.
    """
    return _ends(_Reader(model, ends, pad_id, around, states=False), batch_size, label)


def token_logprobs(
    model: Any,
    pad_id: int | None,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int = 32,
    label: str | None = None,
) -> list[torch.Tensor]:
    """Log-probability of every completion token given what stands before it, nats.

    Args:
        prompts, completions: token ids, [rows][tokens]; a prompt has at least one token.

    Returns:
        One fp32 tensor [completion tokens] a row, on the CPU; an empty completion's is empty.
    """

    def score(rows: list[int]) -> list[torch.Tensor]:
        result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        said = [completions[row] for row in rows]
        ends = completion_ends([prompts[row] for row in rows], said)
        for at, logits in end_logits(model, ends, batch_size, pad_id, label):
            # a row at a time, as fp32 [vocab] a token is dear
            logp = logits[:-1].float().log_softmax(-1)  # [completion, vocab]
            ids = torch.tensor(said[at], dtype=torch.long, device=logp.device)
            result[at] = logp.gather(-1, ids[:, None])[:, 0].cpu()
        return result

    return spread(score, [tuple(prompt) for prompt in prompts])


def end_states(
    model: Any,
    ends: Ends,
    batch_size: int,
    pad_id: int | None,
    label: str | None = None,
    around: Around = lambda rows: nullcontext(),
) -> Iterator[tuple[int, torch.Tensor]]:
    """The same with hidden states after the final norm, [count, hidden], in place of logits."""
    return _ends(_Reader(model, ends, pad_id, around, states=True), batch_size, label)


@torch.inference_mode()
def _ends(
    reader: _Reader, batch_size: int, label: str | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """What the reader reads of each row, a batch after another."""
    ends = reader.ends
    sharing, total = ends.sharing(), len(ends.rows)
    if len(sharing) == total or 0 in ends.lengths:
        ends = replace(ends, lengths=[0] * total)
        sharing, reader = ends.sharing(), replace(reader, ends=ends)
    firsts, device = list(sharing), reader.model.device
    with progress_bar(total, label) as bar:
        for batch in passes(firsts, [ends.lengths[row] for row in firsts], batch_size, device):
            for some, read in fitting(reader.prefixes, batch, label):
                entry = {row: at for at, first in enumerate(some) for row in sharing[first]}
                left = {row: len(ends.rows[row]) - ends.lengths[row] for row in entry}
                rows = sorted(entry, key=lambda row: (-left[row], row))
                rest = partial(reader.rests, read, entry)
                for run in passes(rows, [left[row] for row in rows], batch_size, device):
                    for part, found in fitting(rest, run, label):
                        yield from zip(part, found, strict=True)
                        bar.update(len(part))


@dataclass(frozen=True, kw_only=True)
class _Prefixes:
    """Prefixes that were read."""

    cache: Any  # keys, values and states after each; None: nothing was read
    mask: torch.Tensor  # where tokens stand and no padding: [prefixes, tokens]


@dataclass(frozen=True)
class _Reader:
    """The forward passes."""

    model: Any
    ends: Ends
    pad_id: int | None
    around: Around
    states: bool  # hidden states are read in place of logits

    def prefixes(self, rows: list[int]) -> _Prefixes:
        """Reads the prefix of each of these rows."""
        inputs = left_pad([self.ends.prefix(row) for row in rows], self.pad_id, self.model.device)
        mask, cache = inputs["attention_mask"], None
        if mask.shape[1]:
            with self.around(rows):
                out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            cache = getattr(out, "past_key_values", None)
        return _Prefixes(cache=cache, mask=mask)

    def rests(self, read: _Prefixes, entry: dict[int, int], rows: list[int]) -> list[torch.Tensor]:
        """Logits or hidden states of the rows' ends: [rows][count, vocab or hidden].

        Args:
            entry: of each row, which of the prefixes is its own.
        """
        ends, known, device = self.ends, read.cache is not None, self.model.device
        rests = [ends.rows[row][ends.lengths[row] if known else 0 :] for row in rows]
        inputs: dict[str, Any] = right_pad(rests, self.pad_id, device)
        if known:
            taken = torch.tensor([entry[row] for row in rows], device=device)
            cache, before = deepcopy(read.cache), read.mask[taken]  # a pass writes to its cache
            cache.reorder_cache(taken)
            inputs["attention_mask"] = torch.cat([before, inputs["attention_mask"]], 1)
            inputs["position_ids"] += before.sum(1, keepdim=True)
            inputs["past_key_values"] = cache
        spans = [
            (len(rest) - ends.counts[row], len(rest)) for rest, row in zip(rests, rows, strict=True)
        ]
        first = min(start for start, _ in spans)  # before it no logits are made
        keep = max(end for _, end in spans) - first
        with self.around(rows):
            found = self._last(inputs | {"use_cache": known}, keep)
        return [
            row[start - first : end - first] for row, (start, end) in zip(found, spans, strict=True)
        ]

    def _last(self, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        """Logits or hidden states of a batch's last positions: [rows, keep, ...]."""
        if not self.states:
            return self.model(**inputs, logits_to_keep=keep).logits
        out = self.model(**inputs, logits_to_keep=1, output_hidden_states=[-1])
        return out.hidden_states[-1][:, -keep:]
