"""What a run is asked to do: one config class a stage, presets as functions, overrides by key.

A config is validated when it is built, saved with its run, and never changed afterwards.
"""

from __future__ import annotations

import re
import textwrap
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from eval.settings import (
    Device,
    Settings,
    allowed,
    meaning,
    resolve_settings,
    valid_keys,
    value_text,
)

ORGANISM = "organism"  # the embedded model
SHARED = "shared"  # contexts and prompts without personas, for pos= and neg=
ALIASES = {"N": "rounds"}


def _require_band(shares: tuple[float, float]) -> tuple[float, float]:
    low, high = shares
    if not 0 <= low <= high <= 1:
        raise ValueError("two shares from 0 to 1 are needed, the lower one first")
    return shares


def _require_grid(doses: tuple[float, float]) -> tuple[float, float]:
    low, high = doses
    if not 0 < low <= high:
        raise ValueError("two doses above 0 are needed, the lower one first")
    return doses


def _require_name(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"(?!\.)[\w.@-]+", name):
        raise ValueError(
            "a name is made of letters, digits, _ - @ and dots, without a dot in front; folder= "
            "says where runs land"
        )
    return name


FREE = ("rounds", "patience", "folder", "device", "cache")  # may change in a run that was begun

Band = Annotated[tuple[float, float], AfterValidator(_require_band)]
Grid = Annotated[tuple[float, float], AfterValidator(_require_grid)]


BatchSize = Literal["auto"] | PositiveInt


def _settled(batch_size: BatchSize) -> int:
    assert batch_size != "auto", "a run settles it before its first stage"
    return batch_size


class VectorConfig(Settings):
    """Extraction of the steering vector."""

    band: Band = (0.45, 0.55)
    """Layers that are steered, as shares of the depth; a broad band destroys the text."""
    direction: Literal["mean_difference", "random"] = "mean_difference"
    """random: a control; the norms of the mean difference, the direction drawn once a run."""
    file: str | None = Field(None, min_length=1)
    """A vector from elsewhere to steer along: a folder of as=vector, a .gguf, or a .pt."""
    layer: int | None = Field(None, ge=0)
    """The one layer that is steered, from 0, of such a file; needed where it has one direction."""
    num_contexts: int = Field(128, ge=2)
    """User turns the mean difference is taken over."""
    batch_size: int = Field(64, ge=1)
    """Prompts a forward pass; on a CPU fewer, where they are long."""

    @model_validator(mode="after")
    def _one_direction(self) -> VectorConfig:
        if self.file is not None and self.direction == "random":
            raise ValueError("vector.file gives the direction: leave out vector.direction=random")
        if self.layer is not None and self.file is None:
            raise ValueError("vector.layer is of a vector.file; vector.band takes layers otherwise")
        return self


