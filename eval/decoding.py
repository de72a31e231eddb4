"""Decoding many rows at a time, from prompts to new token ids.

transformers' `generate` decodes a segment; the rows that ended in it are taken out of the cache,
and as soon as a fourth of the rows are gone, others that wait are read and put in their place:

    row 0   prompt n n n n n end             a row counts its steps from its own start; what
    row 1   prompt n n n n n n n n n         stands left of all rows is taken out
    row 2         prompt n n n n n n

Rows that are begun together and have the same prompt share the work on it: it is read once, and
each gets a copy of what is in the cache. A row that is to be given up, as one that has become a
loop, is taken out like one that ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor

from eval.batching import left_pad, passes
from eval.caches import can_be_joined, joined, without_first
from eval.two_parts import attending, two_part_cache

_REFILLED_SHARE = 0.25  # of the rows: each time costs a copy of the cache


@dataclass(kw_only=True)
class _Batch:
    """Rows in hand, their ends aligned."""

    rows: list[int]
    ids: torch.Tensor  # prompt and what is new: [rows, tokens]
    mask: torch.Tensor  # where tokens stand and no padding: [rows, tokens]
    starts: torch.Tensor  # where a row's new tokens begin, on the CPU: [rows]
    cache: Any  # of all tokens but the last; None: the model makes its own, or has none

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    @property
    def age(self) -> int:
        """New tokens of the youngest row."""
        return self.width - int(self.starts.max())

    def new_ids(self) -> list[list[int]]:
        first = int(self.starts.min())
        found = zip(self.ids[:, first:].tolist(), self.starts.tolist(), strict=True)
        return [ids[start - first :] for ids, start in found]

    def keep(self, going: torch.Tensor) -> None:
        """Takes out all rows but these: [rows], bool."""
        index = going.nonzero().flatten()
        self.rows = [self.rows[at] for at in index.tolist()]
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.starts = self.starts[index.cpu()]
        if self.cache is not None:
            self.cache.reorder_cache(index)

    def add(self, other: _Batch) -> None:
        """Puts these rows beside its own; both caches can be joined."""
        padding = int(self.mask.any(0).int().argmax())
        if padding:
            without_first(self.cache, padding)
            self.ids, self.mask = self.ids[:, padding:], self.mask[:, padding:]
            self.starts = self.starts - padding
        width = max(self.width, other.width)
        self.starts, self.ids, self.mask = (
            torch.cat([self.starts + width - self.width, other.starts + width - other.width]),
            *(
                torch.cat([pad(part, (width - part.shape[1], 0)) for part in parts])
                for parts in ((self.ids, other.ids), (self.mask, other.mask))
            ),
        )
        self.cache = joined([self.cache, other.cache])
        self.rows = self.rows + other.rows


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Everything that is the same for all rows."""

    model: Any
    prompts: Sequence[Sequence[int]]
    kinds: Sequence[Hashable] | None
    uniforms: torch.Tensor  # [prompts, steps], which are as many as a row gets tokens at the most
    temperature: float
    generation: GenerationConfig
    around_batch: Callable[[list[int]], AbstractContextManager]
    give_up: Callable[[Sequence[int]], bool]

    def kind(self, row: int) -> Hashable:
        """Rows of which it is the same share the reading of their prompt."""
        return (self.kinds and self.kinds[row], tuple(self.prompts[row]))

    def longest_first(self, rows: Sequence[int]) -> list[int]:
        """By length of the prompt, those of a kind together."""
        first: dict[Hashable, int] = {}
        key = {row: first.setdefault(self.kind(row), row) for row in rows}
        return sorted(rows, key=lambda row: (-len(self.prompts[row]), key[row], row))

    def grow(
        self, rows: Sequence[int], most: int, segment: int
    ) -> Iterator[tuple[int, list[int], bool]]:
        """Yields each row in hand, all its new token ids, and whether these were its last.

        Args:
            most: rows in hand at a time.
            segment: tokens after which each of them is yielded again; sooner at its limit.
        """
        waiting, batch = deque(rows), None
        while waiting or batch:
            if batch is None:
                batch = self._begun(_taken(waiting, most))
            elif batch.age % segment == 0:  # of all rows then, and they stay in step
                self._refill(batch, waiting, most)
            before, missing = batch.width, segment - batch.age % segment
            if batch.cache is None and batch.age:  # Mamba: read again from its start, once
                missing = self.uniforms.shape[1]
            self._go_on(batch, missing)
            grown, over = batch.new_ids(), self._are_over(batch, before)
            if batch.age % segment == 0:
                over |= torch.tensor([self.give_up(new) for new in grown], device=over.device)
            yield from zip(batch.rows, grown, over.tolist(), strict=True)
            if over.any():
                batch.keep(~over)
            batch = batch if batch.rows else None

    def _refill(self, batch: _Batch, waiting: deque[int], most: int) -> None:
        """Begins rows that wait, where enough have ended and the cache allows."""
        room = most - len(batch.rows)
        if not waiting or room < most * _REFILLED_SHARE or not can_be_joined(batch.cache):
            return
        if len(self.prompts[waiting[min(room, len(waiting)) - 1]]) > 1:  # the last is the shortest
            batch.add(self._begun(_taken(waiting, room), beside_others=True))

    @torch.inference_mode()  # not around a yield: any thread may read
    def _go_on(self, batch: _Batch, num_tokens: int) -> None:
        """Decodes so many tokens, fewer where a row comes to its limit or all have ended."""
        left = self.uniforms.shape[1] - (batch.width - int(batch.starts.min()))
        self.generation.max_new_tokens = min(num_tokens, left)
        draw = _Draw(self.uniforms[batch.rows], batch.starts, self.temperature)
        with self.around_batch(batch.rows), attending(self.model, batch.cache):
            out = self.model.generate(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                past_key_values=batch.cache,
                generation_config=self.generation,
                logits_processor=[draw] if self.temperature else [],
            )
        batch.mask = pad(batch.mask, (0, out.sequences.shape[1] - batch.width), value=1)
        batch.ids, batch.cache = out.sequences, out.past_key_values

    def _are_over(self, batch: _Batch, before: int) -> torch.Tensor:
        """Rows that said an end-of-turn token since then, or are at their limit: [rows], bool."""
        stops = torch.tensor(self.generation.eos_token_id, device=batch.ids.device)
        at_limit = batch.width - batch.starts == self.uniforms.shape[1]
        ended: torch.Tensor = torch.isin(batch.ids[:, before:], stops).any(1)
        return ended | at_limit.to(ended.device)

    def _begun(self, rows: list[int], beside_others: bool = False) -> _Batch:
        """Rows whose prompts were read but for their last tokens."""
        inputs = self._inputs(rows)
        ids = inputs["input_ids"]
        return _Batch(
            rows=rows,
            ids=ids,
            mask=inputs["attention_mask"],
            starts=torch.full((len(rows),), ids.shape[1]),
            cache=self._cache(rows, beside_others),
        )

    @torch.inference_mode()
    def _cache(self, rows: list[int], is_needed: bool) -> Any:
        """A cache of the rows' prompts but for their last tokens; None: the model makes its own.

        A prompt is read once for all rows of its kind. Its last token is left to each row itself,
        which begins to differ after it.
        """
        key = {row: self.kind(row) for row in rows}
        firsts = list({key[row]: row for row in reversed(rows)}.values())[::-1]  # longest first
        lengths = [len(self.prompts[row]) - 1 for row in firsts]
        begun: Any = two_part_cache(self.model)
        shares = len(firsts) < len(rows)
        if min(lengths) < 1 or not (begun is not None or shares or is_needed):
            return begun
        at_once = [firsts]
        if can_be_joined(begun):
            at_once = list(passes(firsts, lengths, len(firsts), self.model.device))
        begun = joined([self._read(some) for some in at_once])
        if begun is not None and firsts != rows:
            entry = {key[row]: index for index, row in enumerate(firsts)}
            taken = torch.tensor([entry[key[row]] for row in rows], device=self.model.device)
            begun.reorder_cache(taken)
        return begun

    def _read(self, rows: list[int]) -> Any:
        """The cache after these rows' prompts but for their last tokens; None: there is none."""
        inputs = {name: value[:, :-1] for name, value in self._inputs(rows).items()}
        cache = two_part_cache(self.model)
        with self.around_batch(rows), attending(self.model, cache):
            out = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return getattr(out, "past_key_values", None)

    def _inputs(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Prompts with their ends aligned, [rows, tokens]."""
        prompts = [self.prompts[row] for row in rows]
        return left_pad(prompts, self.generation.pad_token_id, self.model.device)


def _taken(waiting: deque[int], count: int) -> list[int]:
    return [waiting.popleft() for _ in range(min(count, len(waiting)))]


class _Draw(LogitsProcessor):
    """Draws each row's token from its scores and leaves no other one possible."""

    def __init__(self, uniforms: torch.Tensor, starts: torch.Tensor, temperature: float) -> None:
        self.uniforms = uniforms  # [rows, steps]
        self.starts = starts  # where a row's new tokens begin: [rows]
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.starts  # [rows]
        uniform = self.uniforms.gather(1, step[:, None])  # [rows, 1]
        probabilities = (scores / self.temperature).softmax(-1)  # [rows, vocab]
        if scores.device.type == "mps":  # which has no fp64
            probabilities = probabilities.cpu()
        # in fp32 the sum over a large vocabulary would swallow the tail
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        aimed = uniform.to(cumulative.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, aimed, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.to(scores.device), 0.0)
