"""The models whose speed is measured: the embedded one, and random weights of larger shapes.

Time does not depend on what weights say, but for where a reply ends: those of random weights run to
the length limit, nearly all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from eval.chat import chat_ids
from eval.coherence import Surprisal, TextFigures
from steer_heal.artifacts import Screened, ScreenedCompletion, SteeringVector
from steer_heal.batch_sizes import settled
from steer_heal.config import ORGANISM, RunConfig, VectorConfig, resolve_config
from steer_heal.drafts import sample_steered
from steer_heal.model import Student, load_student
from steer_heal.trait import Trait, load_trait
from steer_heal.vector import extract_vector


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with what a run would have beside it."""

    student: Student
    vector: SteeringVector
    trait: Trait
    config: RunConfig

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids up to the assistant tag: [prompts][tokens]."""
        return [chat_ids(self.student.tokenizer, turn) for turn in self.trait.prompts]


class Models:
    """Each is made when it is first asked for."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch  # a folder for weights that are drawn

    @cached_property
    def embedded(self) -> Subject:
        config = resolve_config([])
        trait = load_trait(config.trait, None, None)
        return subject(ORGANISM, trait, config)

    @cached_property
    def wide(self) -> Subject:
        """6 layers of 512, fp32."""
        return self._random("wide", num_layers=6, hidden=512)

    @cached_property
    def deep(self) -> Subject:
        """8 layers of 1,024, bf16."""
        found = self._random("deep", num_layers=8, hidden=1024)
        found.student.loaded.model.to(torch.bfloat16)
        return found

    @cached_property
    def wordy(self) -> Subject:
        """As the embedded model, with a vocabulary of 32,000."""
        return self._random("wordy", num_layers=6, hidden=192, vocabulary=32_000)

    @cached_property
    def kept(self) -> Screened:
        """32 of the embedded model's steered replies."""
        return as_kept(self.embedded, 32)

    def _random(
        self, name: str, num_layers: int, hidden: int, vocabulary: int | None = None
    ) -> Subject:
        """Qwen3's shape with the embedded model's tokenizer, whose ids are enough."""
        like, folder = self.embedded, self.scratch / name
        tokenizer = like.student.tokenizer
        config = Qwen3Config(
            num_hidden_layers=num_layers,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            head_dim=64,
            vocab_size=vocabulary or len(tokenizer),
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return subject(str(folder), like.trait, like.config, num_contexts=8)


def subject(
    model_id: str, trait: Trait, config: RunConfig, num_contexts: int | None = None
) -> Subject:
    """Loads a model and takes its vector.

    Args:
        num_contexts: of the vector, where its quality is of no account.
    """
    student = load_student(model_id, [], "cpu")
    vector = config.vector if num_contexts is None else VectorConfig(num_contexts=num_contexts)
    return Subject(
        student=student,
        vector=extract_vector(student, trait, vector, seed=0),
        trait=trait,
        config=settled(student, trait, config),
    )


def as_kept(given: Subject, count: int) -> Screened:
    """Steered replies as a round keeps them; training reads their ids and doses alone."""
    prompts = [index % len(given.trait.prompts) for index in range(count)]
    rows = sample_steered(
        *(given.student, given.vector, given.trait, prompts, [0.4] * count),
        *(given.config.generate, 3, "kept"),
    )
    nothing: dict[str, Any] = {
        "surprisal": Surprisal(mean_nll_nats=0, tail_nll_nats=0, rmse_nll_nats=0),
        "figures": TextFigures(**dict.fromkeys(TextFigures.model_fields, 0)),
        **{"brokenness": 0, "persona_share": 0, "enactment_nats": 0, "dropped": None},
    }
    return Screened(
        rows=tuple(ScreenedCompletion(**row.model_dump(), **nothing) for row in rows), curve=()
    )
