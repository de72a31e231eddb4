"""The trainer of the heal stage: TRL's SFT trainer with the barrier and the steered teacher.

Three passes through the same modules, told apart by what acts: the student (all adapters), the
reference (those of earlier rounds, or none) and the teacher (those of earlier rounds, and the
steering vector at the dose that a row was sampled with, then guided away from the same without
the vector). Logits are computed at completion positions only, a chunk of them at a time.
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
from steer_heal.head import CHUNK_LOGITS, completion_states, over_chunks, project
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
            student = completion_states(model, inputs, mask)  # [N, hidden]
        reference = self._reference_states(model, inputs, mask)
        steered, plain = None, None
        if heal.soft_weight != 0:
            steered, plain = self._teacher_states(model, inputs, mask)
        states = (student, reference, steered, plain, labels[mask])
        chunks = over_chunks(self._token_losses, states, self._chunk_size())
        tokens = num_items_in_batch if num_items_in_batch is not None else mask.sum()
        nll = torch.stack([chunk[0] for chunk in chunks]).sum() / tokens
        soft = torch.stack([chunk[1] for chunk in chunks]).sum() / tokens
        divergence = self._divergence(torch.cat([chunk[2] for chunk in chunks]), mask)  # [R]
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

    def _token_losses(
        self,
        student: torch.Tensor,
        reference: torch.Tensor,
        steered: torch.Tensor | None,
        plain: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From hidden states [N, hidden]: sums of nll and soft targets, nats; divergence: [N]."""
        logits, held_to = self._logits(student), self._logits(reference)  # [N, V]
        nll = F.cross_entropy(logits, labels, reduction="sum")
        soft = logits.new_zeros(())
        if steered is not None:
            teacher = self._guided(held_to, steered, plain)
            soft = token_kl(logits, teacher, "forward").sum()
        return nll, soft, token_kl(logits, held_to, self.heal.barrier_direction)

    def _guided(
        self, held_to: torch.Tensor, steered: torch.Tensor, plain: torch.Tensor | None
    ) -> torch.Tensor:
        """The guided teacher's log-probabilities: [N, V].

        Args:
            held_to: logits of the reference.
            steered, plain: hidden states; plain is None where the reference is the same model.
        """
        beside = held_to if plain is None else self._logits(plain)
        return guided(self._logits(steered), beside, self.heal.guidance)

    def _divergence(self, kl: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A row's aggregate divergence, nats: [N] -> [R]."""
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
            reference = self._reference_states(self.model, inputs, mask)
            states = (reference, *self._teacher_states(self.model, inputs, mask))
            chunks = over_chunks(self._teacher_kl, states, self._chunk_size())
            kl = torch.cat([chunk for (chunk,) in chunks])
            found.append(self._divergence(kl, mask))
        return torch.cat(found)

    def _teacher_kl(
        self, reference: torch.Tensor, steered: torch.Tensor, plain: torch.Tensor | None
    ) -> tuple[torch.Tensor]:
        """From hidden states [N, hidden]: the teacher's divergence from the reference, [N]."""
        held_to = self._logits(reference)
        teacher = self._guided(held_to, steered, plain)
        return (token_kl(teacher, held_to, self.heal.barrier_direction),)

    @torch.no_grad()
    def _reference_states(
        self, model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """[N, hidden]."""
        inner = self.accelerator.unwrap_model(self.model)
        with only(inner, self.reference), self.accelerator.autocast():
            return completion_states(model, inputs, mask)

    @torch.no_grad()
    def _teacher_states(
        self, model: Any, inputs: dict[str, torch.Tensor], mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Steered, each row at its own dose, and without the vector: [N, hidden] each.

        None for the latter where the reference is the same model.
        """
        inner, teacher = self.accelerator.unwrap_model(self.model), self.teacher
        vector = add_vector(teacher.layers, teacher.directions, inputs["dose"])
        with only(inner, teacher.adapters), self.accelerator.autocast():
            known = self.reference == teacher.adapters
            plain = None if known else completion_states(model, inputs, mask)
            with vector:
                return completion_states(model, inputs, mask), plain

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """fp32, [N, hidden] -> [N, V]."""
        inner = self.accelerator.unwrap_model(self.model).get_base_model()
        with self.accelerator.autocast():
            return project(inner, states).float()

    def _chunk_size(self) -> int:
        """Positions whose logits are in memory at a time."""
        model: Any = self.model
        return max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)

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
