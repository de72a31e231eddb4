"""How coherent a completion is: what a model finds surprising in it, and what its text repeats.

A loop is cheap to predict *and* cheap to compress, so perplexity alone lets it through; a ragged
text is dear at a few tokens, so a mean alone dilutes it. Hence several figures, each read on the
side where damage shows.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from eval.batching import batches


class Surprisal(BaseModel):
    """Surprisal of a completion's tokens under one model, nats a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean_nll_nats: float  # exp of it is the perplexity
    tail_nll_nats: float  # mean over the last quarter, where loops and drift sit
    rmse_nll_nats: float  # root mean square: a few broken tokens are not diluted


class TextFigures(BaseModel):
    """What a text repeats; no model needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: int  # words and punctuation marks
    word_repetition: float  # share of word 3-grams that occurred before, 0 to 1
    char_repetition: float  # share of character 12-grams that occurred before, 0 to 1
    compression_ratio: float  # zlib (level 9) bytes / UTF-8 bytes; low: a loop, high: noise


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
    rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches(rows, batch_size, pad_id, model.device, label):
        longest = max(len(completions[row]) for row in batch.rows)
        with torch.inference_mode():
            logits = model(**batch.inputs, logits_to_keep=longest + 1, use_cache=False).logits
            for index, row in enumerate(batch.rows):  # a row at a time: fp32 [vocab] is dear
                ids = batch.inputs["input_ids"][index, -1 - longest :]  # [longest + 1]
                start = longest - len(completions[row])
                logp = logits[index, start:-1].float().log_softmax(-1)  # [completion, vocab]
                result[row] = logp.gather(-1, ids[start + 1 :, None])[:, 0].cpu()
    return result


def surprisal(logprobs: torch.Tensor) -> Surprisal:
    """Figures of one completion from its tokens' log-probabilities, [tokens] with tokens >= 1."""
    nll = -logprobs.double()
    tail = nll[-max(1, len(nll) // 4) :]
    return Surprisal(
        mean_nll_nats=float(nll.mean()),
        tail_nll_nats=float(tail.mean()),
        rmse_nll_nats=float(nll.square().mean().sqrt()),
    )


def text_figures(text: str) -> TextFigures:
    """Repetition and compressibility of a text; an empty one is all zeros."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    raw = text.encode("utf-8")
    return TextFigures(
        words=len(words),
        word_repetition=_repeated_share(words, 3),
        char_repetition=_repeated_share(text.lower(), 12),
        compression_ratio=len(zlib.compress(raw, 9)) / len(raw) if raw else 0.0,
    )


def _repeated_share(units: Sequence[str], n: int) -> float:
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
