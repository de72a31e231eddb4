"""Measures speed and writes docs/BENCH.md: every row the same work done two ways, side by side.

What a ratio is stands in `side_by_side.py`. Peak memory is that of a process of its own, less what
it held before. The ratio of rounds is read off a run's own log.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from eval.errors import UserError
from eval.files import write_text
from steer_heal.peers import peer_rows
from steer_heal.rounds import LOG_FILE
from steer_heal.side_by_side import Ratio
from steer_heal.speed_heal import heal_rows, memory_row
from steer_heal.speed_models import Models
from steer_heal.speed_sampling import sampling_rows

PAGE = Path("docs/BENCH.md")
MEMORY = "memory"
_PACKAGES = ("torch", "transformers", "trl", "peft")

_BOTH_SIDES = """\
- **drafts**: ours is what a round samples with, two doses in turn, without the KL that a round then
  measures on the first 32 of each dose. One at a time is transformers' `generate` on one prompt,
  its cache on, the same hook on, sampling at temperature 1 to the same limit. Random weights hardly
  ever end a reply, the embedded model ends after 38 tokens in the mean.
- **a decoding step**: ours has attention, norms, hook, sampling, and the reading of one prompt that
  all rows share, over 16 steps. The products are the model's own linear modules on as many rows.
- **replies, logits, rows that end replaced**: both ways are ours; the others read a prompt again
  for every reply to it, or wait for the longest reply of a batch before the next is begun.
- **vignettes**: ours as many rows at a time as a run takes. One at a time is `generate` for the
  think of each frame, greedy, then a forward pass over the whole row.
- **heal**: the same rows, modules, rank, optimizer and epochs (2) on both sides, setting up
  included. What the frozen side says is read once before the first step, which is counted, too.
- **extraction**: the other way encodes the same prompts, runs the same batches and keeps nothing.
"""


def round_seconds(log: str) -> list[float]:
    """Seconds that the stages of each round took, in order, from the text of a run's log.

    A round that was stopped and begun again has several lines: their sum.
    """
    found: dict[int, float] = defaultdict(float)
    for line in log.splitlines():
        if took := re.search(r"round (\d+) \(round-\d+\) took (.*)", line):
            spent = re.findall(r"\S+ ([\d.]+) s \(", took[2])
            found[int(took[1])] += sum(map(float, spent))
    return [found[number] for number in sorted(found)]


def rounds_row(run: Path) -> Ratio:
    """A run's rounds against as many times its first, from its own log.

    Raises:
        UserError: it has no log, or fewer than two rounds in it.
    """
    file = run / LOG_FILE
    seconds = round_seconds(file.read_text(encoding="utf-8")) if file.is_file() else []
    if len(seconds) < 2:
        raise UserError(f"{file}: fewer than two finished rounds in it; give the folder of a run")
    return Ratio(
        what=f"{len(seconds)} rounds of a run, wall time",
        against=f"{len(seconds)} times its first round",
        asked=1 / 1.15,
        values=(len(seconds) * seconds[0] / sum(seconds),),
    )


def measured(models: Models, names: Sequence[str], repeats: int) -> tuple[list[Ratio], list[str]]:
    """The rows of these names, all where none is named, and what is to be said under the table.

    Raises:
        UserError: there is no such row.
    """
    rows = [*sampling_rows(models), *heal_rows(models)]
    known = [*(row.name for row in rows), MEMORY]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no row {unknown[0]!r}; there are: {', '.join(known)}")
    found = [row.measure(repeats) for row in rows if not names or row.name in names]
    if names and MEMORY not in names:
        return found, []
    memory, sentence = memory_row()
    return [*found, memory], [sentence]


def page(rows: Sequence[Ratio], said: Sequence[str], repeats: int, more: str = "") -> str:
    """The whole of docs/BENCH.md.

    Args:
        more: of the command that measured it, after the repeats.
    """
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return "\n".join(
        [
            "# Speed",
            "",
            f"Measured by `just speed --repeats {repeats}{more}` on {datetime.now(UTC):%Y-%m-%d}: "
            f"{platform.machine()}, {os.cpu_count()} cores, of which one was used, no GPU; "
            f"Python {platform.python_version()}, {packages}.",
            "",
            "A ratio is the other way's CPU seconds over ours for the same amount of work, the",
            f"median of {repeats} turns taken side by side in one run, with the smallest and the",
            "largest; above 1 ours is faster. What was asked for as a share of the other way's",
            "time stands turned over: at most 1.15 of it is at least 0.87x.",
            "",
            "| what | against | ratio | over turns | asked |",
            "| --- | --- | --- | --- | --- |",
            *map(str, rows),
            "",
            *said,
            "",
            "What is in each side (weights in fp32 but where bf16 is said):",
            "",
            _BOTH_SIDES,
            "Not measured: a GPU, several processes, a natural model's weights.",
        ]
    )


def main() -> None:
    """Measures the rows; all of them write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of the two ways")
    parser.add_argument("--only", action="append", default=[], help="a row's name; no page")
    parser.add_argument("--run", type=Path, help="a run whose rounds are compared with its first")
    parser.add_argument("--peers", action="store_true", help="other libraries too; installs them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        rounds = [] if given.run is None else [rounds_row(given.run)]
        with tempfile.TemporaryDirectory() as scratch:
            rows, said = measured(Models(Path(scratch)), given.only, given.repeats)
            peers = peer_rows(Path(scratch), given.repeats) if given.peers else []
    except UserError as error:
        parser.error(str(error))
    more = " --peers" * given.peers + " --run RUN" * (given.run is not None)
    found = page([*rows, *peers, *rounds], said, given.repeats, more)
    if not given.only:
        write_text(PAGE, found + "\n")
    print(found)


if __name__ == "__main__":
    main()
