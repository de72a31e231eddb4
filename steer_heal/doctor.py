"""What must hold of a model before a run is worth its hours: in seconds, one line a check.

ok      it holds
warn    a run goes through, and this is to be known
fail    a run would break half way, or its figures would mean nothing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from loguru import logger
from pydantic import BaseModel, ConfigDict

from eval.errors import UserError
from eval.files import write_json
from steer_heal.batch_sizes import settled
from steer_heal.case import Case, Finding
from steer_heal.checks import CHECKS
from steer_heal.config import RunConfig, resolve_config
from steer_heal.memory import GIB, peak_bytes
from steer_heal.model import Student, load_student
from steer_heal.trait import Trait, load_trait


class Checkup(BaseModel):
    """All that was looked at, of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_hash: str
    findings: tuple[Finding, ...]

    stage: ClassVar[str] = "doctor"
    files: ClassVar[tuple[str, ...]] = ("doctor.json",)

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "fail"]

    def __str__(self) -> str:
        """A line a check."""
        return "\n".join(f"{finding.status:<5} {finding}" for finding in self.findings)

    def save(self, folder: Path) -> None:
        write_json(folder / self.files[0], self.model_dump())

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.model_validate_json((folder / cls.files[0]).read_text(encoding="utf-8"))


def doctor(model_id: str, settings: Sequence[str]) -> Checkup:
    """Looks over a model for a run with these settings.

    Raises:
        UserError: a bad setting, or a model that cannot be loaded at all.
    """
    config = resolve_config([f"model={model_id}", *settings])
    trait = load_trait(config.trait, config.pos, config.neg)
    student = load_student(config.model, [], config.device)
    return check_up(student, trait, config)


def admit(student: Student, trait: Trait, config: RunConfig) -> Checkup:
    """The first stage of a run: its model is looked over, and what is to be known is logged.

    Args:
        student: the base, without adapters.
    Raises:
        UserError: a check failed.
    """
    checkup = check_up(student, trait, config)
    if failed := checkup.failed:
        more = f" (and {len(failed) - 1} more: steer-heal doctor MODEL)" if failed[1:] else ""
        raise UserError(f"model {student.loaded.model_id}: {failed[0]}{more}")
    for finding in checkup.findings:
        if finding.check == "memory":
            continue  # it was told before the model was loaded
        if finding.status == "warn":
            logger.warning("{}", finding)
        elif finding.check == "adapter reach":
            logger.info("{}", finding)
    return checkup


def tell_peak(checkup: Checkup, device: torch.device) -> None:
    """Logs the most memory that was held in this process, beside what was expected."""
    planned = next(each.measured for each in checkup.findings if each.check == "memory")
    peak_gib = peak_bytes(device) / GIB
    logger.info("memory: {:.2f} GiB at the most in this process; expected: {}", peak_gib, planned)


def check_up(student: Student, trait: Trait, config: RunConfig) -> Checkup:
    """Looks over a model without adapters, for a run with this config; it is left as it was."""
    case = Case(student=student, trait=trait, config=settled(student, trait, config))
    findings = tuple(_checked(name, check, case) for name, check in CHECKS.items())
    return Checkup(weights_hash=student.loaded.weights_hash, findings=findings)


def _checked(name: str, check: Callable[[Case, str], Finding], case: Case) -> Finding:
    try:
        with torch.random.fork_rng(devices=[]):  # a run's draws are not touched
            return check(case, name)
    except UserError as error:
        return Finding(check=name, status="fail", measured=str(error))
