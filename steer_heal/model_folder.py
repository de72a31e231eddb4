"""Where a model's files are: the embedded one by its name, others in a folder or on the Hub."""

from __future__ import annotations

from pathlib import Path

from eval.model_files import find_model, local_model
from steer_heal.config import ORGANISM

ORGANISM_FOLDER = Path(__file__).parent / "organism" / "weights"


def check_model(model_id: str) -> None:
    """Refuses at once a model that needs no look at the hub to be known as missing."""
    local_model(_place(model_id))


def resolve_model(model_id: str) -> Path:
    """The local folder with a model's weights; the embedded model is known by its name."""
    return find_model(_place(model_id))


def _place(model_id: str) -> str | Path:
    return ORGANISM_FOLDER if model_id == ORGANISM else model_id
