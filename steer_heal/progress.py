"""Where a run stands: which stages of which round are done, what comes next. Loads no model.

The order of the stages is that of `loop.py`: the run's own, then every round's six; two
stages of the first round are followed by one of the run's own, made from what they left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steer_heal.artifacts import Controls, Doses, RoundAdapter, Screened, SteeringVector
from steer_heal.rounds import Round, Run
from steer_heal.saved import BegunRound, Description, SavedRun, gather, read_description

_EVERY_ROUND = ("vector", "doses", "drafts", "screened", "adapter", "eval")
_AFTER_IN_FIRST = {"screened": "controls", "adapter": "unbarred"}
_NAMES = {
    "doctor": "check the model",
    "batches": "choose how many rows go at a time",
    "imported": "read the vector",
    "limits": "measure the base's own replies",
    "vector": "find the steering vector",
    "doses": "choose doses",
    "drafts": "sample",
    "screened": "filter",
    "controls": "measure base, prompts and random directions",
    "adapter": "heal",
    "unbarred": "heal without the barrier",
    "eval": "evaluate",
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of a run."""

    stage: str  # its name in stages.json
    name: str  # what it does
    is_done: bool


@dataclass(frozen=True, kw_only=True)
class Part:
    """The stages before round 1, or those of a round, in their order."""

    name: str
    steps: tuple[Step, ...]
    is_done: bool


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What there is of a run."""

    path: Path
    description: Description
    parts: tuple[Part, ...]  # before round 1, then every round that was asked for or is there
    saved: SavedRun | None  # None: base and prompts are not measured yet
    rounds: tuple[BegunRound, ...]  # the finished ones, then the one that was begun

    @property
    def num_done(self) -> int:
        return len(self.saved.rounds) if self.saved else 0

    @property
    def num_asked(self) -> int:
        return self.description.config["rounds"]

    @property
    def following(self) -> str | None:
        """What comes next: a stage and where; None: all the rounds that were asked for are done."""
        for part in self.parts:
            if not part.is_done:
                left = (step.name for step in part.steps if not step.is_done)
                return f"{next(left, 'finish')} ({part.name})"
        return None


def read_progress(path: Path) -> Progress:
    """Reads what there is of a run, whatever stage it is in.

    Raises:
        UserError: no run, or a file that is not what was written.
    """
    description = read_description(path)
    run = Run(path, description.config["seed"])
    saved = gather(run, description) if run.has(Controls) else None
    num_done = len(saved.rounds) if saved else 0
    begun = run.round(num_done)
    return Progress(
        path=path,
        description=description,
        parts=parts_of(run, description, num_done),
        saved=saved,
        rounds=(*(saved.rounds if saved else ()), *_begun(begun)),
    )


def _begun(round: Round) -> tuple[BegunRound, ...]:
    """The files of an unfinished round; nothing where it has none."""
    if not round.recorded_stages():
        return ()
    return (
        BegunRound(
            number=round.index + 1,
            folder=round.path.name,
            vector=round.read(SteeringVector) if round.has(SteeringVector) else None,
            doses=round.read(Doses) if round.has(Doses) else None,
            screened=round.read(Screened) if round.has(Screened) else None,
            steps=round.read(RoundAdapter).steps if round.has(RoundAdapter) else None,
        ),
    )


def parts_of(run: Run, description: Description, num_done: int) -> tuple[Part, ...]:
    """The stages of a run, of which so many rounds are done."""
    own, config = run.recorded_stages(), description.config
    sizes = (config[stage]["batch_size"] for stage in ("generate", "evaluate"))
    batches = ["batches"] if "auto" in sizes else []
    vector = ["imported"] if config["vector"]["file"] else []
    before = _steps(["doctor", *batches, *vector, "limits"], own)
    parts = [Part(name="before round 1", steps=before, is_done=all(s.is_done for s in before))]
    for index in range(max(config["rounds"], num_done)):
        stages = list(_EVERY_ROUND)
        if index == 0:
            for after, stage in _AFTER_IN_FIRST.items():
                if stage != "unbarred" or config["evaluate"]["controls"] == "full":
                    stages.insert(stages.index(after) + 1, stage)
        steps = _steps(stages, own | run.round(index).recorded_stages())
        parts.append(Part(name=f"round {index + 1}", steps=steps, is_done=index < num_done))
    return tuple(parts)


def _steps(stages: list[str], recorded: frozenset[str]) -> tuple[Step, ...]:
    return tuple(
        Step(stage=stage, name=_NAMES[stage], is_done=stage in recorded) for stage in stages
    )
