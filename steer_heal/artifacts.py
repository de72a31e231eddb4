"""The typed values that flow from stage to stage, and how each is saved and loaded.

Every artifact is frozen and keyword-only. `save` writes files into a folder, `load` reads them
back, `digest` is a hash of the content; `files` are the names, which are also the order of writing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from eval.coherence import Surprisal, TextFigures
from eval.files import digest_of
from eval.rows import ForcedChoiceRow, NeutralRow, TaskRow
from steer_heal.records import (
    Artifact,
    JsonArtifact,
    Record,
    read_lines,
    read_tensors,
    write_lines,
    write_record,
    write_tensors,
)

# ------------------------------------------------------------------------------------------ steer


@dataclass(frozen=True, kw_only=True)
class SteeringVector:
    """v[l] = mean_i( h_l(positive persona, x_i) - h_l(negative persona, x_i) ), raw norm.

    h_l is the output of decoder layer l at the last prompt token (the assistant tag).
    """

    directions: torch.Tensor  # [layers, hidden] fp32, all layers of the model; the control's: drawn
    band: tuple[int, ...]  # layers that are steered
    norms: tuple[float, ...]  # L2 norm a layer, in units of the residual stream
    residual_norms: tuple[float, ...]  # mean L2 norm of h_l, a layer
    auc: tuple[float, ...]  # how well v[l] tells held-out pairs apart, 0.5 to 1, a layer
    pairwise_cosine: tuple[float, ...]  # mean cosine between single pairs' differences, a layer
    num_pairs: int
    weights_hash: str  # of the model it was taken from

    stage: ClassVar[str] = "vector"
    files: ClassVar[tuple[str, ...]] = ("vector.safetensors", "vector.json")

    @property
    def band_directions(self) -> torch.Tensor:
        """[band layers, hidden]."""
        return self.directions[list(self.band)]

    def save(self, folder: Path) -> None:
        tensors = {"directions": self.directions.contiguous()}
        write_tensors(folder / "vector.safetensors", tensors)
        meta = {key: value for key, value in vars(self).items() if key != "directions"}
        meta |= {"operation": "add", "site": "decoder layer output", "token": "last prompt token"}
        write_record(folder / "vector.json", meta)

    @classmethod
    def load(cls, folder: Path) -> Self:
        meta = json.loads((folder / "vector.json").read_text(encoding="utf-8"))
        for constant in ("operation", "site", "token"):
            meta.pop(constant)
        lists = {key: tuple(value) for key, value in meta.items() if isinstance(value, list)}
        directions = read_tensors(folder / "vector.safetensors")["directions"]
        return cls(directions=directions, **(meta | lists))

    def digest(self) -> str:
        return digest_of([self.directions.numpy().tobytes().hex(), repr(self.band)])


class DosePoint(Record):
    """One point of a dose curve."""

    dose: float  # multiples of the raw vector
    num_drafts: int
    pass_rate: float  # share that passes every gate, 0 to 1
    kl_p95_nats: float  # median over those of its completions on which it was measured
    enactment_nats: float  # mean over its completions
    commonest_drop: str | None  # the criterion that most of its completions fail; None: none does


class Doses(JsonArtifact):
    """What a round steers with."""

    doses: tuple[float, ...]  # multiples of the raw vector, at least one
    asked: tuple[float, ...]  # given, or tried, before they were walked down
    carried: float | None  # what the stack adds of the vector by itself, in multiples of it; None:
    # not measured, as nothing is walked down
    probe: tuple[DosePoint, ...]  # the doses that were tried, ascending; empty: they were given
    passing: tuple[float, ...]  # those of them that were taken, before their share; empty likewise

    stage: ClassVar[str] = "doses"
    files: ClassVar[tuple[str, ...]] = ("probe.json",)


class Completion(Record):
    """One sampled completion, with where it comes from."""

    prompt_index: int  # in the trait's prompts
    prompt: str
    prompt_ids: tuple[int, ...]  # up to the assistant tag, no system prompt
    token_ids: tuple[int, ...]  # as sampled, with the end-of-turn token where there is one
    text: str  # decoded, without special tokens
    dose: float  # multiples of the raw vector
    seed: int
    finished: bool  # ended by an end-of-turn token
    kl_p95_nats: float | None  # over tokens, KL(steered || student); None: not measured on this one


class Completions(Artifact):
    """The drafts of a round."""

    rows: tuple[Completion, ...]

    stage: ClassVar[str] = "drafts"
    files: ClassVar[tuple[str, ...]] = ("drafts.jsonl",)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    def save(self, folder: Path) -> None:
        write_lines(folder / "drafts.jsonl", self.rows)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(rows=read_lines(folder / "drafts.jsonl", Completion))


class BatchSizes(JsonArtifact):
    """Rows at a time, where they were left to what fits into memory."""

    generate: int
    evaluate: int

    stage: ClassVar[str] = "batches"
    files: ClassVar[tuple[str, ...]] = ("batches.json",)


# ----------------------------------------------------------------------------------------- filter


class TextLimit(Record):
    """What a text's figure may be."""

    low: float | None  # at least; None: however low
    typical: float  # the base's own median
    high: float  # at most


