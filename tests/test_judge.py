"""A run judged again: shares counted from replies sampled here, and what is said of them."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from eval.chat import chat_ids
from eval.errors import UserError
from eval.sampling import sample_replies
from steer_heal.config import resolve_config
from steer_heal.judge import Judged, Judgement, judge
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.model import load_student
from steer_heal.rounds import Run
from steer_heal.saved import read_saved_run
from steer_heal.scoring import score_completions
from tests.conftest import TinyModel
from tests.processes import command, refusal, tree
from tests.small import small_settings


@pytest.fixture(scope="module")
def runs(tiny_qwen3: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one round that differ by their seed."""
    folder = tmp_path_factory.mktemp("judge")
    settings = [s for s in small_settings(tiny_qwen3.folder, folder) if not s.startswith("run=")]
    paths = []
    for seed in (0, 1):
        config = resolve_config([*settings, "N=1", f"seed={seed}", f"run=seed{seed}"])
        run_rounds(config, run_path(config))
        paths.append(run_path(config))
    return paths


def test_shares_are_those_of_replies_sampled_here(runs: list[Path], tiny_qwen3: TinyModel) -> None:
    """The small trait names no words, so that the sign of the enactment decides."""
    before = tree(runs[0])
    (found,) = judge(runs[:1], 3)
    after = tree(runs[0])
    kept = json.loads(after.pop("judge.json"))
    assert after == before and (kept["round"], kept["samples"]) == (1, 3)
    saved = read_saved_run(runs[0])
    trait, run = saved.trait, Run(runs[0], 0)
    student = load_student(str(tiny_qwen3.folder), run.last_stack(), "cpu")
    turns = [turn for turn in trait.held_out_prompts for _ in range(3)]
    tails: dict[str, list[float]] = {}
    for name, each, system in (
        ("base", student.base, None),
        ("prompted", student.base, trait.positive),
        ("healed", student, None),
    ):
        with each.running() as model:
            prompts = [chat_ids(each.tokenizer, turn, system) for turn in turns]
            replies = sample_replies(
                model, each.tokenizer, prompts, seed=run.seed("judge"), max_new_tokens=12
            )
        ids = [reply.token_ids for reply in replies]
        scores = score_completions(student, trait, turns, ids, 8)
        acts = np.array([score.enactment_nats > 0 for score in scores])
        shares = acts.reshape(-1, 3).mean(1).tolist()
        assert getattr(found, name).enacted.tolist() == shares
        assert kept["conditions"][name]["enacted"] == shares
        tails[name] = [
            statistics.median(score.surprisal.tail_nll_nats for score in scores[start : start + 3])
            for start in range(0, len(scores), 3)
        ]
        assert getattr(found, name).tail_nats.tolist() == pytest.approx(tails[name])
    assert len({str(found.base), str(found.prompted), str(found.healed)}) > 1
    for name in ("prompted", "healed"):
        change = statistics.mean(a - b for a, b in zip(tails[name], tails["base"], strict=True))
        ratio = found.tail_ratio(name)
        assert ratio.low <= ratio.estimate <= ratio.high
        assert ratio.estimate == pytest.approx(math.exp(change))


def test_several_runs_have_their_mean(runs: list[Path]) -> None:
    one, two, both = judge(runs, 2)
    assert one.label.startswith("seed0, round 1") and two.label.startswith("seed1, round 1")
    assert both.label == "mean of 2 runs"
    for name in ("base", "prompted", "healed"):
        for figure in ("enacted", "tail_nats"):
            a, b, mean = (getattr(getattr(each, name), figure) for each in (one, two, both))
            np.testing.assert_allclose(mean, (a + b) / 2)
    assert both.gain.estimate == pytest.approx((one.gain.estimate + two.gain.estimate) / 2)


@pytest.mark.parametrize(
    ("healed", "said"),
    [
        ([1.0, 1.0, 1.0, 1.0], "+25.0 [+25.0, +25.0]"),
        ([0.5, 1.0, 0.75, 0.75], "+0.0 [-25.0, +12.5]; no difference shown"),
    ],
)
def test_a_difference_is_said_with_its_interval(healed: list[float], said: str) -> None:
    base = Judged(enacted=np.full(4, 0.75), tail_nats=np.full(4, 0.5))
    prompted = Judged(enacted=np.full(4, 0.75), tail_nats=np.full(4, 0.5 + math.log(1.1)))
    ours = Judged(enacted=np.array(healed), tail_nats=np.full(4, 0.5 + math.log(1.25)))
    text = str(Judgement(label="run", base=base, prompted=prompted, healed=ours))
    head, *shares, gain, tail, rest = text.splitlines()
    assert tail == (
        "  tail perplexity, over base's: prompted 1.100 [1.100, 1.100], healed 1.250 [1.250, 1.250]"
    )
    assert rest == "  healed over prompted: 1.136 [1.136, 1.136]"
    assert head == "run:"
    assert [line.split()[0] for line in shares] == ["base", "prompted", "healed"]
    assert shares[0] == "  base      75.0 % [75.0, 75.0]"
    assert re.sub(r"\[.*\]", "[]", gain) == re.sub(
        r"\[.*\]", "[]", f"  healed minus prompted, points: {said}"
    )


def test_runs_of_other_prompts_are_not_averaged(
    runs: list[Path], tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    settings = small_settings(tiny_qwen3.folder, tmp_path)
    trait = tmp_path / "small.toml"
    lines = trait.read_text().splitlines()
    other = [
        f"held_out_prompts = {json.dumps(['A nurse is told to go.'])}"
        if line.startswith("held_out_prompts")
        else line
        for line in lines
    ]
    trait.write_text("\n".join(other) + "\n")
    config = resolve_config([*settings, "N=1"])
    run_rounds(config, run_path(config))
    with pytest.raises(UserError, match=r"other held-out prompts than .*seed0: judge them apart"):
        judge([runs[0], run_path(config)], 1)


def test_a_run_without_a_round_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty is not a run" in refusal(command(tmp_path, "judge", "empty"))


def test_the_command_prints_every_condition(runs: list[Path]) -> None:
    done = command(runs[0].parent.parent, "judge", str(runs[0]), "--samples", "1")
    assert done.code == 0, done.err
    assert done.out.startswith("seed0, round 1, 1 replies to each of 4 prompts:\n  base ")
    assert "healed minus prompted, points: " in done.out
