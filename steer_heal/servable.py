"""An adapter that servers take: sound, fitting its base, of a rank that they allow.

vLLM takes a few ranks only (its `MaxLoRARanks`), so a folded adapter is padded with zeros up to the
next of them, which changes nothing. A smaller one is cut: a module's update B A is replaced by the
nearest matrix of that rank (Eckart and Young 1936), which costs what export measures.

    B A = U S V^T   ->   B = U_r S_r^(1/2),  A = S_r^(1/2) V_r^T
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from eval.errors import UserError
from steer_heal.artifacts import RoundAdapter
from steer_heal.stack import require_plain

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PREFIX = "base_model.model."  # PEFT's, before the name that a module has in the base
Factors = tuple[torch.Tensor, torch.Tensor]  # A [rank, in], B [out, rank]


def at_served_rank(adapter: RoundAdapter, asked: int | None) -> tuple[RoundAdapter, bool]:
    """The adapter at the rank asked for, or at the least served one that holds all of it.

    Args:
        asked: one of `SERVED_RANKS`; None: as large as need be, 512 at the most.
    Returns:
        It, and whether its update was cut.
    """
    limit = asked or SERVED_RANKS[-1]
    if adapter.rank > limit:
        return truncated(adapter, limit), True
    rank = asked or next(rank for rank in SERVED_RANKS if rank >= adapter.rank)
    return padded(adapter, rank), False


def padded(adapter: RoundAdapter, rank: int) -> RoundAdapter:
    """The same update at a higher rank: rows of A and columns of B that are zero."""
    more = rank - adapter.rank
    weights = {
        key: pad(value, (0, 0, 0, more) if ".lora_A." in key else (0, more))
        for key, value in adapter.weights.items()
    }
    return _with_weights(adapter, weights, rank, adapter.scale)


def truncated(adapter: RoundAdapter, rank: int) -> RoundAdapter:
    """The nearest update of this rank, module by module, in the Frobenius norm.

    Never forms B A: with B = Q_b R_b and A^T = Q_a R_a the SVD is of R_b R_a^T, of
    [rank, rank] at most. In fp64, then rounded to fp32.
    """
    weights = {}
    for module, (a, b) in factors(adapter).items():
        q_b, r_b = torch.linalg.qr(b.double() * adapter.scale)
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root = s[:rank].sqrt()
        cut_a = root[:, None] * (v[:rank] @ q_a.T)  # [rank or less, in]
        cut_b = q_b @ u[:, :rank] * root  # [out, rank or less]
        lack = rank - len(root)  # a module narrower than the rank
        weights[f"{module}.lora_A.weight"] = pad(cut_a.float(), (0, 0, 0, lack)).contiguous()
        weights[f"{module}.lora_B.weight"] = pad(cut_b.float(), (0, lack)).contiguous()
    return _with_weights(adapter, weights, rank, 1.0)


def factors(adapter: RoundAdapter) -> dict[str, Factors]:
    """Module, by its name in a PEFT file -> A and B."""
    modules = sorted({key.rpartition(".lora_")[0] for key in adapter.weights})
    return {
        module: (
            adapter.weights[f"{module}.lora_A.weight"],
            adapter.weights[f"{module}.lora_B.weight"],
        )
        for module in modules
    }


def updates(adapter: RoundAdapter) -> dict[str, torch.Tensor]:
    """Module, by its name in the base -> what the adapter adds to its weight: [out, in] fp32."""
    return {
        module.removeprefix(PREFIX): adapter.scale * (b.float() @ a.float())
        for module, (a, b) in factors(adapter).items()
    }


def require_sound(adapter: RoundAdapter, base: nn.Module, folder: Path) -> None:
    """Refuses an adapter that is not a plain LoRA on this base.

    Args:
        base: the model without any adapter.
        folder: where the adapter lies, for the message.
    Raises:
        UserError: no weights, another adapter type, a part without its other half, a module that
            the base has not, another shape, a number that is not finite.
    """
    weights_file = folder / "adapter_model.safetensors"
    _require_config(adapter, folder / "adapter_config.json")
    if not adapter.weights:
        raise UserError(f"{weights_file} holds no weights: it is an adapter that does nothing")
    linears = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
    for key, value in adapter.weights.items():
        wanted = _wanted_shape(key, adapter, linears)
        if wanted is None:
            raise UserError(
                f"{weights_file}: {key} is no half of a LoRA on a linear module of this base; "
                "was the adapter made on another model?"
            )
        if tuple(value.shape) != wanted:
            raise UserError(
                f"{weights_file}: {key} is {list(value.shape)}, {list(wanted)} fits this base; "
                "was the adapter made on another model?"
            )
        if not value.isfinite().all():
            raise UserError(f"{weights_file}: {key} holds numbers that are not finite")
        if _other_half(key) not in adapter.weights:
            raise UserError(f"{weights_file}: {key} is there without {_other_half(key)}")


def _require_config(adapter: RoundAdapter, file: Path) -> None:
    config = adapter.config
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{file}: r is {rank!r} and lora_alpha {alpha!r}; two numbers are needed")
    if not isinstance(config.get("target_modules"), list):
        raise UserError(f"{file}: target_modules is not a list of names")
    try:
        require_plain(adapter)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _wanted_shape(
    key: str, adapter: RoundAdapter, linears: Mapping[str, nn.Linear]
) -> tuple[int, int] | None:
    """The shape that a part of the adapter must have; None: there is no place for it."""
    module, _, half = key.removeprefix(PREFIX).rpartition(".lora_")
    linear = linears.get(module)
    if linear is None or not key.startswith(PREFIX):
        return None
    shapes = {
        "A.weight": (adapter.rank, linear.in_features),
        "B.weight": (linear.out_features, adapter.rank),
    }
    return shapes.get(half)


def _other_half(key: str) -> str:
    first, second = ".lora_A.", ".lora_B."
    return key.replace(first, second) if first in key else key.replace(second, first)


def _with_weights(
    adapter: RoundAdapter, weights: dict[str, torch.Tensor], rank: int, scale: float
) -> RoundAdapter:
    alpha = scale * rank
    whole = int(alpha) if float(alpha).is_integer() else alpha
    config: dict[str, Any] = dict(adapter.config) | {"r": rank, "lora_alpha": whole}
    return replace(adapter, config=config, weights=weights)