class TextLimits(Record):
    """The limits of `TextFigures`, by their names."""

    word_repetition: TextLimit
    char_repetition: TextLimit
    vocabulary: TextLimit
    compressed_size: TextLimit
    letters_per_word: TextLimit
    symbol_share: TextLimit
    odd_word_share: TextLimit


class Limits(JsonArtifact):
    """What the base's own unsteered completions look like: the gates of the filter."""

    num_completions: int
    quantile: float
    base_finishes: bool  # the base's own completions end within the length limit
    tail_nll_nats: float  # at most
    rmse_nll_nats: float  # at most
    text: TextLimits
    persona_share: float  # at most
    words_low: int  # at least
    words_high: int  # at most
    base_tail_nll_nats: tuple[float, ...]  # a completion, sorted: the base's own spread

    stage: ClassVar[str] = "limits"
    files: ClassVar[tuple[str, ...]] = ("limits.json",)


class ScreenedCompletion(Completion):
    """A completion with every score, and why it was dropped."""

    surprisal: Surprisal  # under the base, no system prompt
    figures: TextFigures
    brokenness: float  # of its text beside the base's own, 0 and up; lower is better
    persona_share: float  # of its word 4-grams, those that are the persona's own words, 0 to 1
    enactment_nats: float  # log p(. | positive) - log p(. | negative) under the base, a token
    dropped: str | None  # the first criterion it failed; None: kept


class Screened(Artifact):
    """All drafts of a round, screened."""

    rows: tuple[ScreenedCompletion, ...]
    curve: tuple[DosePoint, ...]

    stage: ClassVar[str] = "screened"
    files: ClassVar[tuple[str, ...]] = ("completions.jsonl", "dose.json")

    @property
    def kept(self) -> tuple[ScreenedCompletion, ...]:
        return tuple(row for row in self.rows if row.dropped is None)

    @property
    def drops(self) -> Counter[str]:
        """Reason -> number of drafts dropped for it."""
        return Counter(row.dropped for row in self.rows if row.dropped is not None)

    @property
    def num_kept_prompts(self) -> int:
        """Different prompts that the kept completions answer."""
        return len({row.prompt_index for row in self.kept})

    @property
    def mean_kept_dose(self) -> float:
        """The dose that the kept completions were sampled at, on average."""
        return sum(row.dose for row in self.kept) / len(self.kept)

    def save(self, folder: Path) -> None:
        write_lines(folder / "completions.jsonl", self.rows)
        write_record(folder / "dose.json", [point.model_dump() for point in self.curve])

    @classmethod
    def load(cls, folder: Path) -> Self:
        curve = json.loads((folder / "dose.json").read_text(encoding="utf-8"))
        return cls(
            rows=read_lines(folder / "completions.jsonl", ScreenedCompletion),
            curve=tuple(DosePoint.model_validate(point) for point in curve),
        )


# ------------------------------------------------------------------------------------------- heal


