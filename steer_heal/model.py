"""A base model and its stack of adapters: loading, the layers of its decoder, the student.

The model is loaded once a run; a student is a view on it that says which adapters act. What acts is
the stack folded into one adapter, put on the model when the student first runs: seven adapters of
rank 8 take the embedded model 1.5 to 2.1 times as long as none, one of rank 56 takes 1.2 to 1.3
times. The untouched base and every earlier student stay available through the same modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn

from eval.errors import UserError
from eval.files import digest_of
from eval.loading import load_model, load_outline, parameter_bytes, pick_device
from eval.model_files import weights_hash
from steer_heal.artifacts import RoundAdapter
from steer_heal.model_folder import resolve_model
from steer_heal.stack import attach_saved, detach, fold, only

_MOST_STACKS = 2  # on the model at once: a student's and that of the one after it


@dataclass(kw_only=True)
class LoadedModel:
    """A base model in memory; `model` becomes a PeftModel when the first adapter is attached."""

    model: Any
    tokenizer: Any
    model_id: str
    weights_hash: str  # SHA-256 over the weight files; empty where they were not read
    device: torch.device  # that it is on, or is to be put on
    parameter_bytes: int  # of the base alone
    layers: list[nn.Module]  # of the text decoder, first to last
    linear_names: list[list[str]]  # full names of the linear modules, a layer
    stacks: dict[str, tuple[RoundAdapter, ...]] = field(default_factory=dict)  # that are put on
    num_running: int = 0

    def put_on(self, stack: tuple[RoundAdapter, ...]) -> list[str]:
        """The name of what acts for a stack, on the model from now on; none for an empty one.

        Those used last stay there, too.
        """
        if not stack:
            return []
        name = "_".join(adapter.name for adapter in stack)
        there = self.stacks.pop(name, ())
        if [id(adapter) for adapter in there] != [id(adapter) for adapter in stack]:
            assert self.num_running == 0, "what acts inside would be let loose"
            oldest = list(self.stacks)[: max(0, len(self.stacks) + 1 - _MOST_STACKS)]
            for gone in [*oldest, *([name] if there else [])]:
                self.stacks.pop(gone, None)
                self.model = detach(self.model, gone)
            with torch.inference_mode(False):  # else no later round could train beside it
                self.model = attach_saved(self.model, fold(stack, name))
        self.stacks[name] = stack  # the last one is the one used last
        return [name]


@dataclass(frozen=True, kw_only=True)
class Student:
    """The base with a stack of adapters acting on it."""

    loaded: LoadedModel
    adapters: tuple[RoundAdapter, ...] = ()

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def base(self) -> Student:
        """The untouched base, through the same modules."""
        return replace(self, adapters=())

    @property
    def names(self) -> list[str]:
        return [adapter.name for adapter in self.adapters]

    @contextmanager
    def running(self) -> Iterator[Any]:
        """The model in eval mode with exactly this student's adapters acting."""
        acting = self.loaded.put_on(self.adapters)
        model = self.loaded.model.eval()
        self.loaded.num_running += 1
        try:
            with only(model, acting):
                yield model
        finally:
            self.loaded.num_running -= 1

    def grown(self, adapter: RoundAdapter) -> Student:
        """This student with one more adapter on top."""
        return replace(self, adapters=(*self.adapters, adapter))

    def with_only(self, names: Sequence[str]) -> Student:
        """This student with those of its adapters alone."""
        kept = tuple(adapter for adapter in self.adapters if adapter.name in names)
        return replace(self, adapters=kept)

    def band(self, shares: tuple[float, float]) -> list[int]:
        """Indices of the layers whose output lies within these shares of the depth."""
        return layer_band(len(self.loaded.layers), shares)

    def digest(self) -> str:
        return digest_of([self.loaded.weights_hash, *(a.digest() for a in self.adapters)])


def layer_band(num_layers: int, shares: tuple[float, float]) -> list[int]:
    """Layers l with low < (l + 1) / num_layers <= high; the nearest one where there is none."""
    low, high = shares
    band = [layer for layer in range(num_layers) if low < (layer + 1) / num_layers <= high]
    return band or [max(0, min(num_layers - 1, round((low + high) / 2 * num_layers) - 1))]


def load_student(model_id: str, stack: Sequence[RoundAdapter], device: str = "auto") -> Student:
    """Loads the base, for it and the adapters of earlier rounds to act.

    Args:
        model_id: the embedded model's name, a local folder, or a hub id (with @revision or not).
    Raises:
        UserError: not found, out of reach, without weights, or without a chat template.
    """
    folder = resolve_model(model_id)
    model, tokenizer = load_model(folder, model_id, device)
    model.requires_grad_(False)
    model.name_or_path = model_id  # PEFT writes it into every adapter: the id, not a cache's path
    logger.info("model {}: {:.1f} M parameters on {}", model_id, num_millions(model), model.device)
    student = _student(model, tokenizer, model_id, folder, model.device, weights_hash(folder))
    return replace(student, adapters=tuple(stack))


def outline_student(model_id: str, device: str = "auto") -> Student:
    """The base without its weights: what can be counted before they are read.

    Raises:
        UserError: as `load_student`, but for what is wrong with the weights.
    """
    folder = resolve_model(model_id)
    model, tokenizer = load_outline(folder, model_id, device)
    return _student(model, tokenizer, model_id, folder, pick_device(device), "")


def _student(
    model: Any, tokenizer: Any, model_id: str, folder: Path, device: torch.device, weights: str
) -> Student:
    layers = decoder_layers(model)
    return Student(
        loaded=LoadedModel(
            model=model,
            tokenizer=tokenizer,
            model_id=model_id,
            weights_hash=weights,
            device=device,
            parameter_bytes=parameter_bytes(model, folder),
            layers=layers,
            linear_names=linear_names(model, layers),
        )
    )


def require_weights(student: Student, weights_hash: str, run_path: Path) -> None:
    """Raises UserError where the weights of a student's base are not those of a run."""
    if student.loaded.weights_hash != weights_hash:
        raise UserError(
            f"model {student.loaded.model_id} is not the one that {run_path} was made on: its "
            "weights have changed, and an adapter fits no others"
        )


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of the text decoder, first to last, for any family.

    Raises:
        UserError: they cannot be told.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    for name in ("layers", "h", "blocks", "layer"):
        found = getattr(decoder, name, None)
        if isinstance(found, nn.ModuleList) and len(found) >= count:
            return list(found[:count])
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise UserError(f"{type(model).__name__}: its {count} decoder layers cannot be found")
    return list(lists[0])


def linear_names(model: Any, layers: Sequence[nn.Module]) -> list[list[str]]:
    """Full names of the linear modules, a decoder layer: what an adapter can be put on."""
    names = {module: name for name, module in model.named_modules()}
    return [
        [names[module] for module in layer.modules() if isinstance(module, nn.Linear)]
        for layer in layers
    ]


def num_millions(model: Any) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
