"""Heal: a fresh LoRA trained on the kept completions, with a barrier on the divergence.

    loss = nll_weight * nll + soft_weight * soft + barrier_weight * mean_rows relu(D - threshold)
         + spectral_weight * mean_modules sigma(alpha / rank * B A)

nll: mean over completion tokens. soft: mean over completion tokens of KL(teacher || student):

    log teacher = plain + guidance * (steered - plain), normalised

plain and steered being the student before this round without the vector and with it, at the dose
that the completion was sampled with.
D: a row's aggregate over its completion tokens of the full-vocabulary KL between student and
reference, the same modules with other adapters acting: no second model. So the incoherence
that came with the steering is punished and the trait is not. Reverse KL to the previous student
lets the trait accumulate over rounds; to the base it opposes what earlier rounds learnt; to the
last coherent round's student it is a ratchet: a round that broke is not what the next is held to.

threshold: a number, or `auto`, from how far the round's own teacher goes,

    threshold = 1/2 * median over the kept rows of D(teacher), before the first step

with the barrier's own aggregate, direction and reference, over the rows in which the teacher leaves
the reference by more than 0.001 nats. A threshold above what the student reaches is no barrier at
all, silently, and what it reaches differs by model, dose and round. Where no row does (a dose that
walked down to 0) the threshold is 0.001 nats: the student is held where its teacher stays.

sigma: the largest singular value; 0 by default, as is the decay of the weights.

From round to round, the first being round 1, the learning rate falls as learning_rate *
learning_rate_decay ** (round - 1): there is less left to learn, and what a step does beside it adds
up in the stack. The barrier's weight falls as barrier_weight / round ** barrier_decay.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from loguru import logger
from torch import nn
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from eval.errors import UserError
from steer_heal.artifacts import RoundAdapter, Screened, SteeringVector, TrainStep
from steer_heal.config import HealConfig
from steer_heal.losses import LEAST_NATS
from steer_heal.model import Student
from steer_heal.stack import (
    adapter_weights,
    attach,
    detach,
    lora_config,
    only,
    trainable,
    weights_digest,
)
from steer_heal.targets import Targets, barrier_threshold, read_targets
from steer_heal.trainer import HealTrainer, RowCollator, StepLog


@contextmanager
def _quiet() -> Iterator[None]:
    """TRL and datasets announce each step on the terminal; the loop has one line for it."""
    import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.enable_progress_bars()


@_quiet()
def heal(
    student: Student,
    kept: Screened,
    vector: SteeringVector,
    reference: Sequence[str],
    config: HealConfig,
    name: str,
    seed: int,
) -> RoundAdapter:
    """Trains the adapter `name` on top of the student, which is left as it was.

    Args:
        reference: names of the earlier adapters that act in what the barrier holds the student to.
    Raises:
        UserError: the loss is not finite, the adapter did not move, or a step does not fit into
            memory.
    """
    loaded = student.loaded
    layers = student.band(config.layers)
    modules = [module for layer in layers for module in loaded.linear_names[layer]]
    lora = lora_config(config.rank, config.alpha, modules, loaded.model_id)
    # before PEFT shortens the names (from 20 on, to what is unique in this very model): a vision
    # tower that is there when the adapter is loaded, and was not when it was made, would match
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in lora.to_dict().items()}
    targets = read_targets(student, kept, vector, reference, config)
    earlier = loaded.put_on(student.adapters)
    torch.manual_seed(seed)  # A is drawn when the adapter is attached
    loaded.model = attach(loaded.model, name, lora)
    try:
        history = weights_digest(loaded.model, earlier)
        with trainable(loaded.model, name), only(loaded.model, [*earlier, name]):
            steps = _train(student, kept, targets, config, name, seed)
        if weights_digest(loaded.model, earlier) != history:
            raise AssertionError("training a round changed an adapter of an earlier round")
        weights = adapter_weights(loaded.model, name)
    finally:
        loaded.model = detach(loaded.model, name)
    _require_moved(weights)
    return RoundAdapter(
        name=name, config=plain | {"inference_mode": True}, weights=weights, steps=steps
    )


def _train(
    student: Student,
    kept: Screened,
    targets: Sequence[Targets],
    config: HealConfig,
    name: str,
    seed: int,
) -> tuple[TrainStep, ...]:
    model = student.loaded.model
    threshold_nats = barrier_threshold(student, targets, config)
    if config.barrier_threshold_nats == "auto" and threshold_nats <= LEAST_NATS:
        logger.warning(
            "heal: the teacher stays within {} nats of the reference (a dose of 0, or nearly), "
            "and the barrier holds the student there, too",
            LEAST_NATS,
        )
    with tempfile.TemporaryDirectory() as scratch, _put_back(model), StepLog() as log:
        trainer = HealTrainer(
            model=model,
            args=sft_arguments(config, len(student.adapters), model, scratch, seed),
            train_dataset=sft_rows(kept),
            processing_class=student.tokenizer,
            data_collator=RowCollator(student.tokenizer.pad_token_id),
            callbacks=[log],
            heal=config,
            num_earlier=len(student.adapters),
            targets=targets,
            threshold_nats=threshold_nats,
        )
        trainer.remove_callback(PrinterCallback)
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".{name}." in key for key in trained), "history is trainable"
        with _fitting(config):
            trainer.train()
    records = zip(trainer.records, log.rows, strict=True)
    steps = tuple(TrainStep(step=step, **rec, **row) for step, (rec, row) in enumerate(records))
    share = sum(step.share_over > 0 for step in steps) / len(steps)
    logger.info(
        "heal: nll {:.3f} nats at the first step, {:.3f} at the last; barrier at {:.3f} nats on in "
        "{:.0%} of {}",
        *(steps[0].nll_nats, steps[-1].nll_nats, threshold_nats, share, len(steps)),
    )
    return steps


@contextmanager
def _fitting(config: HealConfig) -> Iterator[None]:
    """Says what to reduce where a step does not fit: half a step would be another step."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise UserError(
            f"heal: a step of {config.batch_size} completions does not fit into memory "
            f"({str(error).splitlines()[0]}): take a smaller heal.batch_size, or shorter "
            "completions (generate.max_new_tokens)"
        ) from error


