"""The loop: rounds on a tiny model, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import steer_heal.loop
import steer_heal.rounds
from eval.errors import UserError
from eval.files import locked
from eval.model_files import weights_hash
from steer_heal.artifacts import (
    Controls,
    RoundAdapter,
    RoundEval,
    Screened,
    SteeringVector,
    Unbarred,
)
from steer_heal.config import RunConfig, resolve_config
from steer_heal.heal import heal
from steer_heal.loop import run_rounds
from steer_heal.manifest import code_hash, run_path
from steer_heal.model import load_student
from steer_heal.rounds import Run
from tests.processes import rewind
from tests.small import small_settings
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("loop")
    model = tiny_model_folder(folder, "qwen3")
    return resolve_config(["N=2", *small_settings(model, folder)])


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Run:
    run_rounds(config, run_path(config))
    return Run(run_path(config), config.seed)


def test_reads_as_the_method() -> None:
    assert len(Path(steer_heal.loop.__file__).read_text().splitlines()) < 100


def test_run_says_what_it_was_made_from(run: Run, config: RunConfig) -> None:
    description = json.loads((run.path / "run.json").read_text())
    assert RunConfig.model_validate(description["config"]) == config
    assert description["model"] == weights_hash(Path(config.model))
    assert description["code"] == code_hash()
    assert description["trait"]["positive"] == "You care for people before rules."
    assert description["libraries"]["torch"] == torch.__version__
    assert description["python"].startswith("3.")


def test_a_trait_that_the_suite_does_not_ask_about_is_refused_at_once(
    config: RunConfig, tmp_path: Path
) -> None:
    text = Path(config.trait).read_text().replace("authority = -1", "courage = -1")
    (tmp_path / "brave.toml").write_text(text)
    other = config.model_copy(
        update={"trait": str(tmp_path / "brave.toml"), "folder": str(tmp_path / "rounds")}
    )
    with pytest.raises(UserError, match=r"meant to move \['courage'\], which suite 'small'"):
        run_rounds(other, run_path(other))
    assert not (tmp_path / "rounds").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, r"another config \(seed: 0 -> 7\)"),
        ({"trait": "nowhere"}, "no trait 'nowhere'"),
        ({"model": "./nowhere"}, "'./nowhere': neither a folder nor a hub id"),
        ({"evaluate": {"suite": "nowhere"}}, "no suite 'nowhere'"),
    ],
)
def test_what_is_cheap_to_refuse_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any],
    said: str,
    run: Run,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(steer_heal.loop, "load_student")
    other = RunConfig.model_validate(config.model_dump() | changes)
    with pytest.raises(UserError, match=said):
        run_rounds(other, run.path)


def test_a_run_that_is_held_is_refused_before_a_model_is_loaded(
    run: Run, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(steer_heal.loop, "load_student")
    with locked(run.path, "it", "run=NAME"), pytest.raises(UserError, match="another process"):
        run_rounds(config, run.path)


def test_every_file_of_the_design_is_there(run: Run) -> None:
    rounds = [
        "vector.safetensors vector.json dose.json completions.jsonl train.jsonl eval.json DONE",
        "adapter/adapter_model.safetensors adapter/adapter_config.json",
    ]
    controls = ["base.json", "prompted.json", "engineered.json", "random.json"]
    for name in ["run.json", *controls, "log.txt"]:
        assert (run.path / name).is_file(), name
    for index in (0, 1):
        for name in " ".join(rounds).split():
            assert (run.round(index).path / name).is_file(), name
    marker = (run.round(1).path / "DONE").stat().st_mtime_ns
    others = [path for path in run.round(1).path.rglob("*") if path.is_file()]
    assert marker == max(path.stat().st_mtime_ns for path in others)


def test_stages_feed_each_other(run: Run, config: RunConfig) -> None:
    controls = run.read(Controls)
    for index in (0, 1):
        folder = run.round(index)
        screened, evaluation = folder.read(Screened), folder.read(RoundEval)
        assert len(screened.rows) == 24
        assert len(screened.kept) == 8
        doses = {row.dose for row in screened.rows}
        assert doses == {0.05, 0.1} if index == 0 else max(doses) < 0.1  # walked down
        assert evaluation.steered.dose == pytest.approx(screened.mean_kept_dose)
        assert [row.prompt_index for row in evaluation.healed.replies] == [
            row.prompt_index for row in controls.base.replies
        ]
        adapter = folder.read(RoundAdapter)
        assert adapter.rank == config.heal.rank
        assert len(adapter.steps) == 8 * 2 / 4
    vectors = [run.round(index).read(SteeringVector) for index in (0, 1)]
    assert not torch.equal(vectors[0].directions, vectors[1].directions)  # a new student


def _made(config: RunConfig, name: str, *settings: str) -> Run:
    """A run of the same settings under another name, with a barrier that is always on."""
    heal = config.heal.model_copy(update={"barrier_threshold_nats": 0.0})
    changed = config.model_copy(update={"run": name, "heal": heal})
    for setting in settings:
        key, _, value = setting.partition("=")
        part, _, field = key.partition(".")
        inner = getattr(changed, part).model_copy(update={field: json.loads(value)})
        changed = changed.model_copy(update={part: inner})
    run_rounds(changed, run_path(changed))
    return Run(run_path(changed), changed.seed)


def test_a_round_is_held_to_the_last_coherent_one_after_a_restart_too(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 2 broke, so round 3 is held to round 1; begun again half way, with the same bytes."""
    references: list[list[str]] = []

    def spied(*given: Any) -> RoundAdapter:
        references.append(given[3])
        return heal(*given)

    verdicts: dict[str, bool] = {}  # by the saved evaluation
    monkeypatch.setattr(steer_heal.loop, "heal", spied)
    monkeypatch.setattr(
        steer_heal.rounds,
        "is_coherent",
        lambda healed, base, limits: verdicts.setdefault(repr(healed.replies), not verdicts),
    )
    longer = config.model_copy(update={"rounds": 3})
    run = _made(longer, "ratchet", 'heal.barrier_reference="last_good"')
    assert references == [[], ["r00"], ["r00"]]
    file = run.round(2).path / "adapter" / "adapter_model.safetensors"
    before = file.read_bytes()
    rewind(run.path, 2, "adapter")
    again = _made(longer, "ratchet", 'heal.barrier_reference="last_good"')
    assert file.read_bytes() == before
    assert references[3:] == [["r00"]]
    previous = _made(longer, "previous")
    assert (previous.round(2).path / file.relative_to(again.round(2).path)).read_bytes() != before


