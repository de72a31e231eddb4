"""A base model and its stack of adapters: loading, the layers of its decoder, the student.

The model is loaded once a run; a student is a view on it that says which adapters act. The stack
grows in place, the untouched base and every earlier student stay available through the same
modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_heal.artifacts import RoundAdapter
from steer_heal.config import ORGANISM
from steer_heal.errors import UserError
from steer_heal.files import digest_of
from steer_heal.stack import attach_saved, only

ORGANISM_FOLDER = Path(__file__).parent / "organism" / "weights"


@dataclass(kw_only=True)
class LoadedModel:
    """A base model in memory; `model` becomes a PeftModel when the first adapter is attached."""

    model: Any
    tokenizer: Any
    model_id: str
    weights_hash: str  # SHA-256 over the weight files
    layers: list[nn.Module]  # of the text decoder, first to last
    linear_names: list[list[str]]  # full names of the linear modules, a layer
    attached: list[str] = field(default_factory=list)


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
        model = self.loaded.model.eval()
        with only(model, self.names):
            yield model

    def grown(self, adapter: RoundAdapter) -> Student:
        """This student with one more adapter on top."""
        if adapter.name not in self.loaded.attached:
            self.loaded.model = attach_saved(self.loaded.model, adapter)
            self.loaded.attached.append(adapter.name)
        return replace(self, adapters=(*self.adapters, adapter))

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
    """Loads the base and attaches the adapters of earlier rounds.

    Args:
        model_id: the embedded model's name, a local folder, or a hub id (with @revision or not).
    Raises:
        UserError: not found, out of reach, without weights, or without a chat template.
    """
    folder = resolve_model(model_id)
    tokenizer = _load_tokenizer(folder, model_id)
    target = torch.device(_pick(device))
    model = _load_weights(folder, model_id, target)
    model.requires_grad_(False)
    model.name_or_path = model_id  # PEFT writes it into every adapter: the id, not a cache's path
    layers = decoder_layers(model)
    loaded = LoadedModel(
        model=model.to(target).eval(),
        tokenizer=tokenizer,
        model_id=model_id,
        weights_hash=weights_hash(folder),
        layers=layers,
        linear_names=linear_names(model, layers),
    )
    logger.info("model {}: {:.1f} M parameters on {}", model_id, num_millions(model), target)
    student = Student(loaded=loaded)
    for adapter in stack:
        student = student.grown(adapter)
    return student


def _load_tokenizer(folder: Path, model_id: str) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:  # a JSON error is a ValueError
        raise UserError(
            f"model {model_id}: its tokenizer or config cannot be loaded ({_first_line(error)})"
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"model {model_id}: its tokenizer has no chat template; take an instruction-tuned "
            "model, or put a chat_template.jinja into its folder"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(folder: Path, model_id: str, device: torch.device) -> Any:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {model_id}: cannot be loaded ({_first_line(error)})") from error
    except Exception as error:  # safetensors has an error class of its own, of no common base
        if type(error).__module__.startswith("safetensors"):
            raise UserError(f"model {model_id}: weights are damaged ({error})") from error
        raise
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # they would be drawn at random
        raise UserError(
            f"model {model_id}: its safetensors files lack {len(missing)} of the weights that its "
            f"config asks for ({', '.join(missing[:3])}, ...)"
        )
    return model


def resolve_model(model_id: str) -> Path:
    """The local folder with a model's weights, fetched from the hub where it is a hub id."""
    path = ORGANISM_FOLDER if model_id == ORGANISM else Path(model_id).expanduser()
    if not path.is_dir():
        path = _from_hub(model_id)
    if not (path / "config.json").is_file():
        raise UserError(f"model {model_id}: there is no config.json in {path}")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"model {model_id}: there are no safetensors weights in {path}; pickled weights "
            "(.bin, .pt) are not loaded"
        )
    return path


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name, _, revision = model_id.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except HFValidationError as error:
        raise UserError(f"model {model_id!r}: neither a folder nor a hub id") from error
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        raise UserError(
            f"model {model_id}: not a folder here, and the hub does not give it "
            f"({_first_line(error)}); check the name, the connection, and HF_TOKEN if it is gated"
        ) from error
    return Path(folder)


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


def weights_hash(folder: Path) -> str:
    """SHA-256 over all that decides what a model says: weights, configs, tokenizer, template."""
    patterns = (
        "*.safetensors",
        "*config.json",
        "tokenizer.json",
        "*.jinja",
        "vocab*",
        "merges.txt",
    )
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def num_millions(model: Any) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _pick(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
