"""Models from a local folder or the Hub: safetensors and JSON only, never remote code.

What is missing, damaged or out of reach is told in one message.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from eval.errors import UserError
from eval.files import read_json

# of a config or a tokenizer that says what cannot be; a JSON error is a ValueError
_UNFIT = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)


def find_model(model_id: str | Path) -> Path:
    """The local folder with a model's weights, fetched from the hub where it is a hub id."""
    folder = local_model(model_id)
    if folder is None:
        folder = _from_hub(str(model_id))
        _require_weights(folder, model_id)
    return folder


def local_model(model_id: str | Path) -> Path | None:
    """The folder with a model's weights; None where the hub is to be asked. Takes no time.

    Raises:
        UserError: a folder without a model in it, or neither a folder nor what a hub id can be.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(model_id).expanduser()
    if path.is_dir():
        _require_weights(path, model_id)
        return path
    try:
        validate_repo_id(str(model_id).partition("@")[0])
    except HFValidationError as error:
        raise UserError(f"model {str(model_id)!r}: neither a folder nor a hub id") from error
    return None


def load_model(folder: Path, model_id: str, device: str = "auto") -> tuple[Any, Any]:
    """The model in eval mode, and its tokenizer.

    Args:
        model_id: what error messages call it.
        device: cpu, cuda, mps; auto takes a GPU where there is one.
    Raises:
        UserError: no such device, what cannot be loaded, or a tokenizer without a chat template.
    """
    logging.disable_progress_bar()
    target = pick_device(device)
    tokenizer = _load_tokenizer(folder, model_id)
    return _load_weights(folder, model_id, target).to(target).eval(), tokenizer


def load_outline(folder: Path, model_id: str, device: str = "auto") -> tuple[Any, Any]:
    """The same model without its weights, on torch's meta device, and its tokenizer.

    It has its shapes and its names, takes no memory and computes nothing.

    Raises:
        UserError: as `load_model`, but for what is wrong with the weights.
    """
    target = pick_device(device)
    tokenizer = _load_tokenizer(folder, model_id)
    _require_gpu_for_bits(folder, model_id, target)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=_number_format(target))
    except (*_UNFIT, RuntimeError, ImportError) as error:
        raise UserError(f"model {model_id}: cannot be loaded ({_first_line(error)})") from error
    return model.eval(), tokenizer


def pick_device(device: str) -> torch.device:
    """Where a model is put.

    Args:
        device: cpu, cuda, mps; auto takes a GPU where there is one.
    Raises:
        UserError: there is no such device.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device("cuda" if here["cuda"] else "cpu")
    if not here.get(device, True):
        raise UserError(
            f"device={device}: torch finds no such device here; device=auto takes what there is"
        )
    return torch.device(device)


def parameter_bytes(model: Any, folder: Path) -> int:
    """Bytes that a model's parameters take; quantised, by whatever way, about what its files do."""
    if read_json(folder / "config.json").get("quantization_config"):
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return sum(each.numel() * each.element_size() for each in model.parameters())


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


def _require_weights(folder: Path, model_id: str | Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"model {model_id}: there is no config.json in {folder}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {model_id}: there are no safetensors weights in {folder}; pickled weights "
            "(.bin, .pt) are not loaded"
        )
    for index in folder.glob("*.safetensors.index.json"):
        content = read_json(index)
        shards = content.get("weight_map", {}).values() if isinstance(content, dict) else ()
        for name in sorted({str(shard) for shard in shards}):
            if Path(name).name != name:  # it would be loaded, and be in no hash
                raise UserError(f"model {model_id}: {index} names a file elsewhere: {name!r}")


def _load_tokenizer(folder: Path, model_id: str) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except _UNFIT as error:
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
    _require_gpu_for_bits(folder, model_id, device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_number_format(device),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
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


def _number_format(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def quantised_bits(folder: Path) -> int | None:
    """4 or 8 where bitsandbytes wrote a model's weights in so many bits; None: it did not."""
    quantised = read_json(folder / "config.json").get("quantization_config") or {}
    return next((n for n in (4, 8) if quantised.get(f"load_in_{n}bit")), None)


def _require_gpu_for_bits(folder: Path, model_id: str, device: torch.device) -> None:
    """Refuses weights in bitsandbytes' 4 or 8 bits where there is no GPU for its kernels."""
    bits = quantised_bits(folder)
    if bits is not None and device.type != "cuda":
        raise UserError(
            f"model {model_id}: its weights are in {bits} bits by bitsandbytes, which needs an "
            "NVIDIA GPU, and torch finds none here; take the model that it was made from, which "
            "is not quantised, or run it where there is one"
        )


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = model_id.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        raise UserError(
            f"model {model_id}: not a folder here, and the hub does not give it "
            f"({_first_line(error)}); check the name, the connection, and HF_TOKEN if it is gated"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    within = error.__cause__ if isinstance(error, StrictDataclassError) else None
    said = str(within or error).strip()
    return said.splitlines()[0] if said else type(error).__name__
