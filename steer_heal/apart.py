"""A run in a process of its own: nothing of one run, its memory least, is left to the next."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from eval.errors import UserError

_PROGRAM = "from steer_heal.cli import main; main()"


def run_apart(label: str, settings: Sequence[str]) -> None:
    """`steer-heal round SETTINGS` to its end; what it says is seen.

    Args:
        label: what the message calls the run.
    Raises:
        UserError: it ended with another exit code than 0.
    """
    done = subprocess.run([sys.executable, "-c", _PROGRAM, "round", *settings])
    if done.returncode != 0:
        raise UserError(f"{label}: the run ended with exit code {done.returncode}")
