"""The trainer of the heal stage: TRL's SFT trainer with the barrier and the steered teacher.

Three passes through the same modules, told apart by what acts: the student (all adapters), the
reference (those of earlier rounds, or none) and the teacher (those of earlier rounds, and the
steering vector at the dose that a row was sampled with, then guided away from the same without
the vector). Logits are computed at completion positions only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eval.bars import progress_bar
from eval.errors import UserError
from steer_heal.config import HealConfig
from steer_heal.hooks import add_vector
from steer_heal.losses import (
    auto_threshold,
    barrier,
    guided,
    row_divergence,
    spectral_norms,
    token_kl,
)
from steer_heal.stack import only, trained_factors

_RATIO_EVERY = 8  # steps with the barrier on


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
        reference: Sequence[str],
        teacher: Teacher,
        **kwargs: Any,
    ) -> None:
        self.heal = heal
        self.reference = list(reference)  # adapters that act in the reference
        self.teacher = teacher
        num_earlier = len(teacher.adapters)
        self.barrier_weight = heal.barrier_weight * (1 + num_earlier) ** -heal.barrier_decay
        self.num_barred = 0  # steps with the barrier on
        self.records: list[dict[str, float | None]] = []  # one a micro-batch
        super().__init__(*args, **kwargs)
        self.factors = trained_factors(self.model)
        generator = torch.Generator().manual_seed(self.args.seed)
        self.start = torch.randn(heal.rank, generator=generator).to(self.args.device)
        threshold = heal.barrier_threshold_nats
        self.threshold_nats = (
            auto_threshold(self._teacher_divergence()) if threshold == "auto" else threshold
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Legend: N completion tokens of the batch, V vocabulary, R rows."""
        heal = self.heal
        labels, mask = _targets(inputs)
        with self.accelerator.autocast():
            student = self._logits(model, inputs, mask)  # [N, V]
        reference = self._reference_logits(model, inputs, mask)  # [N, V]
        tokens = num_items_in_batch if num_items_in_batch is not None else mask.sum()
        nll = F.cross_entropy(student, labels[mask], reduction="sum") / tokens
        soft = self._soft(model, inputs, mask, student, reference) / tokens
        divergence = self._divergence(student, reference, mask)  # [R]
        over = barrier(divergence, self.threshold_nats)
        spectral = self._spectral()
        taught = heal.nll_weight * nll + heal.soft_weight * soft
        barred = self.barrier_weight * over
        loss = taught + barred + heal.spectral_weight * spectral
        self._record(
            loss=loss,
            nll_nats=nll,
            soft_nats=soft,
            kl_nats=divergence.mean(),
            barrier_nats=over,
            share_over=(divergence > self.threshold_nats).float().mean(),
            spectral_norm=spectral,
        )
        self.records[-1]["barrier_gradient_ratio"] = self._gradient_ratio(barred, taught)
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
        teacher = self._teacher_logits(model, inputs, mask, reference)
        return token_kl(student, teacher, "forward").sum()

    def _divergence(
        self, student: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """A row's aggregate divergence, nats: [R]."""
        kl = token_kl(student, reference, self.heal.barrier_direction)  # [N]
        return row_divergence(kl, mask.sum(1).tolist(), self.heal.barrier_aggregate)

    def _spectral(self) -> torch.Tensor:
        """Mean over modules of the largest singular value of alpha / rank * B A: []."""
        if self.heal.spectral_weight == 0:
            return self.start.new_zeros(())
        return self.heal.alpha / self.heal.rank * spectral_norms(self.factors, self.start).mean()

    @torch.no_grad()
    def _teacher_divergence(self) -> torch.Tensor:
        """The divergence of a student that says what the teacher says: [kept rows]."""
        dataset: Any = self.train_dataset
        rows, size = list(dataset), self.args.train_batch_size
        found = []
        for start in range(0, len(rows), size):
            inputs = self._prepare_inputs(self.data_collator(rows[start : start + size]))
            _, mask = _targets(inputs)
            reference = self._reference_logits(self.model, inputs, mask)
            teacher = self._teacher_logits(self.model, inputs, mask, reference)
            found.append(self._divergence(teacher, reference, mask))
        return torch.cat(found)

    @torch.no_grad()
    def _reference_logits(
        self, model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """[N, V]."""
        inner = self.accelerator.unwrap_model(self.model)
        with only(inner, self.reference), self.accelerator.autocast():
            return self._logits(model, inputs, mask)

    @torch.no_grad()
    def _teacher_logits(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        mask: torch.Tensor,
        reference: torch.Tensor,
    ) -> torch.Tensor:
        """Of the guided teacher, each row at its own dose: [N, V]."""
        inner, teacher = self.accelerator.unwrap_model(self.model), self.teacher
        vector = add_vector(teacher.layers, teacher.directions, inputs["dose"])
        with only(inner, teacher.adapters), self.accelerator.autocast():
            known = self.reference == teacher.adapters
            plain = reference if known else self._logits(model, inputs, mask)  # [N, V]
            with vector:
                steered = self._logits(model, inputs, mask)  # [N, V]
        return guided(steered, plain, self.heal.guidance)

    def _logits(
        self, model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """fp32 logits at the positions that predict a completion token: [N, V]."""
        inner = self.accelerator.unwrap_model(self.model).get_base_model()
        return completion_logits(model, inner, inputs, mask)

    def _gradient_ratio(self, barred: torch.Tensor, taught: torch.Tensor) -> float | None:
        """L2 norm of the barrier's gradient over that of what is taught, both weighted.

        In the first step with the barrier on and every eighth one after it: two more backward
        passes take 0.7 of such a step's time on the embedded model.
        """
        if not float(barred.detach()):
            return 0.0
        self.num_barred += 1
        if self.num_barred % _RATIO_EVERY != 1:
            return None
        parameters = [p for pair in self.factors for p in pair]
        barrier_norm, taught_norm = (
            _norm(torch.autograd.grad(part, parameters, retain_graph=True))
            for part in (barred, taught)
        )
        return barrier_norm / taught_norm if taught_norm else None

    def _record(self, **values: torch.Tensor) -> None:
        record = {key: float(value.detach()) for key, value in values.items()}
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"the heal loss is {record['loss']} at step {self.state.global_step}: try a "
                "smaller heal.learning_rate"
            )
        self.records.append({**record, "threshold_nats": self.threshold_nats})


class StepLog(TrainerCallback):
    """Keeps the gradient norm and the learning rate of every optimizer step; draws the bar.

    To be entered around the training: the bar is gone after it, however it ends.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._shown = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = self._shown.enter_context(progress_bar(state.max_steps, "heal"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.rows.append({key: float(logs[key]) for key in ("grad_norm", "learning_rate")})


def _targets(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token that each position predicts, and where it is a completion's: [R, tokens - 1] both."""
    labels = inputs["labels"][:, 1:]
    return labels, labels != -100


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def completion_logits(
    model: Any, base: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """fp32 logits at chosen positions only; no others are ever made: [N, V].

    Args:
        model: what is called, with whatever is wrapped around it.
        base: the causal LM inside, whose head projects.
        inputs: input_ids and attention_mask, [rows, tokens] both.
        mask: where to, [rows, tokens - 1]: the last position predicts nothing that is known.
    """
    out = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
        output_hidden_states=[-1],  # after the final norm
        logits_to_keep=1,
    )
    return project(base, out.hidden_states[-1][:, :-1][mask]).float()


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
