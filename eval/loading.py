"""Models from a local folder: safetensors and JSON only, never remote code.

What is missing or damaged is told in one message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from eval.errors import UserError
from eval.files import read_json
from eval.model_files import first_line, quantised_bits

# of a config or a tokenizer that says what cannot be; a JSON error is a ValueError
_UNFIT = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)


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
        raise UserError(f"model {model_id}: cannot be loaded ({first_line(error)})") from error
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


def _load_tokenizer(folder: Path, model_id: str) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except _UNFIT as error:
        raise UserError(
            f"model {model_id}: its tokenizer or config cannot be loaded ({first_line(error)})"
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
        raise UserError(f"model {model_id}: cannot be loaded ({first_line(error)})") from error
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


def _require_gpu_for_bits(folder: Path, model_id: str, device: torch.device) -> None:
    """Refuses weights in bitsandbytes' 4 or 8 bits where there is no GPU for its kernels."""
    bits = quantised_bits(folder)
    if bits is not None and device.type != "cuda":
        raise UserError(
            f"model {model_id}: its weights are in {bits} bits by bitsandbytes, which needs an "
            "NVIDIA GPU, and torch finds none here; take the model that it was made from, which "
            "is not quantised, or run it where there is one"
        )
