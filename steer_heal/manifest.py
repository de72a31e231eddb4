"""What is written down of a run before it begins: its name and its run.json."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.errors import UserError
from eval.files import digest_of
from eval.suite import ForcedChoiceSuite, NeutralSuite, TaskSuite, load_suite
from steer_heal import __version__
from steer_heal.config import RunConfig
from steer_heal.model_folder import check_model
from steer_heal.trait import Trait

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors")


def describe(config: RunConfig, trait: Trait) -> dict[str, Any]:
    """What run.json says, but for the hash of the model's weights.

    Raises:
        UserError: a model that needs no look at the hub to be known as missing, or a bad suite.
    """
    check_model(config.model)
    choices = load_suite(config.evaluate.suite, ForcedChoiceSuite)
    tasks = load_suite(config.evaluate.tasks, TaskSuite)
    neutral = load_suite(config.evaluate.neutral, NeutralSuite)
    if unknown := sorted(set(trait.intended) - set(choices.options)):
        raise UserError(
            f"trait {trait.name!r} is meant to move {unknown}, which suite {choices.name!r} does "
            f"not ask about (it has {list(choices.options)}); change the trait's [intended] or "
            "take another evaluate.suite"
        )
    return {
        "config": config.model_dump(mode="json"),
        "trait": trait.model_dump(mode="json"),
        "suites": digest_of(suite.model_dump_json() for suite in (choices, tasks, neutral)),
        "code": code_hash(),
        "version": __version__,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def run_path(config: RunConfig) -> Path:
    """Where a run lands: its name, or trait, model and seed."""
    trait = Path(config.trait).stem if config.pos is None else "own"
    default = re.sub(r"[^\w.@-]+", "_", f"{trait}--{config.model}--seed{config.seed}")
    return Path(config.folder) / (config.run or default)


def code_hash() -> str:
    """Hash of the source of both packages."""
    root = Path(__file__).parents[1]
    sources = sorted([*root.glob("steer_heal/**/*.py"), *root.glob("eval/**/*.py")])
    return digest_of(path.read_text(encoding="utf-8") for path in sources)
