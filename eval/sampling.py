"""Batched sampling of replies, from token ids to token ids.

Rows leave their batch soon after they end: transformers' `generate` decodes a segment, the rows
that ended in it are taken out of the cache, and the others go on. Rows of a batch that have the
same prompt share the work on it: it is read once, and each gets a copy of what is in the cache.
A row that is to be given up, as one that has become a loop, is taken out like one that ended.

A token is drawn by the inverse of its distribution's cumulative function. With u ~ U[0, 1) of its
own for every row and step,

    token[row, step] = the first t with  sum_{v <= t} p(v | row, step) > u[row, step]

so that a draw depends on the seed, the row's index and the step alone, and not on the rows beside
it. Two conditions that are sampled with one seed differ by what they say, not by their luck.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor

from eval.bars import progress_bar
from eval.batching import fitting, left_pad, longest_first, passes
from eval.processes import spread
from eval.two_parts import attending, can_be_merged, merged, two_part_cache

_SEGMENT_TOKENS = 8
_STREAMED_TOKENS = 4  # of a reply that is read as it grows

# `generate` fills whatever is None from the model's own generation_config (Qwen2.5's has a
# repetition penalty, a top-k and a nucleus), so each is set to the value at which it does nothing.
_NEUTRAL: dict[str, Any] = {
    "do_sample": False,  # of what `_Draw` leaves it, which is one token
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
    "cache_implementation": "hybrid",  # `generate`'s name for no wish: a cache that can go on
    "return_dict_in_generate": True,
}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One sampled completion."""

    token_ids: tuple[int, ...]  # with the end-of-turn token where there is one
    finished: bool  # ended by an end-of-turn token, not by the length limit

    @property
    def said(self) -> tuple[int, ...]:
        """Its tokens without the end-of-turn token."""
        return self.token_ids[:-1] if self.finished else self.token_ids


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a reply: the tokenizer's and the model's own, sorted."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *_as_list(configured)}
    return sorted(token for token in ids if token is not None)


def sample_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    forbidden: Sequence[Sequence[int]] = (),
    around_batch: Callable[[list[int]], AbstractContextManager] | None = None,
    kinds: Sequence[Hashable] | None = None,
    give_up: Callable[[Sequence[int]], bool] | None = None,
    label: str | None = None,
) -> list[Reply]:
    """Samples one reply a prompt (temperature 0: greedy); replies come in the prompts' order.

    No repetition penalty, no top-k, no nucleus: what the model would say is what is seen.

    Args:
        prompts: token ids up to the assistant tag, [prompts][tokens].
        seed: 0 or more. A prompt's draws derive from it and the prompt's index, not from the batch,
            but where rounding moves the logits across one: 1 of 384 replies of the embedded model
            in fp32, more in bf16. The caller's random state is neither read nor changed.
        forbidden: sequences of token ids that are not sampled. Where end-of-turn tokens are among
            them, a reply has exactly `max_new_tokens`.
        around_batch: entered around the reading of a batch's prompts and around each segment that
            follows, with the indices of the prompts in hand, in batch order.
        kinds: of every prompt, what `around_batch` does to it; prompts of one kind share their
            reading. None: all are of one kind without `around_batch`, each of its own with it.
        give_up: asked of every reply's token ids after each segment; where it says yes, the reply
            stays as it is then, unfinished.
    Raises:
        UserError: one prompt alone does not fit into memory.
    """
    if kinds is None and around_batch is not None:
        kinds = range(len(prompts))
    decoder = _Decoder(
        model=model,
        prompts=prompts,
        kinds=kinds,
        uniforms=_uniforms(seed, len(prompts), max_new_tokens),
        temperature=temperature,
        generation=_generation(model, tokenizer, forbidden),
        around_batch=around_batch or (lambda rows: nullcontext()),
        give_up=give_up or (lambda ids: False),
    )

    def sample(mine: list[int]) -> list[Reply]:
        replies, stops = dict[int, Reply](), decoder.generation.eos_token_id
        order = [mine[at] for at in longest_first([prompts[row] for row in mine])]
        with progress_bar(len(order), label) as bar:
            for start in range(0, len(order), batch_size):
                some = order[start : start + batch_size]
                for rows, found in fitting(decoder.decode, some, label):
                    replies |= zip(rows, (_cut(ids, stops) for ids in found), strict=True)
                    bar.update(len(rows))
        return [replies[row] for row in mine]

    return spread(sample, [decoder.kind(row) for row in range(len(prompts))])


def stream_reply(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    around_segment: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Reply]:
    """Yields one reply as it grows; the last is what `sample_replies` gives to the prompt alone.

    Nothing is held between two of them: others may use the model meanwhile, and who wants no more
    of the reply just leaves it.

    Args:
        prompt: token ids up to the assistant tag, [tokens].
        around_segment: entered around each few tokens.
    """
    decoder = _Decoder(
        model=model,
        prompts=[prompt],
        kinds=None,
        uniforms=_uniforms(seed, 1, max_new_tokens),
        temperature=temperature,
        generation=_generation(model, tokenizer),
        around_batch=lambda rows: around_segment(),
        give_up=lambda ids: False,
    )
    for ((_, ids),) in decoder.grow([0], _STREAMED_TOKENS):
        yield _cut(ids, decoder.generation.eos_token_id)


