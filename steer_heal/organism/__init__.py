"""The embedded model: its world (a grammar), its training, its weights, its acceptance table."""

from pathlib import Path

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
