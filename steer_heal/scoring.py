"""What is read off a student: scores of completions, KL of steering, hidden states.

    enactment = ( log p(completion | positive, x) - log p(completion | negative, x) ) / tokens

How much of the trait a completion carries, nats a token, with no judge and no label: it tells a
completion that is merely base-like (near 0) from one that acts the trait (above 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from eval.batching import batches
from eval.chat import chat_ids
from eval.coherence import Surprisal, TextFigures, surprisal, text_figures
from eval.errors import UserError
from eval.logits import completion_ends, end_logits, token_logprobs
from eval.processes import spread
from steer_heal.hooks import add_vector, record_last
from steer_heal.losses import token_kl
from steer_heal.model import Student
from steer_heal.trait import Trait


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is known of one completion."""

    surprisal: Surprisal  # under the base, no system prompt
    figures: TextFigures
    enactment_nats: float  # a token


def score_completions(
    student: Student,
    trait: Trait,
    prompts: Sequence[str],
    completions: Sequence[Sequence[int]],
    batch_size: int,
    followings: Sequence[Sequence[int]] | None = None,
) -> list[Scores]:
    """Scores of completions (token ids) to user turns, one each, under the student's base.

    Args:
        followings: token ids that stand between the first assistant tag and the completion, [rows]
            [tokens]: an earlier reply and the next user turn. None: nothing does.
    Raises:
        UserError: a log-probability is not finite.
    """
    tokenizer = student.tokenizer
    neutral, positive, negative = (
        _base_logprobs(student, prompts, completions, batch_size, followings, *about)
        for about in (
            ("surprisal", "no", None),
            ("enactment +", "the positive", trait.positive),
            ("enactment -", "the negative", trait.negative),
        )
    )
    return [
        Scores(
            surprisal=surprisal(neutral[row]),
            figures=text_figures(tokenizer.decode(ids, skip_special_tokens=True)),
            enactment_nats=float((positive[row] - negative[row]).mean()),
        )
        for row, ids in enumerate(completions)
    ]


def base_surprisals(
    student: Student,
    prompts: Sequence[str],
    completions: Sequence[Sequence[int]],
    batch_size: int,
    followings: Sequence[Sequence[int]] | None = None,
) -> list[Surprisal]:
    """The surprisal alone of what `score_completions` scores, at a third of the cost."""
    about = ("surprisal", "no", None)
    logprobs = _base_logprobs(student, prompts, completions, batch_size, followings, *about)
    return [surprisal(row) for row in logprobs]


def _base_logprobs(
    student: Student,
    prompts: Sequence[str],
    completions: Sequence[Sequence[int]],
    batch_size: int,
    followings: Sequence[Sequence[int]] | None,
    label: str,
    which: str,
    persona: str | None,
) -> list[torch.Tensor]:
    """Log-probability of every completion token under the base with a persona, nats: [tokens]."""
    tokenizer = student.tokenizer
    between = followings if followings is not None else [()] * len(prompts)
    encoded = [
        [*chat_ids(tokenizer, prompt, persona), *following]
        for prompt, following in zip(prompts, between, strict=True)
    ]
    with student.base.running() as model:
        rows = token_logprobs(
            model, tokenizer.pad_token_id, encoded, completions, batch_size, label
        )
    broken = [index for index, row in enumerate(rows) if not bool(row.isfinite().all())]
    if broken:  # NaN would pass every threshold of the filter
        raise UserError(
            f"log-probabilities of {len(broken)} of {len(rows)} completions under the base "
            f"with {which} persona are not finite: the model overflows in its number format "
            "or its weights are damaged"
        )
    return rows


def steered_kl_nats(
    student: Student,
    band: Sequence[int],
    directions: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    doses: Sequence[float],
    batch_size: int,
    label: str | None = None,
) -> list[torch.Tensor]:
    """KL(steered || student) at every token of the completions, nats.

    Args:
        band: layers that are steered.
        directions: what is added there, times a row's dose: [band layers, hidden].
        prompts, completions: token ids, [rows][tokens].
    Returns:
        One fp32 tensor [completion tokens] a row, on the CPU.
    """
    layers = [student.loaded.layers[index] for index in band]
    pad_id = student.tokenizer.pad_token_id

    def measure(rows: list[int]) -> list[torch.Tensor]:
        dose = [doses[row] for row in rows]

        def steering(some: list[int]) -> AbstractContextManager[None]:
            return add_vector(layers, directions, torch.tensor([dose[at] for at in some]))

        said = [completions[row] for row in rows]
        # a prompt is steered, too
        ends = completion_ends([prompts[row] for row in rows], said, dose)
        result = [torch.empty(0)] * len(rows)
        plain = end_logits(model, ends, batch_size, pad_id, label)
        steered = end_logits(model, ends, batch_size, pad_id, None, steering)
        for (at, before), (same, after) in zip(plain, steered, strict=True):
            assert at == same
            result[at] = token_kl(after[:-1], before[:-1], "reverse").cpu()
        return result

    with student.running() as model, torch.inference_mode():
        return spread(measure, [(doses[row], tuple(p)) for row, p in enumerate(prompts)])


@torch.inference_mode()
def last_states(
    student: Student,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    label: str | None = None,
) -> torch.Tensor:
    """Every layer's output at the last token (the assistant tag): [prompts, layers, hidden], fp32.

    Args:
        prompts: token ids, [prompts][tokens].
    """
    pad_id, layers = student.tokenizer.pad_token_id, student.loaded.layers

    def read(rows: list[int]) -> list[torch.Tensor]:
        result: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        chosen = [prompts[row] for row in rows]
        for batch in batches(chosen, batch_size, pad_id, model.device, label):
            with record_last(layers) as states:
                model(**batch.inputs, logits_to_keep=1, use_cache=False)
            for at, state in zip(batch.rows, torch.stack(states, 1), strict=True):
                result[at] = state  # [layers, hidden]
        return result

    with student.running() as model:
        found = spread(read, [tuple(prompt) for prompt in prompts])
    return torch.stack(found).clone()  # out of inference mode
