"""Measures speed on the embedded model: the same work done two ways, side by side in one process.

    ratio = CPU seconds of the other way / CPU seconds of ours, for the same amount of work

The two ways take turns, on one thread; a row is the median over the turns, with the smallest and
the largest. CPU seconds are those of this process, so that others on the machine count for less
than in wall time. Peak memory is that of a process of its own, less what it held before.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from peft import get_peft_model
from torch.nn import functional as F
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from eval.batching import batches
from eval.chat import chat_ids
from eval.coherence import Surprisal, TextFigures
from eval.files import write_text
from eval.forced_choice import forced_choice
from eval.logits import Ends, completion_ends, end_logits
from eval.sampling import sample_replies
from eval.suite import ForcedChoiceSuite, load_suite
from steer_heal.artifacts import Screened, ScreenedCompletion, SteeringVector
from steer_heal.config import ORGANISM, HealConfig, RunConfig, resolve_config
from steer_heal.drafts import sample_steered
from steer_heal.head import CHUNK_LOGITS, over_chunks
from steer_heal.heal import heal, sft_arguments, sft_rows
from steer_heal.losses import token_kl
from steer_heal.model import Student, load_student
from steer_heal.stack import lora_config
from steer_heal.trait import Trait, load_trait
from steer_heal.vector import extract_vector

PAGE = Path("docs/BENCH.md")
_KL_SHAPE = (8 * 256, 128_000)  # positions, vocabulary
_PACKAGES = ("torch", "transformers", "trl", "peft")

Work = Callable[[], int]  # does it; gives how much was done, in one unit for both ways


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One row: how many times as fast as the other way, in every turn."""

    what: str
    against: str
    values: tuple[float, ...]

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        median = statistics.median(self.values)
        return f"| {self.what} | {self.against} | **{median:.2f}x** | {low:.2f} to {high:.2f} |"


