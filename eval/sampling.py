"""Sampling of replies, from token ids to token ids.

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
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from eval.bars import progress_bar
from eval.batching import halving
from eval.decoding import Decoder
from eval.processes import spread

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
    decoder = Decoder(
        model=model,
        prompts=prompts,
        kinds=kinds,
        uniforms=_uniforms(seed, len(prompts), max_new_tokens),
        temperature=temperature,
        generation=_generation(model, tokenizer, forbidden),
        around_batch=around_batch or (lambda rows: nullcontext()),
        give_up=give_up or (lambda ids: False),
    )

    sample = partial(_sampled, decoder, batch_size, label)
    return spread(sample, [decoder.kind(row) for row in range(len(prompts))])


def _sampled(
    decoder: Decoder, batch_size: int, label: str | None, mine: Sequence[int]
) -> list[Reply]:
    """Replies to these prompts, in their order, fewer at a time where memory ends."""
    replies = dict[int, Reply]()
    order = decoder.longest_first(mine)

    def sample_rest(most: int) -> None:
        rest = [row for row in order if row not in replies]
        for row, ids, is_over in decoder.grow(rest, most, _SEGMENT_TOKENS):
            if is_over:
                replies[row] = _cut(ids, decoder.generation.eos_token_id)
                bar.update(1)

    with progress_bar(len(order), label) as bar:
        halving(sample_rest, min(batch_size, len(order)), label)
    return [replies[row] for row in mine]


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
    decoder = Decoder(
        model=model,
        prompts=[prompt],
        kinds=None,
        uniforms=_uniforms(seed, 1, max_new_tokens),
        temperature=temperature,
        generation=_generation(model, tokenizer),
        around_batch=lambda rows: around_segment(),
        give_up=lambda ids: False,
    )
    for _, ids, _ in decoder.grow([0], 1, _STREAMED_TOKENS):
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
