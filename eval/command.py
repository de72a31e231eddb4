"""The command behind `python -m eval`: from a model's name to the text that is printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from eval.files import digest_of
from eval.kinds import kind_of
from eval.loading import load_model
from eval.model_files import find_model, local_model, weights_hash
from eval.probe import ProbeConfig, probe
from eval.settings import resolve_settings


def evaluate_model(model_id: str, settings: Sequence[str], folder: Path | None = None) -> str:
    """Evaluates a model; returns its figures as text.

    Args:
        folder: where the model is, if its id does not say so.
    Raises:
        UserError: a setting, a suite or a model that cannot be used.
    """
    config = resolve_settings(ProbeConfig, settings)
    local_model(folder or model_id)  # a missing folder is told before the hub is asked for items,
    suite = config.load()  # and a bad suite before a large model is fetched and loaded
    found = find_model(folder or model_id)
    model, tokenizer = load_model(found, model_id, config.device)
    name = evaluation_name(model_id, config)
    subject = {"model": model_id, "weights": weights_hash(found)}
    _, summary = probe(model, tokenizer, suite, config, subject, name)
    return f"{kind_of(suite).summary_text(summary)}\nrows: {Path(config.folder) / name}"


def evaluation_name(subject: str, config: ProbeConfig) -> str:
    """A folder's name that tells other models, suites, system prompts and thinks apart."""
    suite = Path(config.suite).stem if config.suite.endswith(".json") else config.suite
    parts = [Path(subject).name if Path(subject).is_dir() else subject, suite]
    if config.items:
        others = f"+{len(config.items) - 1}" if len(config.items) > 1 else ""
        parts.append(config.items[0].stem + others)
    if config.system is not None:
        parts.append(f"system-{digest_of([config.system])[:8]}")
    if config.think:
        parts.append(f"think{config.think}")
    if config.samples > 1:
        parts.append(f"samples{config.samples}-seed{config.seed}")
    return re.sub(r"[^\w.@+-]+", "_", "--".join(parts))
