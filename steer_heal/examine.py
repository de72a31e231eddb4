"""`steer-heal eval`: the probe on a model, on the embedded model, or on what a run made.

Of a run, its model before and after: the base, and the student of all its finished rounds, on the
same items, with the paired differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.command import evaluate_model, evaluation_name
from eval.kinds import kind_of
from eval.probe import ProbeConfig, probe
from eval.settings import resolve_settings
from steer_heal.config import ORGANISM
from steer_heal.model import load_student
from steer_heal.model_folder import ORGANISM_FOLDER
from steer_heal.rounds import RUN_FILE, Run
from steer_heal.saved import Description, read_saved_run


def examine(subject: str, settings: Sequence[str]) -> str:
    """Evaluates a model or a run; returns its figures as text.

    Args:
        subject: `organism`, a folder with a model, a Hub id, or a run (its folder, or its name in
            rounds/).
    Raises:
        UserError: a setting, a suite, a model or a run that cannot be used.
    """
    if subject == ORGANISM:
        return evaluate_model(subject, settings, ORGANISM_FOLDER)
    for folder in (Path(subject), Path("rounds") / subject):
        if (folder / RUN_FILE).is_file():
            return _examine_run(folder, resolve_settings(ProbeConfig, settings))
    return evaluate_model(subject, settings)


def _examine_run(path: Path, config: ProbeConfig) -> str:
    suite = config.load()  # a bad suite is told before a large model is loaded
    kind = kind_of(suite)
    saved = read_saved_run(path)
    description: Description = saved.description
    stack = Run(path, description.config["seed"]).last_stack()
    student = load_student(description.config["model"], stack, config.device)
    results, lines = {}, []
    for name, each in (("base", student.base), (f"round {len(stack)}", student)):
        about = {"run": path.resolve().name, "digest": each.digest()}
        folder = evaluation_name(f"{about['run']}--{name.replace(' ', '-')}", config)
        with each.running() as model:
            results[name], summary = probe(model, student.tokenizer, suite, config, about, folder)
        lines += [
            f"{name}:",
            kind.summary_text(summary),
            f"rows: {Path(config.folder) / folder}",
            "",
        ]
    base, healed = results.values()
    lines.append(f"round {len(stack)} minus base, with 95 % bootstrap intervals over items:")
    lines.append(kind.difference_text(healed.rows, base.rows, saved.trait.intended))
    return "\n".join(lines)