def test_unbarred_is_round_1_healed_without_the_barrier_and_is_in_no_stack(
    config: RunConfig,
) -> None:
    plain = _made(config, "plain")
    full = _made(config, "full", 'evaluate.controls="full"')
    bare = _made(config, "bare", "heal.barrier_weight=0.0")
    assert not plain.has(Unbarred) and not (plain.path / "unbarred.json").exists()
    found = full.read(Unbarred)
    healed = [run.round(0).read(RoundEval).healed for run in (full, bare)]
    names = {"condition"}
    assert found.healed.condition == "unbarred"
    assert found.healed.model_dump(exclude=names) == healed[1].model_dump(exclude=names)
    assert found.healed.model_dump(exclude=names) != healed[0].model_dump(exclude=names)
    assert found.steps == bare.round(0).read(RoundAdapter).steps
    assert [step.barrier_nats for step in found.steps] != [0.0] * len(found.steps)
    for index in (0, 1):  # what comes after it is what comes without it
        for file in ("vector.safetensors", "adapter/adapter_model.safetensors", "eval.json"):
            contents = [(run.round(index).path / file).read_bytes() for run in (plain, full)]
            assert contents[0] == contents[1], (index, file)


def test_peft_loads_the_adapters_to_the_same_student(run: Run, config: RunConfig) -> None:
    stack = run.last_stack()
    ours = load_student(config.model, stack)
    ids = torch.tensor([[5, 6, 7, 8]])
    with ours.running() as model, torch.inference_mode():
        expected = model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    with torch.inference_mode():
        base = plain(ids).logits
    names = [str(run.round(index).path / "adapter") for index in (0, 1)]
    peft: Any = PeftModel.from_pretrained(plain, names[0], adapter_name="a")
    peft.load_adapter(names[1], adapter_name="b")
    peft.base_model.set_adapter(["a", "b"])
    with torch.inference_mode():
        found = peft(ids).logits
    torch.testing.assert_close(found, expected)
    assert (expected - base).abs().max() > 1e-3


def test_weights_of_the_model_are_not_touched(run: Run, config: RunConfig) -> None:
    description = json.loads((run.path / "run.json").read_text())
    assert weights_hash(Path(config.model)) == description["model"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["model=hub/some-model@main"], "care-over-authority--hub_some-model@main--seed0"),
        (["model=/models/x y/", "seed=4"], "care-over-authority--_models_x_y_--seed4"),
        (["model=../up", "trait=a/b/mine.toml"], "mine--.._up--seed0"),
        (["pos=a", "neg=b"], "own--organism--seed0"),
        (["run=mine"], "mine"),
        ([], "care-over-authority-organism--organism--seed0"),
    ],
)
def test_run_lands_in_one_folder_under_its_own_name(settings: list[str], name: str) -> None:
    path = run_path(resolve_config([*settings, "folder=there"]))
    assert path == Path("there") / name
    assert path.resolve().parent == Path("there").resolve()
