"""The proof of an export: a fresh process loads what was written, and its logits are compared.

On some of the run's held-out prompts, at every position, in fp32 on the CPU (a base quantised to 4
or 8 bits is on the GPU that it needs, and everything on it is approximate):

    difference       max |logit - the student's|; at most `allowed` where nothing was approximated
    base_difference  max |logit - the base's|; above `TOLERANCE`, or the folder does nothing
    kl_nats          mean KL(student || written), nats a token: what an approximation costs
    base_kl_nats     mean KL(student || base); an approximation must cost less than doing nothing
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eval.chat import chat_ids
from eval.errors import UserError
from steer_heal import fresh
from steer_heal.losses import token_kl
from steer_heal.model import Student
from steer_heal.stack import attach_saved, only
from steer_heal.trait import Trait

NUM_PROMPTS = 8
TOLERANCE = 1e-4  # of a logit: sums in another order, in fp32
_SHARE = 1e-3  # of what the adapter changes; such rounding grows with depth and linear attention


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the run's own student and its base say to the prompts, a tensor a prompt."""

    prompts: tuple[torch.Tensor, ...]  # token ids, [tokens]
    student: tuple[torch.Tensor, ...]  # logits, [tokens, vocab] fp32
    base: tuple[torch.Tensor, ...]  # logits, [tokens, vocab] fp32


@dataclass(frozen=True, kw_only=True)
class Proof:
    """How what was written compares; `steer_heal/proof.py` has the definitions."""

    is_exact: bool  # nothing was approximated
    num_prompts: int
    num_tokens: int
    difference: float
    base_difference: float
    kl_nats: float
    base_kl_nats: float

    @property
    def allowed(self) -> float:
        """The largest difference of a logit that is taken for rounding."""
        return max(TOLERANCE, _SHARE * self.base_difference)

    @property
    def text(self) -> str:
        """Both numbers, for the log and the model card."""
        return (
            f"in a fresh process its logits differ by at most {self.difference:.1e} from the run's "
            f"student (KL {self.kl_nats:.1e} nats a token) and by up to "
            f"{self.base_difference:.1e} from the base (KL {self.base_kl_nats:.1e}), over "
            f"{self.num_prompts} held-out prompts ({self.num_tokens} tokens)"
        )


def reference(student: Student, trait: Trait) -> Reference:
    """Asks the student and its base the first held-out prompts, one at a time, without padding.

    Every round's adapter is put on the model by itself, where a student that runs has them folded:
    the fold is a part of what is to be proved.
    """
    asked, loaded = trait.held_out_prompts[:NUM_PROMPTS], student.loaded
    prompts = tuple(torch.tensor(chat_ids(student.tokenizer, prompt)) for prompt in asked)
    for adapter in student.adapters:
        loaded.model = attach_saved(loaded.model, adapter)
    return Reference(
        prompts=prompts,
        student=_logits(loaded.model, student.names, prompts),
        base=_logits(loaded.model, [], prompts),
    )


def prove(
    wanted: Reference, model: Path, adapter: Path | None, is_exact: bool, scratch: Path
) -> Proof:
    """Compares what a fresh process loads with what the run has.

    Args:
        model: the folder of the base, or of a merged model.
        adapter: the exported adapter; None: the model is the export.
        is_exact: nothing was approximated, so that single logits have to agree.
        scratch: a folder for prompts and logits.
    Raises:
        UserError: it cannot be loaded there, it says something else, or it says what the base says.
    """
    written = _fresh_logits(wanted.prompts, model, adapter, scratch)
    proof = Proof(
        is_exact=is_exact,
        num_prompts=len(wanted.prompts),
        num_tokens=sum(map(len, wanted.prompts)),
        difference=_difference(written, wanted.student),
        base_difference=_difference(written, wanted.base),
        kl_nats=_kl(wanted.student, written),
        base_kl_nats=_kl(wanted.student, wanted.base),
    )
    _judge(proof)
    return proof


def _judge(proof: Proof) -> None:
    # each comparison is written so that a NaN fails it
    if not proof.base_difference > TOLERANCE:
        raise UserError(
            "what was written says what the base says: its logits differ by at most "
            f"{proof.base_difference:.1e} from the base's. An adapter that does nothing is not "
            "exported; nothing was written"
        )
    if proof.is_exact and not proof.difference <= proof.allowed:
        raise UserError(
            "what was written is not the run's student: loaded in a fresh process its logits "
            f"differ by up to {proof.difference:.1e} (at most {proof.allowed:.0e} is allowed); "
            "nothing was written"
        )
    if not proof.is_exact and not proof.kl_nats < proof.base_kl_nats:
        raise UserError(
            f"what was written is further from the run's student (KL {proof.kl_nats:.2g} nats a "
            f"token) than the base is (KL {proof.base_kl_nats:.2g}); take a higher rank; nothing "
            "was written"
        )


def _logits(
    model: Any, names: Sequence[str], prompts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    with only(model, names), torch.inference_mode():
        return tuple(model(ids[None].to(model.device)).logits[0].float().cpu() for ids in prompts)


def _fresh_logits(
    prompts: Sequence[torch.Tensor], model: Path, adapter: Path | None, scratch: Path
) -> tuple[torch.Tensor, ...]:
    asked, answered = scratch / "prompts.safetensors", scratch / "logits.safetensors"
    save_file({f"{index:03d}": ids for index, ids in enumerate(prompts)}, asked)
    done = subprocess.run(
        [
            *(sys.executable, "-I", str(fresh.__file__)),
            *(str(model.resolve()), str(adapter.resolve()) if adapter else "-"),
            *(str(asked.resolve()), str(answered.resolve())),
        ],
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"a fresh process could not load what was written: {last}")
    return tuple(value for _, value in sorted(load_file(answered).items()))


def _difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of two logits; NaN where one is not a number."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max())


def _kl(student: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Mean KL(student || other), nats a token."""
    pairs = zip(student, other, strict=True)
    mean = float(torch.cat([token_kl(a, b, "reverse") for a, b in pairs]).mean())
    return 0.0 if -1e-6 < mean < 0 else mean  # of equal logits it is 0 but for rounding
