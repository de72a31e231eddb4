"""What is added to a student while a condition is measured: the vector, or a random direction.

kl = mean over tokens of completions kept in the round of KL(steered || student), nats; a random
     direction is steered at the dose whose kl is the vector's
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from eval.errors import UserError
from steer_heal.artifacts import Screened, SteeringVector
from steer_heal.model import Student
from steer_heal.scoring import steered_kl_nats

_NUM_KL_ROWS = 16  # completions that a KL is averaged over
_KL_TOLERANCE = 0.05  # as a share: the dose is right to about half of that
_LEAST_KL_NATS = 1e-12
_LONGEST_STEP = math.log(4)  # of a dose, one search step
_MOST_STEPS = 12  # the embedded model takes 3 or 4


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Directions added to a band of layers, and how far they move the next-token distribution."""

    band: tuple[int, ...]  # layers
    directions: torch.Tensor  # [band layers, hidden]
    dose: float
    kl_nats: float


def vector_steering(
    student: Student, vector: SteeringVector, kept: Screened, batch_size: int
) -> Steering:
    """The vector at the mean dose of what was kept."""
    dose = kept.mean_kept_dose
    kl = _kl_nats(student, vector.band, vector.band_directions, kept, batch_size, dose)
    return Steering(band=vector.band, directions=vector.band_directions, dose=dose, kl_nats=kl)


def random_steerings(
    student: Student,
    vector: SteeringVector,
    kept: Screened,
    batch_size: int,
    count: int,
    seed: int,
) -> Iterator[Steering]:
    """Random directions with the vector's norms, each at the dose of the vector's own KL.

    Raises:
        UserError: no dose is found that reaches it.
    """
    reach_nats = vector_steering(student, vector, kept, batch_size).kl_nats
    for draw in range(count):
        directions = random_like(vector.band_directions, _seed_of(seed, draw))
        dose, kl = _matching_dose(student, vector, directions, kept, batch_size, reach_nats)
        yield Steering(band=vector.band, directions=directions, dose=dose, kl_nats=kl)


def random_like(directions: torch.Tensor, seed: int) -> torch.Tensor:
    """Directions drawn at random, each with the norm of one that is given: [layers, hidden]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(directions.shape, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True) * directions.norm(dim=-1, keepdim=True)


def _seed_of(seed: int, draw: int) -> int:
    """A seed of its own for each draw."""
    return int(np.random.SeedSequence((seed, draw)).generate_state(1)[0])


def _kl_nats(
    student: Student,
    band: tuple[int, ...],
    directions: torch.Tensor,
    kept: Screened,
    batch_size: int,
    dose: float,
) -> float:
    """Mean over tokens of KL(steered || student) on the round's completions."""
    rows = kept.kept[:_NUM_KL_ROWS]
    kl = steered_kl_nats(
        student,
        band,
        directions,
        [row.prompt_ids for row in rows],
        [row.token_ids for row in rows],
        [dose] * len(rows),
        batch_size,
    )
    return float(torch.cat(kl).mean())


def _matching_dose(
    student: Student,
    vector: SteeringVector,
    directions: torch.Tensor,
    kept: Screened,
    batch_size: int,
    reach_nats: float,
) -> tuple[float, float]:
    """The dose at which other directions reach a KL, and the KL there (a secant on logs).

    Raises:
        UserError: no such dose is found.
    """
    if reach_nats == 0:
        return 0.0, 0.0
    log_dose, exponent = math.log(kept.mean_kept_dose), 2.0  # KL ~ dose ** exponent, where small
    before: tuple[float, float] | None = None
    for _ in range(_MOST_STEPS):
        dose = math.exp(log_dose)
        found = _kl_nats(student, vector.band, directions, kept, batch_size, dose)
        if abs(found - reach_nats) <= _KL_TOLERANCE * reach_nats:
            return dose, found
        log_kl = math.log(max(found, _LEAST_KL_NATS))
        if before is not None:
            slope = (log_kl - before[1]) / (log_dose - before[0])
            exponent = min(max(slope, 0.5), 8.0)
        before = (log_dose, log_kl)
        step = (math.log(reach_nats) - log_kl) / exponent
        log_dose += min(max(step, -_LONGEST_STEP), _LONGEST_STEP)
    raise UserError(
        f"a random direction does not reach the vector's KL of {reach_nats:.3g} nats at any dose "
        f"tried, the last {dose:.3g}: the model does not read the steered layers"
    )
