"""`steer-heal study`: the variants of a study on the same seeds, each an ordinary run.

    <folder>/
      study.json              the study, the settings and the trait that its runs were begun with
      <variant>--seed<n>/     the runs
      study.md figures.json   the table, and every figure in it, drawn from the runs' files

Seeds are the outer loop: a study that is stopped early has whole seeds of all its variants. Stages
that variants have in common are made once: they lie in a cache (cache.py) beside the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loguru import logger
from pydantic import BaseModel, Field, ValidationError

from eval.errors import UserError
from eval.files import NOT_AS_WRITTEN, locked, write_json, write_text
from eval.settings import Settings, resolve_settings
from steer_heal.apart import run_apart
from steer_heal.changes import changes
from steer_heal.config import RunConfig, resolve_config
from steer_heal.manifest import describe, run_path
from steer_heal.report import PAGE_FILE
from steer_heal.rounds import Run
from steer_heal.studies import Study
from steer_heal.study_table import study_table, table_text
from steer_heal.trait import load_trait
from steer_heal.watch import Watch

STUDY_FILE, TABLE_FILE, FIGURES_FILE = "study.json", "study.md", "figures.json"


class StudyConfig(Settings):
    """What a study is asked beside the settings of its runs."""

    seeds: int = Field(3, ge=1)
    """Every variant is run on the seeds from 0 on, so many."""
    folder: str | None = Field(None, min_length=1)
    """Where its runs land; rounds/study/NAME by default."""
    cache: str | None = Field(None, min_length=1)
    """Stages that its runs share with those of other studies; rounds/study/stages by default."""


class Begun(BaseModel):
    """What a study was begun with, as study.json says it."""

    study: Study
    config: dict[str, Any]  # of a run without any variant's settings
    trait: dict[str, Any]
    suites: str  # hash of the items


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One variant on one seed."""

    variant: str
    seed: int
    settings: tuple[str, ...]  # KEY=VALUE, all of them

    @property
    def config(self) -> RunConfig:
        return resolve_config(list(self.settings))

    @property
    def is_finished(self) -> bool:
        """Whether no round is to follow, and its page is drawn."""
        run = Run(run_path(self.config), self.seed)
        is_over = len(run.done_rounds()) >= self.config.rounds or Watch(run).why_stop() is not None
        return is_over and (run.path / PAGE_FILE).is_file()


def run_study(study: Study, arguments: Sequence[str]) -> str:
    """Runs what remains of a study; returns its table, which its folder has too.

    Args:
        arguments: KEY=VALUE: seeds, folder, and settings for every variant.
    Raises:
        UserError: a setting, trait, suite or model that cannot be used, a folder that was begun
            with other settings, or a run that failed.
    """
    own = [each for each in arguments if _key(each) in StudyConfig.model_fields]
    shared = [each for each in arguments if each not in own]
    config = resolve_settings(StudyConfig, own)
    folder = Path(config.folder or f"rounds/study/{study.name}")
    _refuse_what_varies(study, shared)
    cache = Path(config.cache or folder.parent / "stages")
    runs = _runs(study, shared, config.seeds, folder, cache)
    begun = _begun(study, shared)  # refuses what a run would, before anything is made
    with locked(folder, f"study {folder}", "folder=PATH"):
        _agree(folder, begun)
        for number, run in enumerate(runs, start=1):
            if not run.is_finished:
                label = f"{run.variant}, seed {run.seed}"
                logger.info("study {}: run {} of {}: {}", study.name, number, len(runs), label)
                run_apart(label, run.settings)
        paths = {
            variant: {run.seed: run_path(run.config) for run in runs if run.variant == variant}
            for variant in study.variants
        }
        table = study_table(paths)
        text = table_text(study, shared, table)
        write_json(folder / FIGURES_FILE, table.model_dump(mode="json"))
        write_text(folder / TABLE_FILE, text + "\n")
    return text


def _key(argument: str) -> str:
    return argument.partition("=")[0]


def _refuse_what_varies(study: Study, shared: Sequence[str]) -> None:
    """Raises UserError where a setting for all is one that the study makes itself."""
    varied = {_key(each) for overrides in study.variants.values() for each in overrides}
    for each in shared:
        if _key(each) in {"seed", "run", *varied}:
            raise UserError(f"{_key(each)} is set by study {study.name} itself: leave it out")


def _runs(
    study: Study, shared: Sequence[str], num_seeds: int, folder: Path, cache: Path
) -> list[StudyRun]:
    return [
        StudyRun(
            variant=variant,
            seed=seed,
            settings=(
                *(*shared, *overrides),
                *(f"seed={seed}", f"run={variant}--seed{seed}"),
                *(f"folder={folder}", f"cache={cache}"),
            ),
        )
        for seed in range(num_seeds)
        for variant, overrides in study.variants.items()
    ]


def _begun(study: Study, shared: Sequence[str]) -> Begun:
    """What is to be recorded.

    Raises:
        UserError: a run of any variant would be refused.
    """
    described = [_described([*shared, *overrides]) for overrides in ((), *study.variants.values())]
    return Begun(study=study, **described[0])


def _described(settings: list[str]) -> dict[str, Any]:
    config = resolve_config(settings)
    return describe(config, load_trait(config.trait, config.pos, config.neg))


def _agree(folder: Path, now: Begun) -> None:
    """Records what a new study is begun with; refuses another than an old one was."""
    file = folder / STUDY_FILE
    if not file.exists():
        write_json(file, now.model_dump(mode="json"))
        return
    try:
        before = Begun.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(f"{file} {NOT_AS_WRITTEN}; give another folder with folder=PATH") from error
    changed = changes(before.model_dump(), now.model_dump(), free=("device",))
    changed += [
        f"variant {variant}: {' '.join(old)} -> {' '.join(new)}"
        for variant, new in now.study.variants.items()
        if (old := before.study.variants.get(variant, new)) != new
    ]
    if changed:
        raise UserError(
            f"study {folder} was begun with other settings ({'; '.join(changed)}); "
            "give this one a folder of its own with folder=PATH"
        )