class GenerateConfig(Settings):
    """Sampling of the steered completions."""

    doses: Literal["auto"] | Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = "auto"
    """Multiples of the raw vector, the drafts split evenly over them; auto: a probe finds them."""
    walk_down: float = Field(1.0, ge=0)
    """Every dose is lowered by this times what the stack adds of the vector by itself, to 0."""
    dose_grid: Grid = (0.1, 1.1)
    """Where doses are auto: the lowest and the highest that are tried."""
    num_grid_doses: int = Field(8, ge=2)
    """Doses tried, each the same multiple of the one below."""
    num_probes: int = Field(32, ge=1)
    """Drafts sampled at each dose that is tried."""
    num_doses: int = Field(2, ge=1)
    """Doses taken, at most: the largest of those tried that reach the targets."""
    dose_share: float = Field(0.5, gt=0)
    """Of the doses found a round steers at this share: guidance goes further from there."""
    target_pass_rate: float = Field(0.5, gt=0, le=1)
    """Share of a dose's drafts that must pass the filter for it to be taken."""
    target_kl_nats: PositiveFloat | None = None
    """Largest KL p95 from the student, nats a token, at which a dose is taken; by default any."""
    num_drafts: int = Field(384, ge=1)
    """Completions sampled a round."""
    max_new_tokens: int = Field(96, ge=1)
    """Longest completion, tokens."""
    temperature: float = Field(1.0, gt=0)
    """Softmax temperature; 1 samples from the model as it is."""
    batch_size: BatchSize = 512
    """Completions sampled at a time, of limits and probes too; auto: what fits, up to 512, once."""

    @property
    def rows_at_a_time(self) -> int:
        return _settled(self.batch_size)

    @field_validator("doses", mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        """Apart, where the command line gives them with commas between."""
        return given.split(",") if isinstance(given, str) and given != "auto" else given


class FilterConfig(Settings):
    """Which completions are kept."""

    num_kept: int = Field(192, ge=1)
    """Completions kept for training, at most."""
    min_kept: int = Field(8, ge=1)
    """With fewer than this left the round stops."""
    quantile: float = Field(0.95, gt=0.5, le=1)
    """Limits stand at this quantile of the base's own unsteered completions."""
    num_calibration: int = Field(192, ge=8)
    """Unsteered completions of the base that set the limits."""
    min_enactment_nats: float = 0.0
    """Least log-likelihood ratio between the personas, nats a token."""
    max_similarity: float = Field(0.7, gt=0)
    """Kept completions are less alike, as Jaccard similarity of word 3-grams; above 1: any."""
    rank_by_enactment: bool = True
    """Of a prompt's completions that pass the most enacting are kept first; false: any of them."""
    batch_size: int = Field(128, ge=1)
    """Completions scored at a time; on a CPU fewer, where they are long."""

    @model_validator(mode="after")
    def _some_can_be_left(self) -> FilterConfig:
        if self.min_kept > self.num_kept:
            raise ValueError(
                f"filter.min_kept is {self.min_kept}, more than filter.num_kept ({self.num_kept}): "
                "every round would stop"
            )
        return self


class HealConfig(Settings):
    """Training of the round's adapter."""

    rank: int = Field(16, ge=1)
    """Rank of the LoRA."""
    alpha: float = Field(32, gt=0)
    """LoRA alpha; the update is scaled by alpha / rank."""
    layers: Band = (0.2, 0.8)
    """Layers that carry the adapter, as shares of the depth."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW in the first round, cosine schedule."""
    learning_rate_decay: float = Field(0.6, gt=0, le=1)
    """The learning rate of every further round, as a share of that of the round before."""
    epochs: float = Field(2, gt=0)
    """Passes over the kept completions."""
    batch_size: int = Field(8, ge=1)
    """Completions an optimizer step."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the steps with a rising learning rate."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this L2 norm."""
    nll_weight: float = Field(1.0, ge=0)
    """Weight of the negative log-likelihood of the kept completions."""
    soft_weight: float = Field(1.0, ge=0)
    """Weight of KL(teacher || student) on them, steered at the dose each was sampled with."""
    guidance: float = Field(2.0, gt=0)
    """The teacher goes this many times as far as steering, in log-probability; 1 is steering."""
    barrier_weight: float = Field(0.3, ge=0)
    """Weight of the divergence barrier; 0 switches it off."""
    barrier_decay: float = Field(0.0, ge=0)
    """In round n the barrier's weight is divided by n to this power; 0: the same in all rounds."""
    barrier_threshold_nats: Literal["auto"] | NonNegativeFloat = 0.5
    """A row's divergence is free up to here, nats; auto: half of the teacher's own, by round."""
    barrier_aggregate: Literal["rmse", "mean", "p95", "max"] = "rmse"
    """How a row's per-token divergences become one figure."""
    barrier_direction: Literal["reverse", "forward"] = "reverse"
    """reverse: KL(student || reference); forward: KL(reference || student)."""
    barrier_reference: Literal["previous", "base", "last_good"] = "previous"
    """Held to: the student before this round, the untouched base, or the last coherent round's."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decay of the adapter's weights, times the learning rate."""
    spectral_weight: float = Field(0.0, ge=0)
    """Weight of the largest singular value of the adapter's update, mean over its modules."""


class EvaluateConfig(Settings):
    """What every round is measured on."""

    suite: str = ORGANISM
    """Forced-choice suite: a name in eval/suites or a path."""
    tasks: str = "organism_mundane"
    """Suite of mundane tasks: a name in eval/suites or a path."""
    neutral: str = "organism_neutral"
    """Suite of fixed dialogues whose perplexity is compared with base's: a name or a path."""
    controls: Literal["standard", "full"] = "standard"
    """full: round 1 is healed without the barrier too, as one more control."""
    num_random: int = Field(3, ge=1)
    """Random directions measured as a control, at the vector's own KL."""
    samples_per_prompt: int = Field(4, ge=1)
    """Replies sampled to each held-out prompt; where a vector is added, this / num_random."""
    num_dialogues: int = Field(24, ge=1)
    """Held-out prompts, at most, at which a second user turn follows the first reply, once."""
    max_new_tokens: int = Field(96, ge=1)
    """Longest reply, tokens."""
    batch_size: BatchSize = 512
    """Rows at a time; auto: as many as fit into memory, up to 512, chosen once a run."""

    @property
    def rows_at_a_time(self) -> int:
        return _settled(self.batch_size)


class RunConfig(Settings):
    """Everything a run is asked to do."""

    rounds: int = Field(3, ge=1)
    """Rounds in all; more on a finished run goes on from its last one."""
    patience: int = Field(2, ge=0)
    """Rounds in a row without gain over the best coherent one that end a run before N; 0: never."""
    model: str = ORGANISM
    """The embedded model, a local folder, or a hub id (id@revision for one revision)."""
    trait: str = "care-over-authority-organism"
    """A trait file: a name in steer_heal/traits or a path to a .toml."""
    pos: str | None = Field(None, min_length=1)
    """The trait as a persona (system prompt); on other models its prompts are the shared ones."""
    neg: str | None = Field(None, min_length=1)
    """The opposite persona."""
    seed: int = Field(0, ge=0)
    """Every random draw derives from it."""
    run: Annotated[str | None, AfterValidator(_require_name)] = None
    """Name of the run; by default trait, model and seed."""
    folder: str = "rounds"
    """Where runs land."""
    cache: str | None = Field(None, min_length=1)
    """Folder of stages that runs with equal settings share, each made once; by default none."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    vector: VectorConfig = VectorConfig()
    generate: GenerateConfig = GenerateConfig()
    filter: FilterConfig = FilterConfig()
    heal: HealConfig = HealConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _personas_together(self) -> RunConfig:
        if (self.pos is None) != (self.neg is None):
            raise ValueError("pos and neg: give both personas or none")
        if self.pos is not None and self.pos == self.neg:
            raise ValueError("pos and neg are the same: take direct opposites")
        return self


def preset_organism() -> dict[str, Any]:
    """The embedded model: adapters on the layers up to the steered one carry the trait on.

    In round 1 the rows of a step come to diverge by 0.3 to 0.5 nats in the mean: a threshold of 0.5
    would hardly ever fire.
    """
    return {
        "generate": {"doses": (0.35, 0.45)},
        "heal": {
            "rank": 8,
            "alpha": 16,
            "layers": (0.0, 0.5),
            "learning_rate": 2e-3,
            "soft_weight": 3,
            "barrier_threshold_nats": 0.25,
        },
    }


def preset_hub() -> dict[str, Any]:
    """Real models of 0.5 to 8 B parameters: doses and batches found, longer replies."""
    return {
        "trait": "care-over-authority",
        "generate": {"doses": "auto", "max_new_tokens": 128, "batch_size": "auto"},
        "filter": {"batch_size": 8},
        "evaluate": {"samples_per_prompt": 2, "max_new_tokens": 128, "batch_size": "auto"},
    }


def resolve_config(overrides: list[str]) -> RunConfig:
    """The config of a run from `KEY=VALUE` arguments over the preset that fits the model.

    Raises:
        UserError: an unknown key (with the nearest valid ones) or a value that is not allowed.
    """
    return resolve_settings(RunConfig, overrides, ALIASES, _preset, "just settings")


def describe_settings() -> str:
    """Every key with its defaults, its meaning and what it takes."""
    presets = (preset_organism(), preset_hub())
    embedded, other = (RunConfig.model_validate(preset) for preset in presets)
    short = {key: alias for alias, key in ALIASES.items()}
    lines = [
        "Every setting with its default on the embedded model, what it takes, and its meaning."
    ]
    section = None
    for key in valid_keys(RunConfig):
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        ours, theirs = value_text(embedded, key), value_text(other, key)
        differs = f"  (other models: {theirs})" if theirs != ours else ""
        also = f"  (or {short[key]}={ours})" if key in short else ""
        text = f"[{allowed(RunConfig, key)}] {meaning(RunConfig, key)}"
        lines.append(f"{key}={ours}{differs}{also}")
        lines += textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _preset(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("model", ORGANISM) == ORGANISM:
        return preset_organism()
    return preset_hub() | ({"trait": SHARED} if "pos" in given else {})
