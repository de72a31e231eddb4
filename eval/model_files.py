"""The files of a model, in a local folder or on the Hub, before anything is loaded.

Imports nothing heavy: what is missing is told at once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from eval.errors import UserError
from eval.files import read_json


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
    path = Path(model_id).expanduser()
    if path.is_dir():
        _require_weights(path, model_id)
        return path
    try:
        validate_repo_id(str(model_id).partition("@")[0])
    except HFValidationError as error:
        raise UserError(f"model {str(model_id)!r}: neither a folder nor a hub id") from error
    return None


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


def quantised_bits(folder: Path) -> int | None:
    """4 or 8 where bitsandbytes wrote a model's weights in so many bits; None: it did not."""
    quantised = read_json(folder / "config.json").get("quantization_config") or {}
    return next((n for n in (4, 8) if quantised.get(f"load_in_{n}bit")), None)


def first_line(error: Exception) -> str:
    """What a library's error says, on one line."""
    within = error.__cause__ if isinstance(error, StrictDataclassError) else None
    said = str(within or error).strip()
    return said.splitlines()[0] if said else type(error).__name__


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


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = model_id.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        raise UserError(
            f"model {model_id}: not a folder here, and the hub does not give it "
            f"({first_line(error)}); check the name, the connection, and HF_TOKEN if it is gated"
        ) from error
    return Path(folder)
