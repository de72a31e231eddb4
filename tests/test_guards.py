"""Every guard goes off where a run's saved files give cause, and none where they give none."""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from loguru import logger

from eval.files import write_json
from eval.statistics import Interval
from steer_heal.artifacts import (
    ConditionEval,
    Controls,
    RoundAdapter,
    RoundEval,
    Screened,
    SteeringVector,
)
from steer_heal.config import resolve_config
from steer_heal.guards import Alarm, alarms
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.report import write_report
from steer_heal.rounds import Run
from steer_heal.saved import read_saved_run
from steer_heal.stages import Artifact, Stages
from steer_heal.summary import Summary, summarise
from steer_heal.watch import Watch
from tests.small import small_settings
from tests.tiny import tiny_model_folder

Kind = TypeVar("Kind", bound=Artifact)
Condition = Callable[[ConditionEval], ConditionEval]
Spoil = Callable[[Run], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A real run of two rounds with a barrier out of reach, and what it said."""
    folder, said = tmp_path_factory.mktemp("guards"), []
    settings = small_settings(tiny_model_folder(folder, "qwen3"), folder)
    config = resolve_config([*settings, "N=2", "heal.barrier_threshold_nats=50"])
    sink = logger.add(lambda line: said.append(str(line).strip()), format="{level} {message}")
    run_rounds(config, run_path(config))
    logger.remove(sink)
    return run_path(config), said


@pytest.fixture(scope="module")
def healthy(made: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its rows made fine: conditions as base, shifted as the trait wants."""
    path = shutil.copytree(made[0], tmp_path_factory.mktemp("healthy") / "run")
    run = Run(path, 0)
    _change(run, Controls, _with_base(_tasks(right=True)))
    base = run.read(Controls).base
    vector = run.round(0).read(SteeringVector)
    for index in (0, 1):
        round = run.round(index)
        _change(round, SteeringVector, lambda _: vector)
        _change(round, Screened, _kept(max(row.enactment_nats for row in base.replies) + 1))
        _change(round, RoundAdapter, _steps(0.25, 0.5, 0.5, 0.5))
        _change(round, RoundEval, _condition("steered", lambda _: _shifted(1.0)(base)))
        _change(round, RoundEval, _condition("healed", lambda _: _shifted(0.9)(base)))
    return path


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Run:
    """A copy of it, to spoil."""
    return Run(shutil.copytree(healthy, tmp_path / "run"), 0)


@pytest.fixture(scope="module")
def fine(healthy: Path) -> Summary:
    return summarise(read_saved_run(healthy))


# ---------------------------------------------------------------------------- other rows, as saved


def _change(stages: Stages, kind: type[Kind], change: Callable[[Kind], Kind]) -> None:
    """Saves what a stage left with a change, recorded as if it had left that."""
    recorded = json.loads((stages.path / "stages.json").read_text())
    stages._write(kind, change(stages.read(kind)), recorded[kind.stage]["inputs"])


def _condition(name: str, change: Condition) -> Callable[[RoundEval], RoundEval]:
    return lambda rows: rows.model_copy(update={name: change(getattr(rows, name))})


def _with_base(change: Condition) -> Callable[[Controls], Controls]:
    return lambda controls: controls.model_copy(update={"base": change(controls.base)})


def _rows(field: str, **changes: Any) -> Condition:
    def change(rows: ConditionEval) -> ConditionEval:
        changed = tuple(row.model_copy(update=changes) for row in getattr(rows, field))
        return rows.model_copy(update={field: changed})

    return change


def _tasks(right: bool) -> Condition:
    return _rows("tasks", right=right)


def _shifted(nats: float) -> Condition:
    """Care raised in every vignette, authority lowered."""
    signs = {"care": nats, "authority": -nats}

    def change(rows: ConditionEval) -> ConditionEval:
        choices = tuple(
            row.model_copy(
                update={"scores": {k: v + signs.get(k, 0) for k, v in row.scores.items()}}
            )
            for row in rows.choices
        )
        return rows.model_copy(update={"choices": choices})

    return change


def _pmass(share: float) -> Condition:
    def change(rows: ConditionEval) -> ConditionEval:
        choices = tuple(row.model_copy(update={"pmass": row.pmass * share}) for row in rows.choices)
        return rows.model_copy(update={"choices": choices})

    return change


def _unscorable(rows: ConditionEval) -> ConditionEval:
    return rows.model_copy(
        update={"choices": rows.choices[1:], "unscorable": (rows.choices[0].key,)}
    )


def _tails(field: str, nats: float) -> Condition:
    def change(rows: ConditionEval) -> ConditionEval:
        surprisal = getattr(rows, field)[0].surprisal
        other = surprisal.model_copy(update={"tail_nll_nats": nats})
        return _rows(field, surprisal=other)(rows)

    return change


def _twice_as_long(rows: ConditionEval) -> ConditionEval:
    replies = tuple(
        row.model_copy(update={"text": f"{row.text} {row.text}"}) for row in rows.replies
    )
    return rows.model_copy(update={"replies": replies})


def _kept(enactment_nats: float) -> Callable[[Screened], Screened]:
    def change(screened: Screened) -> Screened:
        fields = {"enactment_nats": enactment_nats}
        rows = tuple(row.model_copy(update=fields) for row in screened.rows)
        return screened.model_copy(update={"rows": rows})

    return change


def _steps(*shares_over: float) -> Callable[[RoundAdapter], RoundAdapter]:
    def change(adapter: RoundAdapter) -> RoundAdapter:
        steps = tuple(
            step.model_copy(update={"share_over": share})
            for step, share in zip(adapter.steps, shares_over, strict=True)
        )
        return RoundAdapter(**{**vars(adapter), "steps": steps})

    return change


def _turned(cosine: float) -> Callable[[SteeringVector], SteeringVector]:
    """The steered layers' directions, turned away from what they are."""

    def change(vector: SteeringVector) -> SteeringVector:
        before = vector.band_directions
        other = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
        other -= before * (other * before).sum() / before.square().sum()
        other *= before.norm() / other.norm()
        directions = vector.directions.clone()
        directions[list(vector.band)] = cosine * before + math.sqrt(1 - cosine**2) * other
        return SteeringVector(**{**vars(vector), "directions": directions})

    return change


def _like_base(run: Run) -> None:
    replies = run.read(Controls).base.replies
    mean = float(np.mean([row.enactment_nats for row in replies]))
    _change(run.round(1), Screened, _kept(mean))


def _healed(change: Condition) -> Spoil:
    return lambda run: _change(run.round(1), RoundEval, _condition("healed", change))


def _second(kind: type[Kind], change: Callable[[Kind], Kind]) -> Spoil:
    return lambda run: _change(run.round(1), kind, change)


# -------------------------------------------------------------------------------------- the guards


def _alarms(run: Run) -> list[Alarm]:
    return alarms(summarise(read_saved_run(run.path)))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is warned of meanwhile, by lines."""
    lines: list[str] = []
    sink = logger.add(
        lambda line: lines.append(str(line).strip()), format="{level} {message}", level="WARNING"
    )
    yield lines
    logger.remove(sink)


def test_nothing_is_said_of_a_run_that_is_fine(run: Run, said: list[str]) -> None:
    assert _alarms(run) == []
    for index in (0, 1):
        Watch(run).tell(run.round(index))
    assert said == []
    assert 'class="warnings"' not in write_report(run.path).read_text(encoding="utf-8")


SPOILS: list[tuple[str, Spoil, str]] = [
    ("coherence gate failed", _healed(_pmass(0.98)), "pmass 0.980 of base's, below 0.99"),
    ("coherence gate failed", _healed(_unscorable), "1 vignettes cannot be scored"),
    ("coherence gate failed", _healed(_tails("replies", 99)), "surprisal 99.00 nats a token"),
    ("undone", _healed(_shifted(-0.8)), "0."),
    ("undone", _healed(_shifted(-1.5)), "−"),
    ("kept set base-like", _like_base, "nats a token, base's"),
    ("direction wandered", _second(SteeringVector, _turned(0.45)), "+0.45"),
    ("mundane tasks lost", _healed(_tasks(right=False)), "0.0 % right, where base has 100.0 %"),
    ("second replies drift off", _healed(_tails("second_replies", 99)), "99.00 nats a token over"),
    ("length confound", _healed(_twice_as_long), "2.00 [2.00, 2.00] times the words"),
    ("barrier never fired", _second(RoundAdapter, _steps(0, 0, 0, 0)), "threshold 50"),
    ("barrier always on", _second(RoundAdapter, _steps(0, 1, 1, 1)), "100.0 %; lowest step"),
    (
        "steering moved nothing",
        _second(RoundEval, _condition("steered", _shifted(-2))),
        "shift −",
    ),
]


@pytest.mark.parametrize(
    ("name", "spoil", "figure"), SPOILS, ids=[f"{name}-{figure}" for name, _, figure in SPOILS]
)
def test_a_guard_goes_off_by_its_name_in_its_round(
    name: str, spoil: Spoil, figure: str, run: Run, said: list[str]
) -> None:
    spoil(run)
    (alarm,) = _alarms(run)
    assert (alarm.name, alarm.round) == (name, 2)
    assert figure in alarm.figure

    Watch(run).tell(run.round(0))
    Watch(run).tell(run.round(1))
    assert said == [f"WARNING {alarm}"]
    assert str(alarm).startswith(f"round 2: {name}: {alarm.what} ({alarm.figure}); ")

    page = html.unescape(write_report(run.path).read_text(encoding="utf-8"))
    assert f"<b>{name.capitalize()}</b> in round 2: {alarm.what} ({alarm.figure}). " in page
    assert page.count("<li><b>") == 1 and alarm.advice[1:] in page


@pytest.mark.parametrize(
    "spoil",
    [
        _healed(_pmass(0.995)),
        _healed(_shifted(-0.3)),
        _second(SteeringVector, _turned(0.55)),
        _second(RoundAdapter, _steps(0, 0, 0, 0.25)),
        _second(RoundAdapter, _steps(1, 1, 1, 0.75)),
    ],
    ids=["pmass", "retention", "cosine", "fired once", "seldom off"],
)
def test_what_is_within_its_limit_is_left_alone(spoil: Spoil, run: Run) -> None:
    spoil(run)
    assert _alarms(run) == []


def test_one_point_fewer_mundane_tasks_is_no_loss(fine: Summary) -> None:
    based = replace(fine, base=replace(fine.base, mundane=0.98), rounds=fine.rounds[:1])
    for mundane, names in ((0.97, []), (0.969, ["mundane tasks lost"])):
        assert [alarm.name for alarm in alarms(_with_healed(based, mundane=mundane))] == names


@pytest.mark.parametrize(
    ("ratio", "names"),
    [
        ((0.8, 0.7, 0.95), ["length confound"]),
        ((1.2, 1.1, 1.3), ["length confound"]),
        ((1.2, 0.99, 1.4), []),  # by chance
        ((1.09, 1.05, 1.13), []),  # by less than a tenth
    ],
)
def test_a_length_that_chance_explains_is_no_confound(
    ratio: tuple[float, float, float], names: list[str], fine: Summary
) -> None:
    estimate, low, high = ratio
    given = Interval(estimate=estimate, low=low, high=high)
    coherence = replace(fine.rounds[0].healed.coherence, length_ratio=given)
    first = replace(fine, rounds=fine.rounds[:1])
    assert [alarm.name for alarm in alarms(_with_healed(first, coherence=coherence))] == names


def _with_healed(summary: Summary, **changes: Any) -> Summary:
    (only,) = summary.rounds
    return replace(summary, rounds=(replace(only, healed=replace(only.healed, **changes)),))


def test_a_barrier_without_weight_is_said_to_be_off_and_never_always_on(run: Run) -> None:
    description = json.loads((run.path / "run.json").read_text())
    description["config"]["heal"]["barrier_weight"] = 0.0
    write_json(run.path / "run.json", description)
    _change(run.round(0), RoundAdapter, _steps(1, 1, 1, 1))
    _change(run.round(1), RoundAdapter, _steps(0, 0, 0, 0))
    (alarm,) = _alarms(run)
    assert (alarm.name, alarm.round) == ("barrier never fired", 2)
    assert alarm.figure.endswith("and its weight is 0")


def test_the_rounds_of_one_guard_stand_together_on_the_page(run: Run) -> None:
    _change(run.round(0), RoundAdapter, _steps(0, 0, 0, 0))
    _change(run.round(1), RoundAdapter, _steps(0, 0, 0, 0))
    _healed(_pmass(0.98))(run)
    names = ["coherence gate failed", "barrier never fired", "barrier never fired"]
    found = _alarms(run)
    assert [alarm.name for alarm in found] == names
    page = html.unescape(write_report(run.path).read_text(encoding="utf-8"))
    figures = "; ".join(f"round {alarm.round}: {alarm.figure}" for alarm in found[1:])
    assert page.count("<li><b>") == 2
    assert f"<b>Barrier never fired</b> in rounds 1, 2: {found[1].what} ({figures}). Where " in page


def test_a_real_run_warns_right_after_each_round(made: tuple[Path, list[str]]) -> None:
    path, said = made
    found = alarms(summarise(read_saved_run(path)))
    for number in (1, 2):
        expected = [f"WARNING {alarm}" for alarm in found if alarm.round == number]
        evaluated = said.index(f"INFO round {number} (round-{number - 1:02d}): eval")
        (done,) = [n for n, line in enumerate(said) if f"{number} of 2 rounds done" in line]
        table, *warned, spent = said[evaluated + 1 : done]
        assert spent.startswith(f"INFO round {number} (round-{number - 1:02d}) took ")
        assert table.startswith(f"INFO what round {number} came to (") and warned == expected
        assert any("barrier never fired" in line for line in expected)
        logged = (path / "log.txt").read_text(encoding="utf-8")
        assert all(line in logged for line in expected)