class TrainStep(Record):
    """One optimizer step of the heal stage."""

    step: int
    loss: float
    nll_nats: float  # mean over completion tokens
    soft_nats: float  # mean over completion tokens of KL(guided teacher || student); 0: not asked
    kl_nats: float  # mean over rows of the row's aggregate divergence from the reference
    barrier_nats: float  # mean over rows of what exceeds the threshold
    threshold_nats: float  # a row's divergence is free up to here; the same in a whole round
    share_over: float  # share of rows over the threshold, 0 to 1
    barrier_gradient_ratio: float | None  # L2 norm of the weighted barrier's gradient over that of
    # nll and soft targets, before clipping; 0: the barrier is off; None: on, but not measured
    spectral_norm: float  # mean over modules of the update's largest singular value; 0: not asked
    grad_norm: float  # L2, before clipping
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class RoundAdapter:
    """The LoRA that a round trained: a standard PEFT folder."""

    name: str  # r00, r01, ...
    config: Mapping[str, Any]  # of peft.LoraConfig
    weights: Mapping[str, torch.Tensor]  # by their names in a PEFT file; fp32, A and B a module
    steps: tuple[TrainStep, ...]

    stage: ClassVar[str] = "adapter"
    files: ClassVar[tuple[str, ...]] = (
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "train.jsonl",
    )

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return float(self.config["lora_alpha"]) / self.rank

    def save(self, folder: Path) -> None:
        (folder / "adapter").mkdir(exist_ok=True)
        write_tensors(folder / "adapter" / "adapter_model.safetensors", self.weights)
        write_record(folder / "adapter" / "adapter_config.json", dict(self.config))
        write_lines(folder / "train.jsonl", self.steps)

    @classmethod
    def load(cls, folder: Path) -> Self:
        config = (folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
        return cls(
            name=f"r{folder.name.rpartition('-')[2]}",
            config=json.loads(config),
            weights=read_tensors(folder / "adapter" / "adapter_model.safetensors"),
            steps=read_lines(folder / "train.jsonl", TrainStep),
        )

    def digest(self) -> str:
        tensors = [
            key + value.numpy().tobytes().hex() for key, value in sorted(self.weights.items())
        ]
        return digest_of([json.dumps(dict(self.config), sort_keys=True), *tensors])


# --------------------------------------------------------------------------------------- evaluate


class ReplyRow(Record):
    """One sampled reply to a held-out prompt."""

    prompt_index: int  # in the trait's held-out prompts
    sample: int
    text: str
    enactment_nats: float | None  # under the base, a token; None: words decide it, no need to score
    enacted: bool  # acts the trait, by the trait's words or by the sign of the enactment
    surprisal: Surprisal  # under the base, no system prompt


class SecondReplyRow(Record):
    """One sampled reply to a second user turn, after the first reply to a held-out prompt."""

    prompt_index: int  # in the trait's held-out prompts; the first reply is its sample 0
    text: str
    enacted: bool  # as of a first reply
    surprisal: Surprisal  # under the base, after both turns, no system prompt


class ConditionEval(Record):
    """One condition (base, prompted, random, steered, healed ...) on the held-out items."""

    condition: str
    dose: float | None  # multiples of the raw vector or of a random one of its norms
    kl_nats: float | None = None  # mean KL(steered || student) a token of the kept completions
    choices: tuple[ForcedChoiceRow, ...]
    unscorable: tuple[str, ...] = ()  # keys of vignettes whose log-probabilities are not finite
    tasks: tuple[TaskRow, ...]
    replies: tuple[ReplyRow, ...]
    second_replies: tuple[SecondReplyRow, ...]
    neutral: tuple[NeutralRow, ...]  # the same fixed text in every condition


class Controls(Artifact):
    """The conditions that do not change from round to round, evaluated once."""

    base: ConditionEval
    prompted: ConditionEval  # the positive persona as system prompt
    engineered: ConditionEval  # a longer prompt that asks for the trait
    random: tuple[ConditionEval, ...]  # random directions at the vector's own KL

    stage: ClassVar[str] = "controls"
    files: ClassVar[tuple[str, ...]] = (
        "base.json",
        "prompted.json",
        "engineered.json",
        "random.json",
    )

    def save(self, folder: Path) -> None:
        for file, value in zip(self.files, self.model_dump().values(), strict=True):
            write_record(folder / file, value)

    @classmethod
    def load(cls, folder: Path) -> Self:
        texts = [(folder / file).read_text(encoding="utf-8") for file in cls.files]
        fields = (f'"{name}": {text}' for name, text in zip(cls.model_fields, texts, strict=True))
        return cls.model_validate_json(f"{{{', '.join(fields)}}}")  # 4 times as fast as by objects


class Unbarred(JsonArtifact):
    """What the barrier is for: the first round healed without it, from the same completions."""

    healed: ConditionEval  # the base and the adapter so trained, which is in no stack
    steps: tuple[TrainStep, ...]

    stage: ClassVar[str] = "unbarred"
    files: ClassVar[tuple[str, ...]] = ("unbarred.json",)


class RoundEval(JsonArtifact):
    """What a round came to."""

    steered: ConditionEval  # the student before this round, steered at the kept completions' dose
    healed: ConditionEval  # the student after this round, nothing added
    internalised: float  # cosine of the vector with what the adapters do to the hidden state

    stage: ClassVar[str] = "eval"
    files: ClassVar[tuple[str, ...]] = ("eval.json",)
