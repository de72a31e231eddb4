"""A run in processes of its own: one, so that nothing of a run is left to the next, or several."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from eval.errors import UserError

_ROUND = (sys.executable, "-m", "steer_heal", "round")
_GRACE_S = 60.0  # for the main process to tell of another's failure, or to stop: most take 1
_LOOK_S = 0.1


def run_apart(label: str, settings: Sequence[str]) -> None:
    """`steer-heal round SETTINGS` to its end; what it says is seen.

    Args:
        label: what the message calls the run.
    Raises:
        UserError: it ended with another exit code than 0.
    """
    done = subprocess.run([*_ROUND, *settings])
    if done.returncode != 0:
        raise UserError(f"{label}: the run ended with exit code {done.returncode}")


def run_together(num_processes: int, settings: Sequence[str]) -> int:
    """`steer-heal round SETTINGS` in several processes at one run; how the main one ended.

    They find one another as those of torchrun do. The cores are shared out among them.

    Raises:
        UserError: one of them was killed.
    """
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    workers = [
        subprocess.Popen(
            [*_ROUND, *settings],
            env=environment | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
            start_new_session=True,  # Ctrl-C reaches this process alone, which hands it on
        )
        for rank in range(num_processes)
    ]
    try:
        return _ended(workers)
    except KeyboardInterrupt:
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        return _last(workers[0])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _ended(workers: Sequence[subprocess.Popen]) -> int:
    """Waits for the main process, or for the first of the others that fails."""
    main = workers[0]
    while main.poll() is None and not any(worker.poll() for worker in workers):
        time.sleep(_LOOK_S)
    for number, worker in enumerate(workers, start=1):
        if (code := worker.poll()) is not None and code < 0:
            raise UserError(
                f"process {number} of {len(workers)} was ended by {signal.Signals(-code).name} "
                "(by hand, or for want of memory); the same command goes on from there"
            )
    return _last(main)


def _last(main: subprocess.Popen) -> int:
    """The exit code of a process that is about to end."""
    try:
        return main.wait(_GRACE_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"the main process did not end within {_GRACE_S:g} s of another, or of Ctrl-C, and was "
            "killed; the same command goes on from there"
        ) from error


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
