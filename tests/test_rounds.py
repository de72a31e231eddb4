"""A run directory: stages run once, and only from the inputs they were made from."""

from __future__ import annotations

import builtins
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from eval.coherence import Surprisal
from eval.errors import UserError
from eval.files import NOT_AS_WRITTEN, write_json, write_text
from eval.rows import ForcedChoiceRow
from steer_heal.artifacts import (
    ConditionEval,
    Controls,
    Limits,
    ReplyRow,
    RoundEval,
    TextLimit,
    TextLimits,
)
from steer_heal.rounds import Run, check_run, open_run, read_run
from steer_heal.stages import Stages

MADE = {
    "num_completions": 16,
    "quantile": 0.98,
    "base_finishes": True,
    "rmse_nll_nats": 1.0,
    "persona_share": 0.0,
    "text": TextLimits(
        **dict.fromkeys(TextLimits.model_fields, TextLimit(low=0.5, typical=1 / 3, high=1.5))
    ),
    "words_low": 3,
    "words_high": 30,
    "base_tail_nll_nats": (0.5, 1.5),
}
CONTROLS = {"controls": {"inputs": "x", "files": {}}}


class Counter:
    """A stage that says how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, *inputs: Any) -> Limits:
        self.runs += 1
        return Limits(tail_nll_nats=float(len(inputs)), **MADE)


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    return Stages(tmp_path, "round 7", (0, 7))


@pytest.fixture
def careful_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def _description(**config: Any) -> dict[str, Any]:
    settings = {
        "rounds": 2,
        "patience": 2,
        "folder": "rounds",
        "heal": {"rank": 2, "alpha": 4},
    } | config
    return {"config": settings, "model": "abc", "code": "c", "trait": {"name": "t"}, "suites": "s"}


def _never() -> None:
    """Why no round is to follow: none is too many."""


def test_stage_runs_once_for_the_same_inputs(stages: Stages) -> None:
    stage = Counter()
    first = stages.once(Limits, stage, "a", 1)
    assert stages.once(Limits, stage, "a", 1) == first == stages.read(Limits)
    assert stage.runs == 1
    assert stages.has(Limits)


@pytest.mark.parametrize("inputs", [("b", 1), ("a", 2), ("a",), ("a", 1, 1), ("a1",)])
def test_stage_of_other_inputs_is_refused_and_kept(inputs: tuple[Any, ...], stages: Stages) -> None:
    stages.once(Limits, Counter(), "a", 1)
    before = (stages.path / "limits.json").read_bytes()
    stage = Counter()
    with pytest.raises(UserError, match=r"limits\.json was made from other inputs"):
        stages.once(Limits, stage, *inputs)
    assert stage.runs == 0
    assert (stages.path / "limits.json").read_bytes() == before


def test_stage_that_fails_leaves_nothing(stages: Stages) -> None:
    def fails() -> Limits:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        stages.once(Limits, fails)
    assert list(stages.path.iterdir()) == []
    assert not stages.has(Limits)


def test_stage_that_was_not_run_is_named(stages: Stages) -> None:
    with pytest.raises(UserError, match="stage 'limits' has not been run"):
        stages.read(Limits)


def test_file_of_another_version_of_the_code_is_named(stages: Stages) -> None:
    stages.once(Limits, Counter())
    old = (stages.path / "limits.json").read_text().replace("words_low", "least_words")
    (stages.path / "limits.json").unlink()
    (stages.path / "stages.json").unlink()

    class Old(Limits):
        def save(self, folder: Path) -> None:
            (folder / "limits.json").write_text(old)

    with pytest.raises(UserError, match=r"limits\.json was written by an older version"):
        stages.once(Old, lambda: Old(tail_nll_nats=0.0, **MADE))


def test_seeds_depend_on_run_round_and_stage() -> None:
    here = Path()
    seeds = [
        Stages(here, "", path).seed(stage)
        for path in ((0, "run"), (0, 0), (0, 1), (1, 0), (1, "run"), (10, 1), (1, 1))
        for stage in ("vector", "heal")
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert Stages(here, "x", (0, 0)).seed("heal") == Stages(here / "y", "z", (0, 0)).seed("heal")


def test_files_are_readable_by_others(careful_umask: None, stages: Stages) -> None:
    stages.once(Limits, Counter())
    write_text(stages.path / "DONE", "")
    for path in stages.path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read or written"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with (
        pytest.raises(UserError, match="cannot be read or written"),
        open_run(tmp_path / "file", 0, _description()),
    ):
        pass


def test_rounds_are_done_without_a_gap(tmp_path: Path) -> None:
    with open_run(tmp_path, 0, _description()) as run:
        for index in (0, 1, 3):
            assert run.done_rounds() == []
            folder = run.round(index)
            folder.path.mkdir()
            folder.once(Limits, Counter())
            folder.finish()
        write_json(tmp_path / "stages.json", CONTROLS)
        assert [done.index for done in run.done_rounds()] == [0, 1]
        (run.round(1).path / "DONE").unlink()
        assert [done.index for done in run.done_rounds()] == [0]
        assert [following.index for following in run.unfinished_rounds(4, _never)] == [1, 2, 3]
        assert [round.adapter_name for round in run.done_rounds()] == ["r00"]


def _condition(pmass: float, tail_nats: float, unscorable: int = 0) -> ConditionEval:
    """A condition with two vignettes and three replies."""
    surprisal = Surprisal(mean_nll_nats=0, tail_nll_nats=tail_nats, rmse_nll_nats=0)
    choice = {"label": None, "conflict": False, "scores": {}, "prefill_nll_nats": 0}
    reply = {"sample": 0, "text": "", "enactment_nats": 0, "enacted": True, "surprisal": surprisal}
    return ConditionEval(
        condition="",
        dose=None,
        choices=tuple(ForcedChoiceRow(id=each, pmass=pmass, **choice) for each in "ab"),
        unscorable=("c",) * unscorable,
        tasks=(),
        replies=tuple(ReplyRow(prompt_index=index, **reply) for index in range(3)),
        second_replies=(),
        neutral=(),
    )


BASE = _condition(0.8, 1.0)
WHOLE = _condition(0.8 * 0.995, 1.4)
BROKEN = {  # what fails the gate by little
    "pmass": _condition(0.8 * 0.985, 1.4),
    "tail": _condition(0.8, 1.5),  # the 95th percentile of base's own is 1.45
    "unscorable": _condition(0.8, 1.0, unscorable=1),
}


def _finished(folder: Path, *healed: ConditionEval) -> Run:
    """A run with rounds that came to this."""
    run = Run(folder, 0)
    run.once(Limits, lambda: Limits(tail_nll_nats=1.0, **MADE))
    controls = Controls(base=BASE, prompted=BASE, engineered=BASE, random=(BASE,))
    run.once(Controls, lambda: controls)
    for index, each in enumerate(healed):
        evaluation = RoundEval(steered=BASE, healed=each, internalised=0.0)
        round = run.round(index)
        round.path.mkdir()
        round.once(RoundEval, lambda made=evaluation: made)  # type: ignore[misc]
        round.finish()
    return Run(folder, 0)


@pytest.mark.parametrize("how", BROKEN)
def test_the_last_good_reference_is_the_last_coherent_round(how: str, tmp_path: Path) -> None:
    broken = BROKEN[how]
    for index, (rounds, expected) in enumerate(
        [
            ([], []),
            ([broken], []),
            ([broken, broken], []),
            ([WHOLE], ["r00"]),
            ([WHOLE, broken], ["r00"]),
            ([WHOLE, broken, broken], ["r00"]),
            ([broken, WHOLE], ["r00", "r01"]),  # on top of the broken one
            ([WHOLE, broken, WHOLE, broken], ["r00", "r01", "r02"]),
        ]
    ):
        (tmp_path / str(index)).mkdir()
        run = _finished(tmp_path / str(index), *rounds)
        following = run.round(len(rounds))
        assert run.reference("last_good", following) == expected
        assert run.reference("previous", following) == [f"r{n:02d}" for n in range(len(rounds))]
        assert run.reference("base", following) == []


def test_a_round_that_is_made_again_is_not_held_to_later_ones(tmp_path: Path) -> None:
    run = _finished(tmp_path, WHOLE, WHOLE, WHOLE)
    for which in ("previous", "last_good"):
        assert [run.reference(which, run.round(n)) for n in (0, 1)] == [[], ["r00"]]


def test_a_reference_is_read_from_checked_files(tmp_path: Path) -> None:
    run = _finished(tmp_path, WHOLE, BROKEN["tail"])
    file = tmp_path / "round-01" / "eval.json"
    file.write_text(file.read_text().replace("1.5", "1.4"))
    with pytest.raises(UserError, match=re.escape(NOT_AS_WRITTEN)):
        run.reference("last_good", run.round(2))
    assert run.reference("previous", run.round(2)) == ["r00", "r01"]


def test_the_time_to_go_leaves_out_what_comes_once(tmp_path: Path) -> None:
    run, said = Run(tmp_path, 0), []
    sink = logger.add(lambda line: said.append(str(line)), format="{message}")

    def slow() -> Limits:
        time.sleep(2)
        return Counter()()

    for index, _ in enumerate(run.unfinished_rounds(2, _never)):
        if index == 0:
            run.once(Limits, slow)
    logger.remove(sink)
    (line,) = [each for each in said if each.startswith("1 of 2 rounds done")]
    each, to_go = (int(number) for number in re.findall(r"(\d+) s\b", line))
    assert each < 2 and to_go < 2  # the two seconds of the run's own stage are not in it
    (own,) = [each for each in said if "itself took" in each]
    assert re.search(r"itself took limits [2-9]\.\d s \(100%\)$", own.strip())


def test_where_the_time_went_is_said_by_stage_the_longest_first(tmp_path: Path) -> None:
    round = Run(tmp_path, 0).round(0)
    round.path.mkdir()

    def slow() -> Limits:
        time.sleep(0.3)
        return Counter()()

    assert round.by_stage() == "no time: all its stages were there"
    round.once(Limits, slow)
    limits = round.spent["limits"]
    assert limits.wall_s >= 0.3 > limits.cpu_s and limits.num_sampled is None
    drafts = replace(limits, wall_s=limits.wall_s / 3)
    round.spent["drafts"] = drafts
    shares = re.fullmatch(
        r"limits 0\.[34] s \((\d+)%\), drafts 0\.1 s \((\d+)%\)", round.by_stage()
    )
    assert shares is not None and shares.groups() == ("75", "25")
    round.spent["drafts"] = replace(drafts, num_sampled=50)
    rate = re.search(r"drafts 0\.1 s \(25%, (\d+) tokens/s\)", round.by_stage())
    assert rate is not None and int(rate[1]) == builtins.round(50 / drafts.wall_s)
    heads, *table = [line.split() for line in round.profile()]
    assert [heads[0], heads[3]] == ["stage", "share"]
    assert [row[0::2][:2] for row in table] == [["limits", "75%"], ["drafts", "25%"]]
    assert table[1][-2:] == ["50", rate[1]] and len(table[0]) == 4
    again = Run(tmp_path, 0).round(0)
    again.once(Limits, slow)
    assert again.spent == {}


def test_no_round_follows_once_there_is_a_reason(tmp_path: Path) -> None:
    run, said = Run(tmp_path, 0), []
    asked: list[int] = []

    def why_stop() -> str | None:
        asked.append(len(run.done_rounds()))
        return "enough" if len(run.done_rounds()) == 2 else None

    write_json(tmp_path / "stages.json", CONTROLS)
    sink = logger.add(lambda line: said.append(str(line).strip()), format="{message}")
    for total in (5, 5, 1):
        for round in run.unfinished_rounds(total, why_stop):
            round.once(Limits, Counter())
            round.finish()
    logger.remove(sink)
    assert asked == [0, 1, 2, 2, 2]  # before each round, and where nothing is left
    done = f"run {tmp_path.name} is done: 2 rounds; enough"
    assert [line for line in said if "done" in line and "to go" not in line] == [
        "2 of 5 rounds done, 0 s each, controls apart",
        *[done] * 3,
    ]


def test_marker_without_records_is_no_finished_round(tmp_path: Path) -> None:
    run = Run(tmp_path, 0)
    run.round(0).path.mkdir()
    write_json(tmp_path / "stages.json", CONTROLS)
    run.round(0).finish()
    assert run.done_rounds() == []


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "round-00"):
        (folder / ".tmp-x" / "adapter").mkdir(parents=True)
        (folder / ".tmp-x" / "half.json").write_text("{")
    with open_run(tmp_path, 0, _description()):
        assert not list(tmp_path.rglob(".tmp-*"))


def test_run_file_takes_over_how_far_to_go_but_no_other_change(tmp_path: Path) -> None:
    with open_run(tmp_path, 0, _description()):
        pass
    with open_run(tmp_path, 0, _description(rounds=5)):
        assert read_run(tmp_path)["config"]["rounds"] == 5
    with open_run(tmp_path, 0, _description(rounds=1, patience=3)):
        config = read_run(tmp_path)["config"]
        assert (config["rounds"], config["patience"]) == (1, 3)
    before = (tmp_path / "run.json").read_bytes()
    changed = _description(heal={"rank": 3, "alpha": 4})
    with (
        pytest.raises(UserError, match=r"heal\.rank: 2 -> 3\).*run=NAME"),
        open_run(tmp_path, 0, changed),
    ):
        pass
    assert (tmp_path / "run.json").read_bytes() == before


def test_run_file_of_an_older_version_is_named(tmp_path: Path) -> None:
    with open_run(tmp_path, 0, _description(heal={"rank": 2})):
        pass
    before = (tmp_path / "run.json").read_bytes()
    message = r"run\.json was written by an older version of steer-heal, without heal\.alpha; use"
    with pytest.raises(UserError, match=message), open_run(tmp_path, 0, _description()):
        pass
    assert (tmp_path / "run.json").read_bytes() == before


def test_run_file_that_says_the_same_is_not_written(tmp_path: Path) -> None:
    with open_run(tmp_path, 0, _description()):
        before = (tmp_path / "run.json").stat()
    with open_run(tmp_path, 0, _description()):
        after = (tmp_path / "run.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", "other", "(the model's weights have changed)"),
        ("suites", "other", "(the items of the suites have changed)"),
        ("trait", {"name": "t", "acts": ["x"] * 99}, "(the trait file has changed in acts)"),
    ],
)
def test_other_content_is_refused_in_few_words(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    with open_run(tmp_path, 0, _description()):
        pass
    with pytest.raises(UserError) as caught, open_run(tmp_path, 0, _description() | {key: value}):
        pass
    assert f"was begun with another config {said}; give" in str(caught.value)


def test_another_trait_is_refused_by_its_name_alone(tmp_path: Path) -> None:
    with open_run(tmp_path, 0, _description(trait="kind")):
        pass
    other = _description(trait="stern") | {"trait": {"name": "u"}}
    with pytest.raises(UserError) as caught, open_run(tmp_path, 0, other):
        pass
    assert "another config (trait: 'kind' -> 'stern'); give" in str(caught.value)


def test_a_run_is_checked_before_the_weights_are_known_and_without_a_change(
    tmp_path: Path,
) -> None:
    def known(**config: Any) -> dict[str, Any]:
        return {key: value for key, value in _description(**config).items() if key != "model"}

    check_run(tmp_path / "new", known())
    assert not (tmp_path / "new").exists()
    with open_run(tmp_path, 0, _description()):
        held = rf"being worked on by another process \(PID {os.getpid()}\): wait.*run=NAME"
        with pytest.raises(UserError, match=held):
            check_run(tmp_path, known())
    before = (tmp_path / "run.json").read_bytes()
    check_run(tmp_path, known(rounds=9))
    with pytest.raises(UserError, match=r"heal\.rank: 2 -> 3\)"):
        check_run(tmp_path, known(heal={"rank": 3, "alpha": 4}))
    assert (tmp_path / "run.json").read_bytes() == before


def test_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path, 0, _description()):
        raise ZeroDivisionError
    with open_run(tmp_path, 0, _description()) as run:
        assert run.path == tmp_path


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        read_run(tmp_path)
    write_json(tmp_path / "run.json", [1])
    with pytest.raises(UserError, match=r"run\.json is not what was written there"):
        read_run(tmp_path)