class Bench:
    """The embedded model with what is measured on it, made once."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.config: RunConfig = resolve_config([])
        self.trait: Trait = load_trait(self.config.trait, None, None)
        self.student: Student = load_student(ORGANISM, [], "cpu")
        self.vector: SteeringVector = extract_vector(
            self.student, self.trait, self.config.vector, seed=0
        )
        tokenizer = self.student.tokenizer
        self.turns = [chat_ids(tokenizer, turn) for turn in self.trait.held_out_prompts[:24]]
        self.kept = self._kept(32)
        self.suite = load_suite(self.config.evaluate.suite, ForcedChoiceSuite)

    def table(self) -> list[Ratio]:
        model, pad_id = self.student.loaded.model, self.student.tokenizer.pad_token_id
        four = [ids for ids in self.turns for _ in range(4)]
        ends = completion_ends(four, self._replies(four))
        whole = replace(ends, lengths=[0] * len(ends.rows))

        def score(what: Ends) -> int:
            return sum(1 for _ in end_logits(model, what, 32, pad_id))

        hard, soft = (partial(self._heal_steps, weight) for weight in (0.0, 3.0))
        return [
            self._ratio(
                *("tokens of drafts with their KL, 64 at a time", "one draft at a time"),
                *(partial(self._steered, 64, 64), partial(self._steered, 4, 1)),
            ),
            self._ratio(
                *("tokens of replies, four to each of 24 prompts", "each prompt read anew"),
                lambda: sum(map(len, self._replies(four))),
                lambda: sum(map(len, self._replies(four, kinds=range(len(four))))),
            ),
            self._ratio(
                *("logits of 96 replies to 24 prompts", "the same rows read whole"),
                *(partial(score, ends), partial(score, whole)),
            ),
            self._ratio(
                *("vignettes in two frames, 64 rows at a time", "one row at a time"),
                *(partial(self._vignettes, 32, 64), partial(self._vignettes, 8, 1)),
            ),
            self._ratio(
                *("extraction, 128 pairs, all layers", "its forward passes alone"),
                *(self._extract, self._forwards),
            ),
            self._ratio("heal step, nll + KL", "TRL's own SFT step", hard, self._sft),
            self._ratio("the same with soft targets", "TRL's own SFT step", soft, self._sft),
        ]

    def _ratio(self, what: str, against: str, ours: Work, other: Work) -> Ratio:
        values = [_cpu_s(other) / _cpu_s(ours) for _ in range(self.repeats)]
        row = Ratio(what=what, against=against, values=tuple(values))
        logger.info("{}", row)
        return row

    def _steered(self, count: int, batch_size: int) -> int:
        """Tokens of so many steered replies."""
        config = self.config.generate.model_copy(update={"batch_size": batch_size})
        rows = sample_steered(
            *(self.student, self.vector, self.trait, range(count), [0.4] * count),
            *(config, 1, "drafts"),
        )
        return sum(len(row.token_ids) for row in rows)

    def _replies(self, prompts: list[list[int]], kinds: Any = None) -> list[tuple[int, ...]]:
        with self.student.running() as model:
            found = sample_replies(
                *(model, self.student.tokenizer, prompts),
                seed=2,
                max_new_tokens=96,
                batch_size=64,
                kinds=kinds,
            )
        return [reply.token_ids for reply in found]

    def _vignettes(self, count: int, batch_size: int) -> int:
        suite = self.suite.model_copy(update={"items": self.suite.items[:count]})
        with self.student.running() as model:
            asked = forced_choice(
                model, self.student.tokenizer, suite, None, batch_size, label=None
            )
        return len(asked.rows)

    def _extract(self) -> int:
        vector = extract_vector(self.student, self.trait, self.config.vector, seed=0)
        return vector.num_pairs

    @torch.inference_mode()
    def _forwards(self) -> int:
        """The forward passes of an extraction, their prompts encoded, too."""
        config, trait, student = self.config.vector, self.trait, self.student
        contexts = trait.contexts[: config.num_contexts]
        prompts = [
            chat_ids(student.tokenizer, context, persona)
            for persona in (trait.positive, trait.negative)
            for context in contexts
        ]
        with student.running() as model:
            for batch in batches(prompts, config.batch_size, 0, model.device):
                model(**batch.inputs, logits_to_keep=1, use_cache=False)
        return len(contexts)

    def _kept(self, count: int) -> Screened:
        """Steered replies as a round keeps them; training reads their ids and doses alone."""
        rows = sample_steered(
            *(self.student, self.vector, self.trait, range(count), [0.4] * count),
            *(self.config.generate, 3, "kept"),
        )
        nothing: dict[str, Any] = {
            "surprisal": Surprisal(mean_nll_nats=0, tail_nll_nats=0, rmse_nll_nats=0),
            "figures": TextFigures(**dict.fromkeys(TextFigures.model_fields, 0)),
            **{"brokenness": 0, "persona_share": 0, "enactment_nats": 0, "dropped": None},
        }
        return Screened(
            rows=tuple(ScreenedCompletion(**row.model_dump(), **nothing) for row in rows), curve=()
        )

    def _heal_steps(self, soft_weight: float) -> int:
        changes = {"soft_weight": soft_weight, "epochs": 1}
        config = self.config.heal.model_copy(update=changes)
        return len(heal(self.student, self.kept, self.vector, [], config, "timed", 5).steps)

    def _sft(self) -> int:
        """TRL's own trainer on the same rows, modules, rank and optimizer."""
        config: HealConfig = self.config.heal.model_copy(update={"epochs": 1})
        fresh = load_student(ORGANISM, [], "cpu")
        layers = fresh.band(config.layers)
        names = [name for layer in layers for name in fresh.loaded.linear_names[layer]]
        lora = lora_config(config.rank, config.alpha, names, ORGANISM)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = SFTTrainer(
                model=get_peft_model(fresh.loaded.model, lora),
                args=sft_arguments(config, 0, fresh.loaded.model, scratch, 5),
                train_dataset=sft_rows(self.kept),
                processing_class=fresh.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer.state.global_step


def _cpu_s(work: Work) -> float:
    """CPU seconds a unit."""
    start = time.process_time()
    done = work()
    return (time.process_time() - start) / done


def kl_step(size: int) -> float:
    """GiB that a KL and its backward pass add to the peak, `size` positions at a time."""
    count, vocabulary = _KL_SHAPE
    head = torch.randn(vocabulary, 64)
    states = [torch.randn(count, 64) for _ in range(2)]
    states[0].requires_grad_()

    def kl(student: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor]:
        return (token_kl(F.linear(student, head), F.linear(reference, head), "reverse"),)

    before = _peak_gib()
    chunks = over_chunks(kl, tuple(states), size)
    torch.cat([chunk for (chunk,) in chunks]).mean().backward()
    return _peak_gib() - before


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _peak_apart(size: int) -> float:
    """`kl_step` in a process of its own, whose peak is nobody else's."""
    code = f"from steer_heal.speed import kl_step; print(kl_step({size}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _page(rows: list[Ratio], whole_gib: float, chunked_gib: float, repeats: int) -> str:
    positions, vocabulary = _KL_SHAPE
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return "\n".join(
        [
            "# Speed",
            "",
            f"Measured by `just speed --repeats {repeats}` on {datetime.now(UTC):%Y-%m-%d}: "
            f"{platform.machine()}, {os.cpu_count()} cores, of which one was used, no GPU; "
            f"Python {platform.python_version()}, {packages}.",
            "",
            "The embedded model in fp32. A ratio is the other way's CPU seconds over ours for the",
            f"same amount of work, the median of {repeats} turns taken side by side in one run,",
            "with the smallest and the largest; above 1 ours is faster.",
            "",
            "| what | against | ratio | over turns |",
            "| --- | --- | --- | --- |",
            *map(str, rows),
            "",
            f"Peak memory of a KL and its backward pass at {positions} positions and a vocabulary "
            f"of {vocabulary}:",
            f"{whole_gib:.2f} GiB with all logits at once, {chunked_gib:.2f} GiB in chunks, "
            f"{chunked_gib / whole_gib:.2f} of it.",
            "",
            "Drafts include the KL that is measured on the first 32 of each dose; heal and SFT",
            "include their set-up, on 32 rows for an epoch. Not measured: a GPU, bf16, wider",
            "models, wall time of a round, other libraries than TRL, several processes.",
        ]
    )


def main() -> None:
    """Measures all rows and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of the two ways")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = Bench(repeats).table()
    positions, vocabulary = _KL_SHAPE
    peaks = [_peak_apart(size) for size in (positions, CHUNK_LOGITS // vocabulary)]
    page = _page(rows, peaks[0], peaks[1], repeats)
    write_text(PAGE, page + "\n")
    print(page)


if __name__ == "__main__":
    main()
