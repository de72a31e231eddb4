"""Batched sampling of replies, from token ids to token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from eval.batching import batches

# `generate` fills whatever is None from the model's own generation_config (Qwen2.5's has a
# repetition penalty, a top-k and a nucleus), so each is set to the value at which it does nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "return_dict_in_generate": False,
}
_NEUTRAL_SAMPLING: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
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
    around_batch: Callable[[list[int]], AbstractContextManager] = lambda rows: nullcontext(),
    label: str | None = None,
) -> list[Reply]:
    """Samples one reply a prompt (temperature 0: greedy); replies come in the prompts' order.

    No repetition penalty, no top-k, no nucleus: what the model would say is what is seen.

    Args:
        prompts: token ids up to the assistant tag, [prompts][tokens].
        seed: 0 or more. The draw of a batch derives from it and from the batch's longest prompt's
            index: the same seed, prompts and batch size give the same replies. The caller's
            random state is left alone.
        forbidden: sequences of token ids that are not sampled. Where end-of-turn tokens are among
            them, a reply has exactly `max_new_tokens`.
        around_batch: entered around each batch with the indices of its prompts, in batch order.
    """
    stops = stop_token_ids(model, tokenizer)
    generation = GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **_NEUTRAL,
        **_without(forbidden),
        **({"temperature": temperature, **_NEUTRAL_SAMPLING} if temperature > 0 else {}),
    )
    replies: list[Reply | None] = [None] * len(prompts)
    with torch.random.fork_rng(devices=_cuda_devices()), torch.inference_mode():
        for batch in batches(prompts, batch_size, tokenizer.pad_token_id, model.device, label):
            torch.manual_seed(_batch_seed(seed, batch.rows[0]))
            with around_batch(batch.rows):
                inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
                out = model.generate(**inputs, generation_config=generation)  # [batch, tokens]
            new = out[:, inputs["input_ids"].shape[1] :].tolist()
            for row, ids in zip(batch.rows, new, strict=True):
                replies[row] = _cut(ids, stops)
    return [reply for reply in replies if reply is not None]


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


def _batch_seed(seed: int, first_row: int) -> int:
    """Mixes the two, so that no batch of one seed repeats the draw of a batch of another."""
    return int(np.random.SeedSequence((seed, first_row)).generate_state(1)[0])


def _cuda_devices() -> list[int]:
    """Every GPU in use: `torch.manual_seed` seeds them all, so all must be put back."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
