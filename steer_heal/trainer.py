"""The trainer of the heal stage: TRL's SFT trainer with the barrier and the steered teacher.

A step is one pass, the student's: what it is held to and taught is there as hidden states, a row.
Logits are computed at completion positions only, a chunk of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self, cast

import torch
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from eval.bars import progress_bar
from eval.errors import UserError
from eval.processes import count, own, total
from steer_heal.config import HealConfig
from steer_heal.head import CHUNK_LOGITS, completion_states, over_chunks, project
from steer_heal.losses import barrier, row_divergence, spectral_norms, token_losses
from steer_heal.stack import trained_factors
from steer_heal.targets import Targets, guided_logits

_RATIO_EVERY = 8  # steps with the barrier on


class RowCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which drops columns it does not know, with the rows' numbers: [rows]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = torch.tensor([example["row"] for example in examples])
        return super().torch_call(examples) | {"row": numbers}


class HealTrainer(SFTTrainer):
    """TRL's SFT trainer with barrier and soft targets; trains the parameters that require grad."""

    loss_is_scaled_for_ga: Any = (
        True  # `num_items_in_batch` already spans the accumulated micro-batches
    )

    def __init__(
        self,
        *args: Any,
        heal: HealConfig,
        num_earlier: int,
        targets: Sequence[Targets],
        threshold_nats: float,
        **kwargs: Any,
    ) -> None:
        """What TRL's trainer takes, and:

        Args:
            num_earlier: rounds before this one.
            targets: of every row of the dataset, by its number.
            threshold_nats: where the barrier begins.
        """
        self.heal = heal
        self.targets = targets
        self.threshold_nats = threshold_nats
        self.barrier_weight = heal.barrier_weight * (1 + num_earlier) ** -heal.barrier_decay
        self.num_barred = 0  # steps with the barrier on
        self.apart: list[list[torch.Tensor]] = []  # gradients of parts of the last loss
        self.records: list[dict[str, float | None]] = []  # one a micro-batch
        super().__init__(*args, **kwargs)
        self.factors = trained_factors(self.model)
        generator = torch.Generator().manual_seed(self.args.seed)
        self.start = torch.randn(heal.rank, generator=generator).to(self.args.device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """With the gradient of the whole batch, whichever process has which of its rows."""
        loss = super().training_step(*args, **kwargs)
        parameters = [factor for pair in self.factors for factor in pair]
        gradients = total([cast(torch.Tensor, parameter.grad) for parameter in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.records[-1]["barrier_gradient_ratio"] = self._gradient_ratio(gradients)
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Legend: N completion tokens of this process's rows, V vocabulary, R those rows.

        Every figure is this process's part of the whole batch's: over the processes they add up.
        """
        heal = self.heal
        tokens = num_items_in_batch if num_items_in_batch is not None else _targets(inputs)[1].sum()
        inputs, share = _own(inputs)
        labels, mask = _targets(inputs)
        with self.accelerator.autocast():
            student = completion_states(model, inputs, mask)  # [N, hidden]
        states = (labels[mask], student, *self._targets_of(inputs["row"].tolist()))
        chunks = over_chunks(self._token_losses, states, self._chunk_size())
        counted = float(share > 0)
        nll = torch.stack([chunk[0] for chunk in chunks]).sum() / tokens * counted
        soft = torch.stack([chunk[1] for chunk in chunks]).sum() / tokens * counted
        kl = torch.cat([chunk[2] for chunk in chunks])
        divergence = row_divergence(kl, mask.sum(1).tolist(), heal.barrier_aggregate)  # [R]
        over = barrier(divergence, self.threshold_nats) * share
        spectral = self._spectral() / count()
        taught = heal.nll_weight * nll + heal.soft_weight * soft
        barred = self.barrier_weight * over
        loss = taught + barred + heal.spectral_weight * spectral
        self._record(
            loss=loss,
            nll_nats=nll,
            soft_nats=soft,
            kl_nats=divergence.mean() * share,
            barrier_nats=over,
            share_over=(divergence > self.threshold_nats).float().mean() * share,
            spectral_norm=spectral,
        )
        self.apart = self._gradients_apart(barred, heal.spectral_weight * spectral)
        return (loss, None) if return_outputs else loss

    def _targets_of(self, numbers: list[int]) -> Targets:
        """Those of some rows, one after the other: [N, hidden] each."""
        kinds: Any = zip(*(self.targets[number] for number in numbers), strict=True)
        joined = (None if None in kind else torch.cat(kind).to(self.args.device) for kind in kinds)
        return Targets._make(joined)

    def _token_losses(
        self, labels: torch.Tensor, student: torch.Tensor, *states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From hidden states [N, hidden]: sums of nll and soft targets, nats; divergence: [N]."""
        targets = Targets(*states)
        logits, held_to = self._logits(student), self._logits(targets.reference)  # [N, V]
        teacher = None
        if self.heal.soft_weight != 0:
            teacher = guided_logits(self._logits, held_to, targets, self.heal.guidance)
        direction = self.heal.barrier_direction
        nll, soft, kl = token_losses(logits, labels, held_to, teacher, direction)
        return nll.sum(), soft.sum(), kl

    def _spectral(self) -> torch.Tensor:
        """Mean over modules of the largest singular value of alpha / rank * B A: []."""
        if self.heal.spectral_weight == 0:
            return self.start.new_zeros(())
        return self.heal.alpha / self.heal.rank * spectral_norms(self.factors, self.start).mean()

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """fp32, [N, hidden] -> [N, V]."""
        inner = self.accelerator.unwrap_model(self.model).get_base_model()
        with self.accelerator.autocast():
            return project(inner, states).float()

    def _chunk_size(self) -> int:
        """Positions whose logits are in memory at a time."""
        model: Any = self.model
        return max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)

    def _gradients_apart(self, *parts: torch.Tensor) -> list[list[torch.Tensor]]:
        """Of these parts of a loss, the barrier first; nothing where they are not asked for.

        In the first step with the barrier on and every eighth one after it: one more backward pass.
        """
        if not self.barrier_weight * float(self.records[-1]["barrier_nats"] or 0):
            return []
        self.num_barred += 1
        if self.num_barred % _RATIO_EVERY != 1:
            return []
        parameters = [p for pair in self.factors for p in pair]
        return [
            total(torch.autograd.grad(part, parameters, retain_graph=True))
            for part in parts
            if part.requires_grad
        ]

    def _gradient_ratio(self, gradients: Sequence[torch.Tensor]) -> float | None:
        """L2 norm of the barrier's gradient over that of what is taught, both weighted.

        Args:
            gradients: of the whole loss; what is taught is the rest of it.
        """
        if not self.apart:
            is_off = not self.barrier_weight * float(self.records[-1]["barrier_nats"] or 0)
            return 0.0 if is_off else None
        taught = [
            gradient - sum(parts) for gradient, *parts in zip(gradients, *self.apart, strict=True)
        ]
        taught_norm = _norm(taught)
        return _norm(self.apart[0]) / taught_norm if taught_norm else None

    def _record(self, **parts: torch.Tensor) -> None:
        """Keeps the figures of a step, of each of which this process has a part: []."""
        sums = total([part.detach() for part in parts.values()])
        record = dict(zip(parts, map(float, sums), strict=True))
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


def _own(inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float]:
    """This process's rows of a batch, and what share of its rows they are.

    A process that has none of them gets the first, and a share of 0: it counts for nothing.
    """
    num_rows = len(inputs["labels"])
    rows = own(num_rows)
    if len(rows) == num_rows:
        return inputs, 1.0
    some = {key: value[rows or [0]] for key, value in inputs.items()}
    width = int(some["attention_mask"].sum(1).max())  # padding is on the right
    cut = {key: value[:, :width] if value.dim() == 2 else value for key, value in some.items()}
    return cut, len(rows) / num_rows


def _targets(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token that each position predicts, and where it is a completion's: [R, tokens - 1] both."""
    labels = inputs["labels"][:, 1:]
    return labels, labels != -100


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())
