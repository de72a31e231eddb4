"""Early stop: real runs end by their saved shifts, and go on only where more patience is asked."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from loguru import logger

from steer_heal.config import resolve_config
from steer_heal.loop import run_rounds
from steer_heal.report import write_report
from steer_heal.saved import read_saved_run
from steer_heal.summary import Summary, summarise
from steer_heal.watch import early_stop
from tests.processes import rewind, tree
from tests.small import small_settings
from tests.tiny import tiny_model_folder

MOST = 8
LESS = [  # there are many rounds here, and what they come to is no matter
    "generate.max_new_tokens=4",
    "evaluate.samples_per_prompt=1",
    "evaluate.num_dialogues=1",
    "evaluate.max_new_tokens=4",
]


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A real run that was to have MOST rounds with patience=1, and ended before."""

    path: Path
    settings: list[str]  # but for N and patience
    said: str

    @property
    def num_rounds(self) -> int:
        return len(list(self.path.glob("round-*/DONE")))

    @property
    def done_line(self) -> str:
        return f"run {self.path.name} is done: {self.num_rounds} rounds; no "


def _said(path: Path, settings: list[str], **how_far: int) -> str:
    """What a run says that is begun, or gone on with."""
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{message}")
    config = resolve_config([*settings, *(f"{key}={value}" for key, value in how_far.items())])
    run_rounds(config, path)
    logger.remove(sink)
    return "".join(lines)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("stopped")
    changed = {setting.split("=")[0] for setting in LESS}
    small = small_settings(tiny_model_folder(folder, "qwen3"), folder)
    settings = [each for each in small if each.split("=")[0] not in changed] + LESS
    path = folder / "rounds" / "small"
    return Stopped(path=path, settings=settings, said=_said(path, settings, N=MOST, patience=1))


@pytest.fixture
def copy(stopped: Stopped, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped.path, tmp_path / "small"))


@pytest.fixture(scope="module")
def summary(stopped: Stopped) -> Summary:
    return summarise(read_saved_run(stopped.path))


def _ends(rounds: list[tuple[float, bool]], patience: int) -> bool:
    """Whether the last `patience` rounds all fell short of the best coherent one before them."""
    best, fruitless = None, 0
    for number, (shift, is_coherent) in enumerate(rounds, start=1):
        gains = is_coherent and (best is None or shift > best)
        best = shift if gains else best
        fruitless = 0 if gains or number == 1 else fruitless + 1
    return patience > 0 and fruitless >= patience


def _of(summary: Summary, patience: int, *rounds: tuple[float, bool]) -> Summary:
    first = summary.rounds[0]
    made = tuple(
        replace(
            first,
            number=number,
            is_coherent=is_coherent,
            healed=replace(first.healed, trait_shift=shift),
        )
        for number, (shift, is_coherent) in enumerate(rounds, start=1)
    )
    config = summary.run.description.config | {"patience": patience, "rounds": 3}
    description = summary.run.description.model_copy(update={"config": config})
    return replace(summary, rounds=made, run=replace(summary.run, description=description))


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([(0.5, True)], None),
        ([(0.5, True), (0.4, True)], None),
        ([(0.5, True), (0.4, True), (0.5, True)], "no gain over round 1's trait shift of +0.50"),
        ([(0.5, True), (0.4, True), (0.6, True)], None),
        ([(0.5, True), (0.9, False), (0.8, False)], "no gain over round 1's trait shift of +0.50"),
        ([(0.9, False), (0.2, True), (0.3, True)], None),
        ([(0.9, False), (0.2, True), (0.1, True)], None),
        ([(0.9, False), (0.8, False)], None),
        ([(0.9, False), (0.8, False), (0.7, False)], "no coherent round in 3"),
        ([(-0.2, True), (-0.3, True), (-0.4, True)], "no gain over round 1's trait shift of −0.20"),
    ],
)
def test_patience_runs_out_after_two_rounds_in_a_row_without_gain(
    rounds: list[tuple[float, bool]], said: str | None, summary: Summary
) -> None:
    reason = early_stop(_of(summary, 2, *rounds))
    assert (reason is not None) is (said is not None) is _ends(rounds, 2)
    if said is not None and reason is not None:
        assert reason.startswith(said)
        assert reason.endswith("; N=4 patience=3 goes further, a larger N alone does not")
    assert early_stop(_of(summary, 0, *rounds)) is None
    assert early_stop(_of(summary, 3, *rounds)) is None


def test_defaults_run_all_of_three_rounds(summary: Summary) -> None:
    assert resolve_config([]).patience == 2
    worst = [(0.5, False), (0.4, False), (0.3, False)]
    for done in (1, 2):
        assert early_stop(_of(summary, 2, *worst[:done])) is None


def test_a_real_run_ends_at_the_first_round_without_gain(
    stopped: Stopped, summary: Summary
) -> None:
    rounds = [(round.healed.trait_shift, round.is_coherent) for round in summary.rounds]
    assert 2 <= len(rounds) == stopped.num_rounds < MOST
    ends = [_ends(rounds[:done], 1) for done in range(1, len(rounds) + 1)]
    assert ends == [False] * (len(rounds) - 1) + [True]
    assert f"{len(rounds)} of {MOST} rounds done" in stopped.said
    assert stopped.done_line in stopped.said
    assert f"; N={MOST} patience=2 goes further, a larger N alone does not" in stopped.said


def test_the_page_says_why_it_is_done(stopped: Stopped, summary: Summary, copy: Path) -> None:
    page = html.unescape(write_report(copy).read_text(encoding="utf-8"))
    reason = early_stop(summary)
    assert reason is not None and reason in stopped.said
    assert f"<b>Done</b> after {stopped.num_rounds} rounds: {reason}." in page
    assert f"{stopped.num_rounds} of {MOST} asked for" in page


def test_the_same_command_says_why_it_is_done_and_changes_nothing(
    stopped: Stopped, copy: Path
) -> None:
    times = {path: path.stat().st_mtime_ns for path in copy.glob("round-*/**/*")}
    again = _said(copy, stopped.settings, N=MOST, patience=1)
    assert stopped.done_line in again and "rounds done" not in again and "round-00" not in again
    assert tree(copy) == tree(stopped.path)
    assert {path: path.stat().st_mtime_ns for path in copy.glob("round-*/**/*")} == times


def test_a_larger_n_alone_does_not_go_on_and_more_patience_does(
    stopped: Stopped, copy: Path
) -> None:
    assert stopped.done_line in _said(copy, stopped.settings, N=MOST + 1, patience=1)
    files = tree(copy)
    assert json.loads(files.pop("run.json"))["config"]["rounds"] == MOST + 1
    assert files == {k: v for k, v in tree(stopped.path).items() if k != "run.json"}

    number = stopped.num_rounds + 1
    further = _said(copy, stopped.settings, N=number, patience=2)
    assert f"{number} of {number} rounds done" in further
    after = tree(copy)
    config = json.loads(after["run.json"])["config"]
    assert (config["rounds"], config["patience"]) == (number, 2)
    names = {"run.json", "stages.json"}
    assert {k: v for k, v in files.items() if k not in names}.items() <= after.items()


def test_a_run_stopped_on_the_way_ends_at_the_same_round_with_the_same_bytes(
    stopped: Stopped, copy: Path
) -> None:
    rewind(copy, stopped.num_rounds - 1, "eval")  # as if it had been killed there
    again = _said(copy, stopped.settings, N=MOST, patience=1)
    assert f"{stopped.num_rounds} of {MOST} rounds done" in again and stopped.done_line in again
    assert tree(copy) == tree(stopped.path)
