"""Memory that a run takes, estimated from the model's shapes before anything long is begun.

    run    = libraries + parameters + the largest of draft, score, heal
    draft  = rows * tokens * 2 * kv heads * head width * attention layers * bytes   (the cache)
           + rows * vocabulary * 24            (scores, their softmax, its sum in fp64)
    score  = 2 * rows * new tokens * vocabulary * bytes     (logits with and without the vector)
    heal   = 16 * adapter parameters           (weights, gradients, two moments, fp32)
           + rows * tokens * layers * (14 * hidden + 5 * intermediate) * bytes      (activations)
           + 32 * min(rows * new tokens * vocabulary, a chunk)      (eight fp32 tensors of logits)

On a GPU, where activations are checkpointed, a layer keeps `hidden` alone, and one layer its all.
It does not count what a forward pass holds for a moment, other processes, or what the allocator
loses between tensors. On the embedded model it comes to 0.71 GiB, where three rounds were measured
at 0.82 to 0.85: 0.84 to 0.87 of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from steer_heal.config import GenerateConfig, HealConfig
from steer_heal.head import CHUNK_LOGITS
from steer_heal.model import Student

GIB = 1024**3
_LIBRARIES_BYTES = {"cpu": 0.46 * GIB, "cuda": 0.5 * GIB}  # of the process; of the CUDA context
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
    model = student.loaded.model
    config, device = model.config.get_text_config(decoder=True), model.device.type
    width, vocab = model.dtype.itemsize, config.vocab_size
    hidden, num_layers = config.hidden_size, len(student.loaded.layers)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    tokens = prompt_tokens + generate.max_new_tokens
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    cached = sum(kind not in _NO_CACHE for kind in kinds)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    adapter = sum(
        heal.rank * sum(model.get_submodule(name).weight.shape) for name in adapter_modules
    )
    a_layer = 14 * hidden + 5 * inner
    kept = num_layers * hidden + a_layer if device == "cuda" else num_layers * a_layer
    logits = generate.max_new_tokens * vocab
    rows = generate.batch_size
    return Memory(
        libraries=_LIBRARIES_BYTES.get(device, _LIBRARIES_BYTES["cpu"]),
        parameters=sum(p.numel() * p.element_size() for p in model.parameters()),
        draft=rows * (tokens * 2 * heads * head * cached * width + vocab * 24),
        score=2 * rows * logits * width,
        heal=16 * adapter
        + heal.batch_size * tokens * kept * width
        + 32 * min(heal.batch_size * logits, CHUNK_LOGITS),
        device_total=_device_total(model.device),
    )


def _device_total(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
