"""Memory that a run takes, estimated from the model's shapes alone: weights need not be there yet.

    run    = libraries + parameters + the largest of draft, score, heal
    draft  = rows * tokens * 2 * kv heads * head width * attention layers * bytes   (the cache)
           + rows * vocabulary * 24            (scores, their softmax, its sum in fp64)
    score  = 2 * rows * new tokens * vocabulary * bytes     (logits with and without the vector)
    heal   = 16 * adapter parameters           (weights, gradients, two moments, fp32)
           + rows * tokens * layers * (14 * hidden + 5 * intermediate) * bytes      (activations)
           + 32 * min(rows * new tokens * vocabulary, a chunk)      (eight fp32 tensors of logits)

On a GPU, where activations are checkpointed, a layer keeps `hidden` alone, and one layer its all.
It does not count what a forward pass holds for a moment, other processes, or what the allocator
loses between tensors. On the embedded model it comes to 0.89 GiB, where a run of one round was
measured at 0.81 and one of eight at 0.95.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import torch

from steer_heal.config import GenerateConfig, HealConfig
from steer_heal.head import CHUNK_LOGITS
from steer_heal.model import Student

GIB = 1024**3
_LIBRARIES_BYTES = {"cpu": 0.46 * GIB, "cuda": 0.5 * GIB}  # of the process; of the CUDA context
# Rows at a time, where they are left to this module. On two cores the embedded model samples 4,400
# tokens a second with 64 rows, 5,700 with 256, 7,400 with 512.
_MOST_ROWS = 512
_SHARE = 0.5  # of what is free: the estimate leaves out what a pass holds for a moment
_ROWS_OF_UNKNOWN = 16  # where no one says how much memory there is
_NO_CACHE = ("linear_attention", "mamba", "conv")  # layers whose state does not grow


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by what needs them."""

    libraries: float
    parameters: float
    draft: float
    score: float
    heal: float
    device_total: float | None  # of the machine or the GPU; None: not known

    @property
    def model_fits(self) -> bool:
        """Whether the model by itself can be held."""
        return self.device_total is None or self.libraries + self.parameters < self.device_total

    @property
    def is_tight(self) -> bool:
        """Whether more is needed than there is."""
        return self.device_total is not None and self.run > self.device_total

    @property
    def run(self) -> float:
        """The largest at any time."""
        return self.libraries + self.parameters + max(self.draft, self.score, self.heal)

    def __str__(self) -> str:
        always, stages = ("libraries", "parameters"), ("draft", "score", "heal")
        fixed, largest = (
            ", ".join(f"{part} {getattr(self, part) / GIB:.2f}" for part in parts)
            for parts in (always, stages)
        )
        whole = "" if self.device_total is None else f" of {self.device_total / GIB:.0f}"
        return f"about {self.run / GIB:.2f}{whole} GiB: {fixed}, and the largest of {largest}"


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What of a model's shape decides over memory."""

    width: int  # bytes a number
    vocab: int
    hidden: int
    inner: int  # of the MLP
    num_layers: int
    num_cached: int  # of these, those whose cache grows with the text
    keys: int  # numbers that a token leaves in a layer's keys

    def draft_row(self, tokens: int) -> int:
        """Bytes a row takes while it is sampled."""
        return tokens * 2 * self.keys * self.num_cached * self.width + self.vocab * 24

    def score_row(self, new_tokens: int) -> int:
        """Bytes a row's logits take, with and without the vector."""
        return 2 * new_tokens * self.vocab * self.width


def _sizes(student: Student) -> _Sizes:
    model, num_layers = student.loaded.model, len(student.loaded.layers)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _Sizes(
        width=model.dtype.itemsize,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_layers=num_layers,
        num_cached=sum(kind not in _NO_CACHE for kind in kinds),
        keys=heads * head,
    )


def estimate_memory(
    student: Student,
    adapter_modules: tuple[str, ...],
    prompt_tokens: int,
    generate: GenerateConfig,
    heal: HealConfig,
) -> Memory:
    """What the formulas above give.

    Args:
        prompt_tokens: of the longest prompt.
    """
    model, sizes = student.loaded.model, _sizes(student)
    rows = min(generate.rows_at_a_time, generate.num_drafts)
    device = student.loaded.device.type
    tokens = prompt_tokens + generate.max_new_tokens
    adapter = sum(
        heal.rank * sum(model.get_submodule(name).weight.shape) for name in adapter_modules
    )
    a_layer = 14 * sizes.hidden + 5 * sizes.inner
    checkpointed = device == "cuda"
    kept = sizes.num_layers * (sizes.hidden if checkpointed else a_layer)
    kept += a_layer if checkpointed else 0
    logits = heal.batch_size * generate.max_new_tokens * sizes.vocab
    return Memory(
        libraries=_LIBRARIES_BYTES.get(device, _LIBRARIES_BYTES["cpu"]),
        parameters=student.loaded.parameter_bytes,
        draft=rows * sizes.draft_row(tokens),
        score=rows * sizes.score_row(generate.max_new_tokens),
        heal=16 * adapter
        + heal.batch_size * tokens * kept * sizes.width
        + 32 * min(logits, CHUNK_LOGITS),
        device_total=_device_total(student.loaded.device),
    )


def rows_that_fit(student: Student, prompt_tokens: int, new_tokens: int) -> int:
    """Rows to sample and score at a time: a power of two, by what is free beside the model.

    Args:
        prompt_tokens: of the longest prompt.
    """
    sizes, free = _sizes(student), _device_free(student)
    if free is None:
        return _ROWS_OF_UNKNOWN
    bytes_a_row = max(sizes.draft_row(prompt_tokens + new_tokens), sizes.score_row(new_tokens))
    most = min(_MOST_ROWS, _SHARE * free / bytes_a_row)
    return 1 << (max(1, int(most)).bit_length() - 1)


def peak_bytes(device: torch.device) -> float:
    """The most that was ever held: on a GPU by tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_free(student: Student) -> float | None:
    """Beside the model; of main memory all that the model and the libraries leave."""
    loaded = student.loaded
    if loaded.device.type == "cuda":
        to_come = loaded.parameter_bytes if loaded.model.device.type == "meta" else 0
        return torch.cuda.mem_get_info(loaded.device)[0] - to_come
    total = _device_total(loaded.device)
    return total and total - _LIBRARIES_BYTES["cpu"] - loaded.parameter_bytes


def _device_total(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
