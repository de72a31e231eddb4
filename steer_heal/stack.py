"""Stacking: several LoRA adapters on one base, any subset of them active, history frozen.

    student = base + adapter[0] + ... + adapter[k-1]        each  W + (alpha / rank) * B A

Which adapters act is set by `only`, which touches neither `requires_grad` nor PEFT's own state.
`disable_adapter()` is never used: leaving it makes every frozen adapter trainable again. Folding a
stack into one adapter concatenates the saved factors in fp32 and is exact; PEFT's
`add_weighted_adapter` is not, outside plain equal LoRAs. A student runs with its stack folded.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from steer_heal.artifacts import RoundAdapter

_NOT_PLAIN = (  # settings of a LoRA with which it is more than (alpha / rank) * B A
    *("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    "monteclora_config",
)


@contextmanager
def only(model: Any, names: Sequence[str]) -> Iterator[None]:
    """Exactly these adapters act inside; none for the untouched base."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = list(names)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def lora_config(rank: int, alpha: float, target_modules: Sequence[str], base: str) -> LoraConfig:
    """A plain LoRA on modules given by their full names; B starts at 0, so it starts as nothing."""
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,  # dropout in frozen history would make KL(student, previous) positive
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def attach(model: Any, name: str, config: LoraConfig) -> PeftModel:
    """Adds a fresh adapter; everything is frozen, the fresh adapter too."""
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    freeze(model)
    return model.eval()


def attach_saved(model: Any, adapter: RoundAdapter) -> PeftModel:
    """Adds a trained adapter, frozen."""
    config = LoraConfig(**adapter.config)
    model = attach(model, adapter.name, config)
    result: Any = set_peft_model_state_dict(model, dict(adapter.weights), adapter_name=adapter.name)
    if result.unexpected_keys:
        raise ValueError(f"adapter {adapter.name}: no place for {result.unexpected_keys[:3]}")
    return model


def detach(model: PeftModel, name: str) -> Any:
    """Takes an adapter away again; without any left, gives the bare base back, bit for bit."""
    if set(model.peft_config) == {name}:
        return model.unload()
    with warnings.catch_warnings():  # it sets another one active, of which `only` takes no notice
        warnings.simplefilter("ignore", UserWarning)
        model.delete_adapter(name)
    freeze(model)
    return model


def freeze(model: Any) -> None:
    """No parameter is trainable."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


@contextmanager
def trainable(model: PeftModel, name: str) -> Iterator[list[torch.nn.Parameter]]:
    """Only the parameters of one adapter are trainable inside; yields them."""
    parameters = [p for key, p in model.named_parameters() if f".{name}." in key]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        freeze(model)


def trained_factors(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [rank, in] and B [out, rank] of every module whose adapter is trainable."""
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    a, b = ([p for key, p in trained if part in key] for part in (".lora_A.", ".lora_B."))
    return list(zip(a, b, strict=True))


def adapter_weights(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """One adapter's factors by their names in a PEFT file, fp32 on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().float().cpu().contiguous().clone() for key, value in state.items()}


def weights_digest(model: Any, names: Sequence[str]) -> str:
    """Hash of the named adapters' parameters as they are in the model."""
    digest = hashlib.sha256()
    for key, parameter in sorted(model.named_parameters()):
        if any(f".{name}." in key for name in names):
            digest.update(key.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def fold(adapters: Sequence[RoundAdapter], name: str = "folded") -> RoundAdapter:
    """One plain LoRA equal to the whole stack: rank and modules add up, nothing is approximated.

    With s_i = alpha_i / rank_i:  A = cat(A_i),  B = cat(s_i * B_i),  alpha = rank, in fp32. A
    module that an adapter does not have counts as zeros.

    Raises:
        ValueError: nothing to fold, or an adapter that is not a plain LoRA.
    """
    if not adapters:
        raise ValueError("no adapter to fold")
    for adapter in adapters:
        require_plain(adapter)
    rank = sum(adapter.rank for adapter in adapters)
    modules = sorted({key.rpartition(".lora_")[0] for a in adapters for key in a.weights})
    weights = {}
    for module in modules:
        a_key, b_key = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        shapes = next((a.weights[a_key], a.weights[b_key]) for a in adapters if a_key in a.weights)
        zero_a, zero_b = (
            shapes[0].new_zeros(1, shapes[0].shape[1]),
            shapes[1].new_zeros(shapes[1].shape[0], 1),
        )
        rows = [a.weights.get(a_key, zero_a.expand(a.rank, -1)) for a in adapters]
        columns = [a.weights.get(b_key, zero_b.expand(-1, a.rank)) * a.scale for a in adapters]
        weights[a_key] = torch.cat(rows, 0).contiguous()  # [rank, in]
        weights[b_key] = torch.cat(columns, 1).contiguous()  # [out, rank]
    targets = sorted({target for a in adapters for target in a.config["target_modules"]})
    config = dict(adapters[-1].config) | {"r": rank, "lora_alpha": rank, "target_modules": targets}
    return RoundAdapter(name=name, config=config, weights=weights, steps=())


def require_plain(adapter: RoundAdapter) -> None:
    """Refuses, by name, what is more than W + (alpha / rank) * B A.

    Raises:
        ValueError: DoRA, PiSSA and their like, a bias, whole modules, a rank or alpha a module.
    """
    if adapter.config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"adapter {adapter.name}: it is no LoRA and cannot be folded without loss")
    for field in _NOT_PLAIN:
        if adapter.config.get(field):
            raise ValueError(f"adapter {adapter.name}: {field} cannot be folded without loss")
    if adapter.config.get("bias", "none") != "none":
        raise ValueError(f"adapter {adapter.name}: bias cannot be folded without loss")
    if adapter.config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        # PiSSA, OLoRA, LoftQ and their like also change the base's weights
        raise ValueError(f"adapter {adapter.name}: init_lora_weights cannot be folded without loss")
