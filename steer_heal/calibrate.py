"""The filter's limits, from the base's own unsteered completions.

Absolute perplexities do not carry from model to model; quantiles of what the untouched base says to
the same prompts do. Those of the text's own figures have a margin on top (`brokenness.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.chat import chat_ids
from eval.coherence import surprisal, text_figures
from eval.logits import token_logprobs
from eval.sampling import sample_replies
from steer_heal.artifacts import Limits
from steer_heal.brokenness import text_limits
from steer_heal.config import FilterConfig, GenerateConfig
from steer_heal.model import Student
from steer_heal.overlap import PersonaWords
from steer_heal.trait import Trait


def calibrate(
    student: Student, trait: Trait, config: FilterConfig, generate: GenerateConfig, seed: int
) -> Limits:
    """Samples `config.num_calibration` completions of the base and takes their quantiles."""
    tokenizer = student.tokenizer
    turns = [trait.prompts[row % len(trait.prompts)] for row in range(config.num_calibration)]
    prompts = [chat_ids(tokenizer, turn) for turn in turns]
    with student.base.running() as model:
        replies = sample_replies(
            model,
            tokenizer,
            prompts,
            seed=seed,
            max_new_tokens=generate.max_new_tokens,
            temperature=generate.temperature,
            batch_size=generate.rows_at_a_time,
            label="calibration",
        )
        ids = [reply.token_ids for reply in replies]
        logprobs = token_logprobs(
            model, tokenizer.pad_token_id, prompts, ids, config.batch_size, "surprisal"
        )
    surprisals = [surprisal(row) for row in logprobs]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    figures, persona = [text_figures(text) for text in texts], PersonaWords(trait)
    tails = [each.tail_nll_nats for each in surprisals]

    def upper(values: Sequence[float]) -> float:
        return float(np.quantile(values, config.quantile))

    def lower(values: Sequence[float]) -> float:
        return float(np.quantile(values, 1 - config.quantile))

    return Limits(
        num_completions=len(ids),
        quantile=config.quantile,
        base_finishes=sum(reply.finished for reply in replies) >= config.quantile * len(replies),
        tail_nll_nats=upper(tails),
        rmse_nll_nats=upper([each.rmse_nll_nats for each in surprisals]),
        text=text_limits(figures, config.quantile),
        persona_share=upper([persona.share(text) for text in texts]),
        words_low=int(lower([figure.words for figure in figures])),
        words_high=int(np.ceil(upper([figure.words for figure in figures]))),
        base_tail_nll_nats=tuple(sorted(tails)),
    )
