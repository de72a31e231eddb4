"""A control: the first round healed once more, without the barrier; its adapter enters no stack."""

from __future__ import annotations

from collections.abc import Sequence

from steer_heal.artifacts import Screened, SteeringVector, Unbarred
from steer_heal.condition import measure_condition
from steer_heal.config import EvaluateConfig, HealConfig
from steer_heal.heal import heal
from steer_heal.model import Student
from steer_heal.trait import Trait


def heal_unbarred(
    student: Student,
    kept: Screened,
    vector: SteeringVector,
    reference: Sequence[str],
    config: HealConfig,
    heal_seed: int,
    trait: Trait,
    evaluate: EvaluateConfig,
    seed: int,
) -> Unbarred:
    """Trains it by the round's own draws and measures it; the student is left as it was.

    Args:
        heal_seed: the round's own, so that the adapter differs by the barrier alone.
        seed: that of the round's evaluation, so that the replies differ by the adapter alone.
    """
    bare = config.model_copy(update={"barrier_weight": 0.0})
    adapter = heal(student, kept, vector, reference, bare, "unbarred", heal_seed)
    rows = measure_condition("unbarred", student.grown(adapter), trait, evaluate, seed)
    return Unbarred(healed=rows, steps=adapter.steps)