def _generation(
    model: Any, tokenizer: Any, forbidden: Sequence[Sequence[int]] = ()
) -> GenerationConfig:
    stops = stop_token_ids(model, tokenizer)
    return GenerationConfig(
        eos_token_id=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **_NEUTRAL,
        **_without(forbidden),
    )


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """Everything that is the same for all batches."""

    model: Any
    prompts: Sequence[Sequence[int]]
    kinds: Sequence[Hashable] | None
    uniforms: torch.Tensor  # [prompts, steps]
    temperature: float
    generation: GenerationConfig
    around_batch: Callable[[list[int]], AbstractContextManager]
    give_up: Callable[[Sequence[int]], bool]

    def kind(self, row: int) -> Hashable:
        """Rows of which it is the same share the reading of their prompt."""
        return (self.kinds and self.kinds[row], tuple(self.prompts[row]))

    def decode(self, rows: list[int]) -> list[list[int]]:
        """New token ids of each of these rows, up to the end of the segment that was its last."""
        found: dict[int, list[int]] = {}
        for grown in self.grow(rows, _SEGMENT_TOKENS):
            found |= grown  # the last of a row is the whole
        return [found[row] for row in rows]

    def grow(self, rows: list[int], segment: int) -> Iterator[list[tuple[int, list[int]]]]:
        """Yields each row that went on with all its new token ids, after every `segment` tokens."""
        inputs = self._inputs(rows)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]  # [rows, tokens]
        width, longest = ids.shape[1], ids.shape[1] + self.uniforms.shape[1]
        stops = torch.tensor(self.generation.eos_token_id, device=ids.device)
        cache = self._begun(rows)
        while rows:
            self.generation.max_new_tokens = min(segment, longest - ids.shape[1])
            draw = _Draw(self.uniforms[rows], width, self.temperature)
            with torch.inference_mode():  # not around the yield: any thread may read
                with self.around_batch(rows), attending(self.model, cache):
                    out = self.model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        past_key_values=cache,
                        generation_config=self.generation,
                        logits_processor=[draw] if self.temperature else [],
                    )
                ids, cache = out.sequences, out.past_key_values
                mask = pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
                grown = list(zip(rows, ids[:, width:].tolist(), strict=True))
                over = torch.isin(ids[:, width:], stops).any(1) | (ids.shape[1] == longest)
                over |= torch.tensor([self.give_up(new) for _, new in grown], device=ids.device)
                if over.any():
                    going = (~over).nonzero().flatten()
                    rows = [rows[index] for index in going.tolist()]
                    ids, mask = ids[going], mask[going]
                    if cache is not None:
                        cache.reorder_cache(going)
                if cache is None:  # Mamba: what goes on is read again from its start, once
                    segment = self.uniforms.shape[1]
            yield grown

    @torch.inference_mode()
    def _begun(self, rows: list[int]) -> Any:
        """A cache of the rows' prompts but for their last tokens; None: the model makes its own.

        A prompt is read once for all rows of its kind. Its last token is left to each row itself,
        which begins to differ after it.
        """
        key = {row: self.kind(row) for row in rows}
        firsts = list({key[row]: row for row in reversed(rows)}.values())[::-1]  # longest first
        lengths = [len(self.prompts[row]) - 1 for row in firsts]
        begun: Any = two_part_cache(self.model)
        if min(lengths) < 1 or (begun is None and len(firsts) == len(rows)):
            return begun
        if can_be_merged(begun):
            runs = passes(firsts, lengths, len(firsts), self.model.device)
            begun = merged([self._read(run) for run in runs])
        else:
            begun = self._read(firsts)
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


class _Draw(LogitsProcessor):
    """Draws each row's token from its scores and leaves no other one possible."""

    def __init__(self, uniforms: torch.Tensor, prompt_width: int, temperature: float) -> None:
        self.uniforms = uniforms  # [rows, steps]
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = self.uniforms[:, input_ids.shape[1] - self.prompt_width, None]  # [rows, 1]
        probabilities = (scores / self.temperature).softmax(-1)  # [rows, vocab]
        if scores.device.type == "mps":  # which has no fp64
            probabilities = probabilities.cpu()
        # in fp32 the sum over a large vocabulary would swallow the tail
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        aimed = uniform.to(cumulative.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, aimed, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.to(scores.device), 0.0)


def _uniforms(seed: int, num_rows: int, num_steps: int) -> torch.Tensor:
    """A stream in [0, 1) of its own for each row, fp64: [rows, steps]."""
    streams = np.random.SeedSequence(seed).spawn(num_rows)
    drawn = [np.random.default_rng(stream).random(num_steps) for stream in streams]
    return torch.from_numpy(np.array(drawn))


def _without(forbidden: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Single tokens apart: `bad_words_ids` alone lets an end-of-text token through."""
    single = sorted({ids[0] for ids in forbidden if len(ids) == 1})
    longer = [list(ids) for ids in forbidden if len(ids) > 1]
    return {"suppress_tokens": single or None, "bad_words_ids": longer or None}


def _cut(ids: list[int], stops: list[int]) -> Reply:
    """Ends a row at its first end-of-turn token, which it keeps."""
    end = next((index for index, token in enumerate(ids) if token in stops), None)
    if end is None:
        return Reply(token_ids=tuple(ids), finished=False)
    return Reply(token_ids=tuple(ids[: end + 1]), finished=True)


def _as_list(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]
