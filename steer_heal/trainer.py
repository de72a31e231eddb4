"""The trainer of the heal stage: TRL's SFT trainer with the barrier and the steered teacher.

Three passes through the same modules, told apart by what acts: the student (all adapters), the
reference (those of earlier rounds, or none) and the teacher (those of earlier rounds, and the
steering vector at the dose that a row was sampled with, then guided away from the same without
the vector). Logits are computed at completion positions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eval.errors import UserError
from steer_heal.config import HealConfig
from steer_heal.hooks import add_vector
from steer_heal.losses import barrier, guided, row_divergence, token_kl
from steer_heal.stack import only


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The student before the round, steered."""

    adapters: list[str]  # that act in it
    layers: Sequence[nn.Module]  # that are steered
    directions: torch.Tensor  # added there, times a row's dose: [layers, hidden]


class DoseCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which drops columns it does not know, with a row's dose: [rows]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        doses = torch.tensor([example["dose"] for example in examples])
        return super().torch_call(examples) | {"dose": doses}


class HealTrainer(SFTTrainer):
    """TRL's SFT trainer with barrier and soft targets; trains the parameters that require grad."""

    loss_is_scaled_for_ga: Any = (
        True  # `num_items_in_batch` already spans the accumulated micro-batches
    )

    def __init__(
        self,
        *args: Any,
        heal: HealConfig,
        reference: list[str],
        teacher: Teacher,
        **kwargs: Any,
    ) -> None:
        self.heal = heal
        self.reference = reference  # adapters that act in the reference
        self.teacher = teacher
        self.records: list[dict[str, float]] = []  # one a micro-batch
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Legend: N completion tokens of the batch, V vocabulary, R rows."""
        heal = self.heal
        labels = inputs["labels"][:, 1:]
        mask = labels != -100  # [R, tokens - 1]
        inner = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            student = self._logits(model, inputs, mask)  # [N, V]
            with torch.no_grad(), only(inner, self.reference):
                reference = self._logits(model, inputs, mask)  # [N, V]
        tokens = num_items_in_batch if num_items_in_batch is not None else mask.sum()
        nll = F.cross_entropy(student, labels[mask], reduction="sum") / tokens
        soft = self._soft(model, inputs, mask, student, reference) / tokens
        kl = token_kl(student, reference, heal.barrier_direction)  # [N]
        divergence = row_divergence(kl, mask.sum(1).tolist(), heal.barrier_aggregate)  # [R]
        over = barrier(divergence, heal.barrier_threshold_nats)
        loss = heal.nll_weight * nll + heal.soft_weight * soft + heal.barrier_weight * over
        self._record(loss, nll, soft, divergence, over)
        return (loss, None) if return_outputs else loss

    def _soft(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        mask: torch.Tensor,
        student: torch.Tensor,
        reference: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over completion tokens of KL(guided teacher || student), nats: []."""
        if self.heal.soft_weight == 0:
            return student.new_zeros(())
        inner, teacher = self.accelerator.unwrap_model(self.model), self.teacher
        vector = add_vector(teacher.layers, teacher.directions, inputs["dose"])
        with torch.no_grad(), only(inner, teacher.adapters), self.accelerator.autocast():
            known = self.reference == teacher.adapters
            plain = reference if known else self._logits(model, inputs, mask)  # [N, V]
            with vector:
                steered = self._logits(model, inputs, mask)  # [N, V]
        return token_kl(student, guided(steered, plain, self.heal.guidance), "forward").sum()

    def _logits(
        self, model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """fp32 logits at the positions that predict a completion token: [N, V]."""
        out = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            output_hidden_states=[-1],  # after the final norm
            logits_to_keep=1,
        )
        inner = self.accelerator.unwrap_model(self.model).get_base_model()
        return project(inner, out.hidden_states[-1][:, :-1][mask]).float()

    def _record(
        self,
        loss: torch.Tensor,
        nll: torch.Tensor,
        soft: torch.Tensor,
        divergence: torch.Tensor,
        over: torch.Tensor,
    ) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"the heal loss is {value} at step {self.state.global_step}: try a smaller "
                "heal.learning_rate"
            )
        threshold = self.heal.barrier_threshold_nats
        self.records.append(
            {
                "loss": value,
                "nll_nats": float(nll.detach()),
                "soft_nats": float(soft.detach()),
                "kl_nats": float(divergence.detach().mean()),
                "barrier_nats": float(over.detach()),
                "share_over": float((divergence.detach() > threshold).float().mean()),
            }
        )


class StepLog(TrainerCallback):
    """Keeps the gradient norm and the learning rate of every optimizer step; draws the bar."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.bar = tqdm(desc="heal", unit="step", leave=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.reset(total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.rows.append({key: float(logs[key]) for key in ("grad_norm", "learning_rate")})


def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits from hidden states after the final norm, with the family's own scale and soft cap."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    scales = (getattr(config, key, None) for key in _SCALES)
    scale = next((value for value in scales if value is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        inverse = config.model_type != "hyperclovax"  # Granite and MiniCPM3 divide by it
        scale = 1 / config.logits_scaling if inverse else config.logits_scaling
    if scale is not None:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
