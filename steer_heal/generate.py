"""Steered sampling: the drafts of a round, completions of the student with `dose * v` added.

    prompt[k] = prompts[(k // doses) % prompts],  dose[k] = doses[k % doses]

so that every dose meets every prompt as often as any other. How a dose acts is in `drafts.py`,
which doses there are is decided in `dose.py`.
"""

from __future__ import annotations

from steer_heal.artifacts import Completions, Doses, SteeringVector
from steer_heal.config import GenerateConfig
from steer_heal.drafts import sample_steered
from steer_heal.model import Student
from steer_heal.trait import Trait


def generate_steered(
    student: Student,
    vector: SteeringVector,
    doses: Doses,
    trait: Trait,
    config: GenerateConfig,
    seed: int,
) -> Completions:
    """Samples `config.num_drafts` completions, prompts and doses in turn."""
    taken, drafts = doses.doses, range(config.num_drafts)
    prompts = [(draft // len(taken)) % len(trait.prompts) for draft in drafts]
    rows_doses = [taken[draft % len(taken)] for draft in drafts]
    rows = sample_steered(
        student, vector, trait, prompts, rows_doses, config, seed, "steered drafts"
    )
    return Completions(rows=rows)
