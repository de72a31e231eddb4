"""The doses of a round: those given, or the largest of a probe's that still pass the filter.

    carried   = mean over the band of <h_l(student) - h_l(base), v[l]> / |v[l]|^2
    step      = walk_down * max(0, carried)
    dose      = max(0, given - step)                                         where they are given

    tried[k]  = low * (high / low)^(k / (n - 1)),  k = 0 .. n - 1            where they are auto
    probed    = max(0, tried - step), equal ones once
    passing   = the largest probed with  pass rate >= target  and  KL p95 <= target
    dose      = max(0, share * (passing + step) - step)

h_l: mean output of layer l at the last prompt token of the trait's prompts. As the stack grows the
doses are walked down by what it adds of the vector by itself, so that their sum stays where the
first round's was. Without it a round steers on top of what the last one taught, and the replies
break before the trait is carried elsewhere.

The probe samples a few drafts at each dose, to the same prompts, all in one batch, and asks the
filter's own criteria of them. Its pass rate rises with the dose while replies come to enact the
trait, and falls where they break; nobody knows beforehand where that is on a model. The largest
dose that passes is not the best one to learn from: the guided teacher goes `heal.guidance` times
as far as steering does, so a round steers at a share of it, one half where guidance is 2.

On the embedded model (seed 11, 48 drafts a dose) the rate is 65 to 83 % from 0.1 to 0.78 and 46 %
at 1.1: a coherent reply fails one of several limits now and then, as each shuts out a twentieth of
the base's own, and in a second round 62 to 65 % pass even unsteered. The default target of one half
is below that, and is what the filter needs to keep 192 of 384. With 16 drafts (a standard error of
12 points) a dose at which 25 % pass was taken once, and the round broke replies: so it is 32 now.
More help further, and so does `target_kl_nats` where the rate hardly falls with the dose.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from loguru import logger

from eval.chat import chat_ids
from eval.errors import UserError
from steer_heal.artifacts import DosePoint, Doses, Limits, SteeringVector
from steer_heal.config import FilterConfig, GenerateConfig
from steer_heal.drafts import sample_steered
from steer_heal.gates import advice, dose_curve, failed_gates
from steer_heal.model import Student
from steer_heal.scoring import last_states, score_completions
from steer_heal.trait import Trait


def choose_doses(
    student: Student,
    vector: SteeringVector,
    limits: Limits,
    trait: Trait,
    config: GenerateConfig,
    filter_config: FilterConfig,
    seed: int,
) -> Doses:
    """The doses that the round's drafts are sampled at.

    Raises:
        UserError: no dose that was tried reaches the targets; says what each came to.
    """
    asked = _grid(config) if config.doses == "auto" else config.doses
    carried = _carried(student, vector, trait, config)
    step = config.walk_down * max(0.0, carried or 0.0)
    walked = tuple(max(0.0, dose - step) for dose in asked)
    if carried is not None and student.adapters:
        _tell_walk(carried, asked, walked, config)
    if config.doses != "auto":
        return Doses(doses=walked, asked=asked, carried=carried, probe=(), passing=())
    probe = _probe(student, vector, limits, trait, sorted(set(walked)), config, filter_config, seed)
    passing = _largest_passing(probe, config)
    doses = tuple(max(0.0, config.dose_share * (dose + step) - step) for dose in passing)
    logger.info(
        "of {} doses tried {} are the largest with {}, so this round steers at {}; passed: {}",
        *(len(probe), _listed(passing), _targets(config), _listed(doses)),
        ", ".join(f"{point.dose:.2f}: {point.pass_rate:.0%}" for point in probe),
    )
    return Doses(doses=doses, asked=asked, carried=carried, probe=probe, passing=passing)


def _grid(config: GenerateConfig) -> tuple[float, ...]:
    """Doses from the lowest to the highest, each the same multiple of the one before."""
    low, high = config.dose_grid
    return tuple(float(dose) for dose in np.geomspace(low, high, config.num_grid_doses))


def _carried(
    student: Student, vector: SteeringVector, trait: Trait, config: GenerateConfig
) -> float | None:
    """What the stack adds of the vector by itself, in multiples of it; None: nobody asks."""
    if config.walk_down == 0:
        return None
    if not student.adapters:
        return 0.0
    prompts = [chat_ids(student.tokenizer, prompt) for prompt in trait.prompts]
    after, before = (
        last_states(one, prompts, config.rows_at_a_time, "doses").mean(0)
        for one in (student, student.base)
    )
    shift, band = (after - before)[list(vector.band)], vector.band_directions  # [band, hidden]
    return float(((shift * band).sum(-1) / band.square().sum(-1)).mean())


def _probe(
    student: Student,
    vector: SteeringVector,
    limits: Limits,
    trait: Trait,
    doses: Sequence[float],
    config: GenerateConfig,
    filter_config: FilterConfig,
    seed: int,
) -> tuple[DosePoint, ...]:
    """The dose curve of `config.num_probes` drafts a dose, to prompts drawn by the seed."""
    count = config.num_probes
    drawn = random.Random(seed).sample(range(len(trait.prompts)), len(trait.prompts))
    prompts = [drawn[row % len(drawn)] for row in range(count)] * len(doses)
    rows_doses = [dose for dose in doses for _ in range(count)]
    drafts = sample_steered(student, vector, trait, prompts, rows_doses, config, seed, "dose probe")
    scores = score_completions(
        student,
        trait,
        [draft.prompt for draft in drafts],
        [draft.token_ids for draft in drafts],
        filter_config.batch_size,
    )
    reasons = failed_gates(drafts, scores, limits, trait, filter_config)
    return dose_curve(drafts, scores, reasons)


def _largest_passing(probe: Sequence[DosePoint], config: GenerateConfig) -> tuple[float, ...]:
    """The largest doses that reach the targets, ascending.

    Raises:
        UserError: none does.
    """
    whole = [point for point in probe if point.pass_rate >= config.target_pass_rate]
    highest = config.target_kl_nats
    near = [point for point in whole if highest is None or point.kl_p95_nats <= highest]
    if near:
        return tuple(point.dose for point in near[-config.num_doses :])
    if whole:
        hint = "a higher generate.target_kl_nats, or lower doses (generate.dose_grid)"
    else:
        best = max(probe, key=lambda point: point.pass_rate)
        lower = "a lower generate.target_pass_rate"
        hints = [advice(best.commonest_drop, "generate.dose_grid"), lower]
        if best.pass_rate > config.target_pass_rate / 2:  # the doses are fine, more was asked
            hints.reverse()
        hint = ", or ".join(hints)
    curve = "; ".join(
        f"{point.dose:.3f}: {point.pass_rate:.0%}, {point.kl_p95_nats:.2f}, "
        f"{point.commonest_drop or 'none'}"
        for point in probe
    )
    raise UserError(
        f"no dose passes: of {len(probe)} tried none has {_targets(config)} (dose: pass rate, "
        f"KL p95 from the student in nats, most frequent reason to drop; {curve}). Try: {hint}; "
        "as a run of its own, with run=NAME"
    )


def _targets(config: GenerateConfig) -> str:
    asked = f"{100 * config.target_pass_rate:.4g}% of {config.num_probes} drafts past the filter"
    if config.target_kl_nats is not None:
        asked += f" and a KL p95 of at most {config.target_kl_nats:g} nats"
    return asked


def _tell_walk(
    carried: float, asked: Sequence[float], walked: Sequence[float], config: GenerateConfig
) -> None:
    """What the stack does to the doses, in a line."""
    verb = "tries" if config.doses == "auto" else "steers at"
    if walked == asked:
        rest = f"which lowers no dose: it {verb} {_listed(asked)}"
    else:
        rest = f"so this round {verb} {_listed(walked)} instead of {_listed(asked)}"
    logger.info(
        "the earlier rounds already add {:.2f} of the vector by themselves, {}", carried, rest
    )


def _listed(doses: Sequence[float]) -> str:
    """As `0.25, 0.35 and 0.50`, equal ones once."""
    texts = list(dict.fromkeys(f"{dose:.2f}" for dose in doses))
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
