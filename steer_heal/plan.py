"""The memory plan of a run: what it will take, counted from shapes before a weight is read.

The doctor counts the same of the loaded model, and at a run's end the peak stands beside it.
"""

from __future__ import annotations

from loguru import logger

from eval.errors import UserError
from steer_heal.batch_sizes import TEMPLATE_TOKENS, longest, settled
from steer_heal.config import RunConfig
from steer_heal.memory import Memory, estimate_memory
from steer_heal.model import Student, outline_student
from steer_heal.reach import adapter_reach
from steer_heal.trait import Trait

LESS = "smaller generate.batch_size and heal.batch_size, or a smaller model"


def plan_memory(config: RunConfig, trait: Trait) -> None:
    """Tells what a run will take; the model is not loaded.

    Raises:
        UserError: the model alone does not fit, or cannot be read.
    """
    student = outline_student(config.model, config.device)
    need = needed_memory(student, trait, settled(student, trait, config))
    if not need.model_fits:
        raise UserError(
            f"model {config.model}: memory: {need}; the model alone does not fit: take a smaller "
            "one, one in 4 bits (on a GPU), or a machine with more"
        )
    if need.is_tight:
        logger.warning("memory: {}; {}", need, LESS)
    else:
        logger.info("memory: {}", need)


def needed_memory(student: Student, trait: Trait, config: RunConfig) -> Memory:
    """What a run with this config takes.

    Args:
        student: the base, with its weights or without.
        config: with numbers of rows, not auto.
    """
    tokens = longest(student.tokenizer, trait.prompts) + TEMPLATE_TOKENS
    modules = adapter_reach(student, config.heal.layers).modules
    return estimate_memory(student, modules, tokens, config.generate, config.heal)