def sft_arguments(
    config: HealConfig, num_earlier: int, model: Any, scratch: str, seed: int
) -> SFTConfig:
    """What TRL's trainer is told; all of it but the losses' own settings.

    Args:
        num_earlier: rounds before this one.
        scratch: a folder that it may write to.
    """
    arguments = SFTConfig(
        output_dir=scratch,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate * config.learning_rate_decay**num_earlier,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        adam_beta2=0.95,  # 0.999 never warms up in a run of some tens of steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        max_length=None,
        remove_unused_columns=False,  # a row's number travels with it
        bf16=model.device.type == "cuda",
        gradient_checkpointing=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,  # the step log draws the bar, without a line of metrics a step
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several the trainer would take all by itself
    return arguments


def sft_rows(kept: Screened) -> Dataset:
    """Rows of token ids as they were sampled, never re-tokenised; the prompt carries no loss."""
    return Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt_ids, *row.token_ids],
                "labels": [-100] * len(row.prompt_ids) + list(row.token_ids),
                "row": number,
            }
            for number, row in enumerate(kept.kept)
        ]
    )


def _require_moved(weights: dict[str, torch.Tensor]) -> None:
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise UserError("the adapter's weights are not finite: try a smaller heal.learning_rate")
    if not any(bool(value.any()) for key, value in weights.items() if ".lora_B." in key):
        raise UserError("the adapter did not move: try a larger heal.learning_rate or more epochs")


@contextmanager
def _put_back(model: Any) -> Iterator[None]:
    """Training leaves the model as it was but for the trained weights.

    TRL and accelerate put forwards of their own on the model, the trainer aligns the configs with
    the tokenizer, switches the cache off, and ends in train mode.
    """
    base = model.get_base_model()
    modules: tuple[nn.Module, ...] = (model, base)
    forwards = [vars(module).get("forward") for module in modules]
    configs = [base.config, base.config.get_text_config(), base.generation_config]
    values = [dict(vars(config)) for config in configs]
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            vars(module).pop("forward", None)
            vars(module).pop("_original_forward", None)  # accelerate keeps it there
            if forward is not None:
                vars(module)["forward"] = forward
        for config, value in zip(configs, values, strict=True):
            vars(config).clear()
            vars(config).update(value)
        model.eval()
