"""Rows of the speed table about training, and the peak memory of a KL."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from steer_heal.artifacts import Screened
from steer_heal.head import CHUNK_LOGITS, over_chunks
from steer_heal.heal import heal, sft_arguments, sft_rows
from steer_heal.losses import token_kl
from steer_heal.model import load_student
from steer_heal.side_by_side import Ratio, Row, Work
from steer_heal.speed_models import Models, Subject
from steer_heal.stack import lora_config

KL_SHAPE = (8 * 256, 128_000)  # positions, vocabulary


def heal_rows(models: Models) -> list[Row]:
    """With and without soft targets, at a small and a large vocabulary."""
    hard, soft, sft = "nll + KL", "nll + KL + soft targets", "TRL's own SFT step"

    def row(name: str, what: str, most: float, ways: Callable[[], tuple[Work, Work]]) -> Row:
        return Row(name=name, what=f"heal step, {what}", against=sft, asked=1 / most, ways=ways)

    def small(weight: float) -> tuple[Work, Work]:
        return heal_ways(models.embedded, models.kept, weight)

    def large(weight: float) -> tuple[Work, Work]:
        half = models.kept.model_copy(update={"rows": models.kept.rows[:16]})
        return heal_ways(models.wordy, half, weight)

    return [
        row("heal", f"{hard}, vocabulary 1.5k", 1.15, lambda: small(0.0)),
        row("heal-32k", f"{hard}, vocabulary 32k", 0.35, lambda: large(0.0)),
        row("heal-soft", f"{soft}, vocabulary 1.5k", 1.5, lambda: small(3.0)),
        row("heal-soft-32k", f"{soft}, vocabulary 32k", 0.5, lambda: large(3.0)),
    ]


def heal_ways(given: Subject, kept: Screened, soft_weight: float) -> tuple[Work, Work]:
    """Steps on the same rows, with the same modules, rank, optimizer and epochs; both set up."""
    config = given.config.heal.model_copy(update={"soft_weight": soft_weight})
    fresh = load_student(given.student.loaded.model_id, [], "cpu")  # TRL does not put it back
    layers = fresh.band(config.layers)
    names = [name for layer in layers for name in fresh.loaded.linear_names[layer]]

    def ours() -> int:
        return len(heal(given.student, kept, given.vector, [], config, "timed", 5).steps)

    def sft() -> int:
        model = fresh.loaded.model
        lora = lora_config(config.rank, config.alpha, names, fresh.loaded.model_id)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = SFTTrainer(
                model=get_peft_model(model, lora),
                args=sft_arguments(config, 0, model, scratch, 5),
                train_dataset=sft_rows(kept),
                processing_class=fresh.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.state.global_step

    return ours, sft


def memory_row() -> tuple[Ratio, str]:
    """Peak memory of a KL and its backward pass, all logits at once or in chunks; a sentence."""
    positions, vocabulary = KL_SHAPE
    whole, chunked = (_peak_apart(size) for size in (positions, CHUNK_LOGITS // vocabulary))
    row = Ratio(
        what=f"peak memory of a KL at {positions} positions, vocabulary {vocabulary // 1000}k",
        against="all logits at once",
        asked=6,
        values=(whole / chunked,),
    )
    return row, f"The memory row is {chunked:.2f} GiB where all at once is {whole:.2f} GiB."


def kl_step(size: int) -> float:
    """GiB that a KL and its backward pass add to the peak, `size` positions at a time."""
    count, vocabulary = KL_SHAPE
    head = torch.randn(vocabulary, 64)
    states = [torch.randn(count, 64) for _ in range(2)]
    states[0].requires_grad_()

    def kl(student: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor]:
        return (token_kl(F.linear(student, head), F.linear(reference, head), "reverse"),)

    before = peak_gib(anew=True)
    chunks = over_chunks(kl, tuple(states), size)
    torch.cat([chunk for (chunk,) in chunks]).mean().backward()
    return peak_gib() - before


def peak_gib(anew: bool = False) -> float:
    """The most that this process ever held, or since it was last asked to begin anew (Linux)."""
    if anew:  # what importing took for a moment is more than a step in chunks takes
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024**2


def _peak_apart(size: int) -> float:
    """`kl_step` in a process of its own, whose peak is nobody else's."""
    code = f"from steer_heal.speed_heal import kl_step; print(kl_step({size}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)
