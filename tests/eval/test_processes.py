"""Real processes at one piece of work: what is shared out, who does it, what a failure comes to."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from eval.errors import UserError
from eval.processes import count, is_main, joined, on_main, own, spread, total
from tests.processes import Finished, Work, together


def ended(folder: Path, work: Callable[[], None], num: int = 2) -> list[Finished]:
    """The same work in several processes, to their end."""
    running = [Work(folder, environment, work) for environment in together(num)]
    return [each.end() for each in running]


def share(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    seen: list[int] = []

    def squares(rows: list[int]) -> list[int]:
        seen.extend(rows)
        return [row * row for row in rows]

    @on_main
    def write() -> list:
        with (folder / "written").open("a") as file:
            file.write("once ")
        return [rank, spread(squares, range(3))]  # by itself: nobody else works on these rows

    with joined("cpu"):
        parts = [torch.ones(2, 2) * rank, torch.tensor(3.0)]
        found = {
            "all": spread(squares, "abacdeb"),
            "mine": sorted(seen),
            "none": spread(squares, ""),
            "one": spread(squares, "a"),
            "main": write(),
            "is main": is_main(),
            "count": count(),
            "own": own(5),
            "total": [each.tolist() for each in total(parts)],
            "libraries see": [key for key in ("RANK", "WORLD_SIZE") if key in os.environ],
        }
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def test_each_does_its_share_and_all_have_the_whole(tmp_path: Path) -> None:
    done = ended(tmp_path, partial(share, tmp_path))
    assert [each.code for each in done] == [0, 0], done
    first, second = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2))
    for found in (first, second):
        assert found["all"] == [0, 1, 4, 9, 16, 25, 36]
        assert (found["none"], found["one"]) == ([], [0])
        assert found["main"] == [0, [0, 1, 4]]
        assert found["total"] == [[[1, 1], [1, 1]], 6]
        assert (found["count"], found["libraries see"]) == (2, [])
    # a, b, c, d, e are dealt to 0, 1, 1, 0, 0: those that are alike stay together
    assert (first["mine"], second["mine"]) == ([0, 2, 4, 5], [1, 3, 6])
    assert (first["own"], second["own"]) == ([0, 2, 4], [1, 3])
    assert (first["is main"], second["is main"]) == (True, False)
    assert (tmp_path / "written").read_text() == "once "


def fail(where: str, failing: int, error: Exception | signal.Signals) -> None:
    rank = int(os.environ["RANK"])

    def work(rows: list[int]) -> list[int]:
        if rank != failing:
            return rows
        if isinstance(error, Exception):
            raise error
        os.kill(os.getpid(), error)
        return []

    with joined("cpu"):
        if where == "in shared work":
            spread(work, range(4))
        elif where == "of the main process":
            on_main(work)([])
        else:
            work([])
        total([torch.ones(1)])
        raise AssertionError("it went on")


@pytest.mark.parametrize(
    ("where", "failing"),
    [("in shared work", 1), ("of the main process", 0), ("between", 1), ("between", 0)],
)
def test_a_failure_of_one_ends_all_and_is_told_once(
    tmp_path: Path, where: str, failing: int
) -> None:
    main, other = ended(tmp_path, partial(fail, where, failing, UserError("it does not fit")))
    assert (main.code, other.code) == (2, 2), (main, other)
    assert (main.err, other.err) == ("error: it does not fit\n", "")


def test_a_failure_of_all_is_told_once(tmp_path: Path) -> None:
    done = ended(tmp_path, partial(refuse, "the model has no layers"), num=3)
    assert [each.code for each in done] == [2, 2, 2], done
    assert [each.err for each in done] == ["error: the model has no layers\n", "", ""]


def refuse(message: str) -> None:
    with joined("cpu"):
        raise UserError(message)


def test_a_fault_of_ours_shows_where_it_was(tmp_path: Path) -> None:
    main, other = ended(tmp_path, partial(fail, "in shared work", 1, KeyError("lost")))
    assert (main.code, other.code) == (1, 1), (main, other)
    assert "KeyError: 'lost'" in main.err
    assert "in work" in main.err


def test_one_that_is_killed_keeps_nobody_waiting(tmp_path: Path) -> None:
    main, other = ended(tmp_path, partial(fail, "in shared work", 1, signal.SIGKILL))
    assert (main.code, other.code) == (2, -signal.SIGKILL)
    assert main.err.startswith("error: another process of this run has ended without a word")


def test_alone_a_process_does_everything() -> None:
    seen: list[int] = []

    def work(rows: list[int]) -> list[int]:
        seen.extend(rows)
        return rows

    part = torch.ones(3)
    assert spread(work, "abca") == [0, 1, 2, 3]
    assert seen == [0, 1, 2, 3]  # in one piece, in the rows' order
    assert on_main(lambda: "done")() == "done"
    assert total([part])[0] is part
    assert (is_main(), count(), own(3)) == (True, 1, [0, 1, 2])
