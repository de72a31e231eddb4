"""Rows at a time where the settings say auto: by the memory that is free, once a run.

    rows = the largest power of two that fits at the longest length, at most 512 (`memory.py`)

Nothing is timed, so that the same machine chooses the same. What was chosen is kept with the run,
which goes on with it on any machine; a batch that does not fit there is halved (`eval.batching`).
"""

from __future__ import annotations

from typing import Any

from loguru import logger

from eval.chat import text_ids
from eval.suite import ForcedChoiceSuite, load_suite
from steer_heal.artifacts import BatchSizes
from steer_heal.config import RunConfig
from steer_heal.memory import rows_that_fit
from steer_heal.model import Student
from steer_heal.stages import Stages
from steer_heal.trait import Trait

TEMPLATE_TOKENS = 64  # of markers, and a default system prompt, around a prompt


def settle_batches(run: Stages, student: Student, trait: Trait, config: RunConfig) -> RunConfig:
    """The config with numbers in the place of auto: those of the run where it has them."""
    if not _is_open(config):
        return config
    chosen = run.once(
        BatchSizes,
        lambda *_: choose_batch_sizes(student, trait, config),
        *(student, trait, config.generate, config.evaluate),
    )
    logger.info("batches: {} drafts, {} rows of evaluation", chosen.generate, chosen.evaluate)
    return _with(config, chosen)


def settled(student: Student, trait: Trait, config: RunConfig) -> RunConfig:
    """The same apart from any run."""
    if not _is_open(config):
        return config
    return _with(config, choose_batch_sizes(student, trait, config))


def choose_batch_sizes(student: Student, trait: Trait, config: RunConfig) -> BatchSizes:
    """What fits; a number that was given stays."""
    tokenizer, generate, evaluate = student.tokenizer, config.generate, config.evaluate
    suite = load_suite(evaluate.suite, ForcedChoiceSuite)
    around = [suite.question, suite.schema_head, *suite.options.values(), suite.nudge]
    asked = longest(tokenizer, [item.text for item in suite.items])
    asked += sum(len(text_ids(tokenizer, text)) for text in around)
    held_out = longest(tokenizer, trait.held_out_prompts) + evaluate.max_new_tokens  # said before
    tokens = {
        "generate": longest(tokenizer, trait.prompts) + TEMPLATE_TOKENS,
        "evaluate": max(asked, held_out)
        + longest(tokenizer, [trait.engineered_prompt])
        + 2 * TEMPLATE_TOKENS,
    }
    sizes = {
        name: rows_that_fit(student, tokens[name], stage.max_new_tokens)
        if stage.batch_size == "auto"
        else stage.batch_size
        for name, stage in (("generate", generate), ("evaluate", evaluate))
    }
    return BatchSizes(**sizes)


def longest(tokenizer: Any, texts: Any) -> int:
    """Tokens of the longest of these texts."""
    return max(len(text_ids(tokenizer, text)) for text in texts)


def _is_open(config: RunConfig) -> bool:
    return "auto" in (config.generate.batch_size, config.evaluate.batch_size)


def _with(config: RunConfig, chosen: BatchSizes) -> RunConfig:
    generate, evaluate = (
        stage.model_copy(update={"batch_size": size})
        for stage, size in (
            (config.generate, chosen.generate),
            (config.evaluate, chosen.evaluate),
        )
    )
    return config.model_copy(update={"generate": generate, "evaluate": evaluate})
