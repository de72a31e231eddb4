"""A command's manners: one message for what a person can put right, and no library's chatter.

Imports nothing heavy, so that a command can answer `--help` at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from eval.errors import Terminated, UserError
from eval.files import explain_disk
from eval.processes import is_main, is_to_join

IN_LOG_ALONE = "in_log_alone"  # marks a record of the log that no terminal is to show


@contextmanager
def for_people(if_stopped: str) -> Iterator[None]:
    """Turns what a person can put right into one message and exit code 2, Ctrl-C into 130.

    SIGTERM is taken as Ctrl-C is, with exit code 143.

    Args:
        if_stopped: what Ctrl-C leaves behind, as the message says it.
    """
    _set_up_libraries()
    try:
        with _terminable():
            yield
    except UserError as error:
        _end(f"error: {error}", 2)
    except OSError as error:
        _end(f"error: {error.filename or 'a file'}: {explain_disk(error)}", 2)
    except Terminated:
        _end(f"stopped; {if_stopped}", 128 + signal.SIGTERM)  # as shells count
    except KeyboardInterrupt:
        after_echo = "\n" if sys.stderr.isatty() else ""  # of ^C
        _end(f"{after_echo}stopped; {if_stopped}", 128 + signal.SIGINT)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated; among several processes it kills, as one may wait for another."""
    if is_to_join() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not Python's own


def _raise_terminated(number: int, frame: object) -> None:
    raise Terminated


# Turns that a thread of GNU's OpenMP waits for the others before it sleeps. Its own 300,000 are for
# a machine with nothing else to do: beside other work threads wait for one that does not run, and a
# pass took 1.2 to 1.7 times as long as with these, at worse times 5; 3 % dearer on a quiet one.
_SPINS = "2000"


def _set_up_libraries() -> None:
    """Sets what is not set yet, before they are loaded, so that a user can ask for something else.

    Their messages are for those who work on them; how threads wait matters on a busy machine.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _end(message: str, code: int) -> None:
    if is_main():
        typer.echo(message, err=True)
    raise typer.Exit(code)
