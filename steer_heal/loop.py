"""The method: steer, filter, heal, stack, evaluate, and round again."""

from __future__ import annotations

from pathlib import Path

from steer_heal.artifacts import (
    Completions,
    Controls,
    Doses,
    Limits,
    RoundAdapter,
    RoundEval,
    Screened,
    SteeringVector,
    Unbarred,
)
from steer_heal.batch_sizes import settle_batches
from steer_heal.cache import open_cache
from steer_heal.calibrate import calibrate
from steer_heal.config import FREE, RunConfig
from steer_heal.doctor import Checkup, admit, tell_peak
from steer_heal.dose import choose_doses
from steer_heal.evaluate import evaluate_controls, evaluate_round
from steer_heal.filter import screen
from steer_heal.generate import generate_steered
from steer_heal.heal import heal
from steer_heal.imported import take_vector
from steer_heal.manifest import describe
from steer_heal.model import Student, load_student
from steer_heal.plan import plan_memory
from steer_heal.report import draw_page
from steer_heal.rounds import Run, check_run, open_run
from steer_heal.trait import Trait, load_trait
from steer_heal.unbarred import heal_unbarred
from steer_heal.vector import extract_vector
from steer_heal.watch import Watch


def run_rounds(config: RunConfig, path: Path, profiled: bool = False) -> None:
    """Runs what remains of a run's rounds in its folder; `profiled`: tells what each stage took."""
    trait = load_trait(config.trait, config.pos, config.neg)
    description = describe(config, trait)
    check_run(path, description)  # all that is cheap to refuse comes before a model is loaded
    plan_memory(config, trait)
    base = load_student(config.model, [], config.device)
    description["model"] = base.loaded.weights_hash
    cache = open_cache(config.cache, description, base.loaded.model.device)
    with open_run(path, config.seed, description, cache, profiled) as run:
        _loop(run, base, trait, config)


def _loop(run: Run, student: Student, trait: Trait, config: RunConfig) -> None:
    fixed = config.model_dump(exclude={*FREE, "run"})
    checkup = run.once(Checkup, lambda *_: admit(student, trait, config), student, trait, fixed)
    config = settle_batches(run, student, trait, config)
    given = take_vector(run, student, config.vector)
    for adapter in run.last_stack():
        student = student.grown(adapter)
    generate, evaluate, seed = config.generate, config.evaluate, run.seed("evaluate")
    limits = run.once(
        Limits, calibrate, student.base, trait, config.filter, generate, run.seed("limits")
    )
    watch = Watch(run)
    for round in run.unfinished_rounds(config.rounds, watch.why_stop):
        draw_page(run.path)
        s = round.seed
        vector = round.once(
            *(SteeringVector, extract_vector, student, trait, config.vector),
            *(s("v"), run.seed("direction"), given),
        )
        doses = round.once(
            Doses, choose_doses, student, vector, limits, trait, generate, config.filter, s("doses")
        )
        drafts = round.once(
            Completions, generate_steered, student, vector, doses, trait, generate, s("generate")
        )
        kept = round.once(
            Screened, screen, student, drafts, limits, trait, config.filter, s("filter")
        )
        if round.index == 0:
            run.once(Controls, evaluate_controls, student, vector, kept, trait, evaluate, seed)
            draw_page(run.path)
        held = run.reference(config.heal.barrier_reference, round)
        adapter = round.once(
            *(RoundAdapter, heal, student, kept, vector, held, config.heal),
            *(round.adapter_name, s("heal")),
        )
        if round.index == 0 and evaluate.controls == "full":
            run.once(
                *(Unbarred, heal_unbarred, student, kept, vector, held, config.heal, s("heal")),
                *(trait, evaluate, seed),
            )
        healed = student.grown(adapter)
        round.once(RoundEval, evaluate_round, student, healed, vector, kept, trait, evaluate, seed)
        round.finish()
        watch.tell(round)
        student = healed
    tell_peak(checkup, student.loaded.model.device)
