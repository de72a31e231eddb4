"""The steering vector: mean difference of hidden states under two opposite personas.

    v[l] = mean_i( h_l(positive, x_i) - h_l(negative, x_i) )

h_l(persona, x): output of decoder layer l at the last prompt token (the assistant tag), with the
persona as system prompt and x as user turn. Raw norm; adding +v moves towards the positive persona.
Source: Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation Addition"
(arXiv:2312.06681). Departs from it: the contrast is in the system prompt, not in a given answer
letter, and the band is narrow (45 % to 55 % of depth): the same vector over a broad band destroys
the text at a fraction of the dose.

As a control the direction can be drawn at random instead, with the norms of the mean difference,
the same in all rounds of a run: what such a run comes to is not owed to steering along the trait.
Or it is a vector from elsewhere, whose cosine with the mean difference is told.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from loguru import logger

from eval.chat import chat_ids
from eval.errors import UserError
from steer_heal.artifacts import SteeringVector
from steer_heal.config import VectorConfig
from steer_heal.imported import ImportedVector
from steer_heal.model import Student
from steer_heal.scoring import last_states
from steer_heal.steering import random_like
from steer_heal.trait import Trait

_LEAST_SHARE = 1e-5  # of the hidden state's norm; fp32 rounding is 1e-7, a persona 1e-2 and more


def extract_vector(
    student: Student,
    trait: Trait,
    config: VectorConfig,
    seed: int,
    direction_seed: int = 0,
    given: ImportedVector | None = None,
) -> SteeringVector:
    """Takes the vector from the student over up to `config.num_contexts` of the trait's contexts.

    Args:
        seed: of the contexts that are taken.
        direction_seed: of a random direction, where `config.direction` asks for one.
        given: stands in the place of the mean difference.
    Raises:
        UserError: a hidden state is not finite, or the two personas give the same states.
    """
    count = min(config.num_contexts, len(trait.contexts))
    contexts = random.Random(seed).sample(trait.contexts, count)
    prompts = [
        chat_ids(student.tokenizer, context, persona)
        for persona in (trait.positive, trait.negative)
        for context in contexts
    ]
    states = last_states(student, prompts, config.batch_size, "vector")
    positive, negative = states[:count], states[count:]  # [pairs, layers, hidden] each
    differences = positive - negative
    directions = differences.mean(0)  # [layers, hidden]
    norms = directions.norm(dim=-1)
    if not norms.isfinite().all():
        layer = int((~norms.isfinite()).nonzero()[0])
        raise UserError(
            f"the hidden states of layer {layer} are not finite: the model overflows in its "
            "number format or its weights are damaged"
        )
    band = student.band(config.band) if given is None else given.band
    residual_norms = states.norm(dim=-1).mean(0)  # [layers]
    _require_contrast(norms / residual_norms, band)
    if config.direction == "random":
        directions = random_like(directions, direction_seed)
    elif given is not None:
        found, directions = directions, given.filled(len(directions))
        norms = directions.norm(dim=-1)
        _tell_cosine(directions[band], found[band])
    return SteeringVector(
        directions=directions.contiguous(),
        band=tuple(band),
        norms=tuple(norms.tolist()),
        residual_norms=tuple(residual_norms.tolist()),
        auc=tuple(_held_out_auc(positive, negative).tolist()),
        pairwise_cosine=tuple(_pairwise_cosine(differences).tolist()),
        num_pairs=count,
        weights_hash=student.loaded.weights_hash,
    )


def _require_contrast(relative: torch.Tensor, band: Sequence[int]) -> None:
    """Refuses a vector that is nothing, or rounding, where it would be added.

    Args:
        relative: its norm as a share of the hidden state's: [layers].
    """
    if float(relative[-1]) == 0:
        raise UserError("both personas give the same hidden states: does the template drop them?")
    if float(relative[list(band)].max()) < _LEAST_SHARE:
        raise UserError(
            f"both personas give the same hidden states in the layers {list(band)}, which are "
            "steered: what attends there does not reach back to the persona (a short sliding "
            "window, linear attention that forgets); take a later vector.band"
        )


def _tell_cosine(given: torch.Tensor, found: torch.Tensor) -> None:
    """Says how near a vector from elsewhere is to the personas' own: [band layers, hidden] both."""
    cosine = float(torch.nn.functional.cosine_similarity(given.flatten(), found.flatten(), dim=0))
    logger.info("vector.file: cosine {:.2f} with the personas' mean difference", cosine)
    if cosine < 0:
        logger.warning(
            "vector.file points away from the positive persona (cosine {:.2f}): swap the personas, "
            "or turn its sign, if that is not meant",
            cosine,
        )


def _held_out_auc(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """AUC a layer of telling the personas apart along a direction taken from the other half.

    [pairs, layers, hidden] twice -> [layers]; the mean of both halves. Projections on a direction
    that was fitted to the same pairs would be told apart even where there is nothing.
    """
    halves = []
    for first in (0, 1):
        fit, test = slice(first, None, 2), slice(1 - first, None, 2)
        direction = (positive[fit] - negative[fit]).mean(0)  # [layers, hidden]
        up = (positive[test] * direction).sum(-1)  # [pairs / 2, layers]
        down = (negative[test] * direction).sum(-1)
        halves.append((up[:, None] > down[None]).float().mean((0, 1)))
    return (halves[0] + halves[1]) / 2


def _pairwise_cosine(differences: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the differences of two pairs: [pairs, layers, hidden] -> [layers]."""
    unit = torch.nn.functional.normalize(differences, dim=-1)
    count = len(unit)
    return (unit.sum(0).square().sum(-1) - count) / (count * (count - 1))
