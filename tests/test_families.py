"""Every family of decoders through a whole run, and its adapter through stock PEFT.

The families whose decoder another one here has too are marked slow: Qwen3 is what the loop is
tested with, Llama is Mistral with another tokenizer, Gemma 3 is what its wrapper wraps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from eval.chat import chat_ids
from eval.sampling import sample_replies
from steer_heal.artifacts import Completions, RoundEval, SteeringVector
from steer_heal.cli import app
from steer_heal.config import HealConfig, RunConfig, resolve_config
from steer_heal.doctor import Checkup
from steer_heal.hooks import add_vector
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.model import Student, load_student
from steer_heal.reach import adapter_reach
from steer_heal.report import write_report
from steer_heal.rounds import Run
from tests.small import small_settings
from tests.tiny import ALL_FAMILIES, Family, tiny_model_folder

ALSO_ELSEWHERE = ("qwen3", "llama", "gemma3")
DECODERS = {
    "gemma3_vision": "model.language_model.layers.",  # the tower's are model.vision_tower...
}
KINDS = {  # what an adapter is put on, where it is not the seven projections of Llama
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "qwen3_moe": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "qwen3_5": [
        *("down_proj", "gate_proj", "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z"),
        *("k_proj", "o_proj", "out_proj", "q_proj", "up_proj", "v_proj"),
    ],
}
LLAMA_KINDS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@dataclass(frozen=True)
class FamilyRun:
    """A finished run of one round on one family."""

    family: Family
    config: RunConfig

    @property
    def run(self) -> Run:
        return Run(run_path(self.config), self.config.seed)

    @cached_property
    def student(self) -> Student:
        return load_student(self.config.model, [], "cpu")

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.config.model, dtype=torch.float32).eval()


def made(family: Family, folder: Path) -> FamilyRun:
    """The preset of real models but for its sizes, with steps that leave a random model whole."""
    model = tiny_model_folder(folder, family)
    ours = [
        *("N=1", "heal.learning_rate=0.0001", "filter.num_calibration=8"),
        *("evaluate.num_random=1", "evaluate.samples_per_prompt=1", "evaluate.num_dialogues=1"),
    ]
    keys = {setting.partition("=")[0] for setting in ours}
    small = small_settings(model, folder)
    kept = [setting for setting in small if setting.partition("=")[0] not in keys]
    config = resolve_config([*kept, *ours])
    run_rounds(config, run_path(config))
    return FamilyRun(family, config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], FamilyRun]:
    """Each family's run, made when it is first asked for."""
    return cache(lambda family: made(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(
    params=[
        pytest.param(family, marks=[pytest.mark.slow] if family in ALSO_ELSEWHERE else [])
        for family in ALL_FAMILIES
    ],
)
def made_run(request: pytest.FixtureRequest, runs: Callable[[Family], FamilyRun]) -> FamilyRun:
    return runs(request.param)


def test_every_stage_leaves_what_it_should(made_run: FamilyRun) -> None:
    run, round = made_run.run, made_run.run.round(0)
    assert round.is_done
    assert not run.read(Checkup).failed
    drafts, evaluation = round.read(Completions), round.read(RoundEval)
    assert len({row.text for row in drafts.rows}) > len(drafts.rows) / 2
    assert {row.dose for row in drafts.rows} == {0.05, 0.1}
    assert max(row.kl_p95_nats for row in drafts.rows) > 1e-4  # the steering acted
    assert evaluation.healed.choices and not evaluation.healed.unscorable
    assert [row.scores for row in evaluation.healed.choices] != [
        row.scores for row in evaluation.steered.choices
    ]
    write_report(run.path)
    assert "<html" in (run.path / "report.html").read_text()[:200]


def test_both_personas_are_in_the_prompts_that_the_vector_is_taken_from(
    made_run: FamilyRun,
) -> None:
    tokenizer, vector = made_run.student.tokenizer, made_run.run.round(0).read(SteeringVector)
    texts = [
        tokenizer.decode(chat_ids(tokenizer, "What now?", persona), skip_special_tokens=False)
        for persona in ("You care for people before rules.", "You obey orders before people.")
    ]
    assert "You care for people before rules." in texts[0] and "What now?" in texts[0]
    assert "You obey orders before people." in texts[1] and "What now?" in texts[1]
    assert min(vector.norms[layer] for layer in vector.band) > 0
    assert all("<think>" not in text or "</think>" in text for text in texts)  # it is shut


def test_the_adapter_is_put_on_the_text_decoder_alone_by_full_names(made_run: FamilyRun) -> None:
    folder = made_run.run.round(0).path / "adapter"
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    base, weights = made_run.base(), load_file(folder / "adapter_model.safetensors")
    prefix = DECODERS.get(made_run.family, "model.layers.")
    linear = {name for name, one in base.named_modules() if isinstance(one, torch.nn.Linear)}
    assert set(targets) <= linear and all(name.startswith(prefix) for name in targets)
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in weights}
    assert names == set(targets)
    # from 20 on PEFT shortens them: Qwen3.5's 23 to `out_proj` and the like, which towers have, too
    assert len(targets) == (23 if made_run.family == "qwen3_5" else len(set(targets)))
    kinds = sorted({name.rpartition(".")[2] for name in targets})
    assert kinds == KINDS.get(made_run.family, LLAMA_KINDS)


def test_what_the_adapter_reaches_is_counted_from_the_weights(made_run: FamilyRun) -> None:
    reach = adapter_reach(made_run.student, made_run.config.heal.layers)
    state = dict(made_run.base().named_parameters())
    total = sum(value.numel() for value in state.values())
    reached = sum(state[f"{name}.weight"].numel() for name in reach.modules)
    assert reach.share == pytest.approx(reached / total)
    assert reach.share + sum(reach.missed.values()) == pytest.approx(1)
    experts = sum(value.numel() for key, value in state.items() if ".experts." in key)
    tower = sum(
        value.numel() for key, value in state.items() if "vision" in key or "proj.mm" in key
    )
    assert reach.missed.get("experts", 0) == pytest.approx(experts / total)
    assert reach.missed.get("what is outside of the text decoder", 0) >= tower / total
    assert bool(tower) == (made_run.family == "gemma3_vision")
    log = (made_run.run.path / "log.txt").read_text()
    saved = next(f for f in made_run.run.read(Checkup).findings if f.check == "adapter reach")
    assert saved.measured == str(reach) and str(reach) in log
    assert ("experts" in saved.measured) == (made_run.family == "qwen3_moe")


def test_stock_peft_loads_the_adapter_to_the_healed_student(made_run: FamilyRun) -> None:
    stack = made_run.run.last_stack()
    ours = load_student(made_run.config.model, stack, "cpu")
    folder = made_run.run.round(0).path / "adapter"
    assert_equals_the_stack(made_run, ours, folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_export_is_the_stack(made_run: FamilyRun, form: str, tmp_path: Path) -> None:
    ours, out = (
        load_student(made_run.config.model, made_run.run.last_stack(), "cpu"),
        tmp_path / "o",
    )
    done = CliRunner().invoke(app, ["export", str(made_run.run.path), str(out), f"as={form}"])
    assert done.exit_code == 0, done.output
    assert_equals_the_stack(made_run, ours, out, is_merged=form == "merged")


@torch.inference_mode()
def assert_equals_the_stack(
    made_run: FamilyRun, ours: Student, folder: Path, is_merged: bool = False
) -> None:
    ids = torch.tensor([chat_ids(ours.tokenizer, "What is 12 plus 30?", "You are kind.")])
    with ours.running() as model:
        expected = model(ids).logits
    untouched = made_run.base()(ids).logits
    if is_merged:
        user = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        user = PeftModel.from_pretrained(made_run.base(), folder)
    found = user.eval()(ids).logits
    change = float((expected - untouched).abs().max())
    assert change > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-4, 1e-3 * change))


def test_a_row_in_a_steered_batch_says_what_it_says_alone(made_run: FamilyRun) -> None:
    """Left padding, a dose a row, rows that leave the batch early, and the family's own cache."""
    student, vector = made_run.student, made_run.run.round(0).read(SteeringVector)
    layers = [student.loaded.layers[index] for index in vector.band]
    turns = ["Hi.", "What is 12 plus 30? And what colour is grass?", "The nurse told the guard."]
    prompts = [chat_ids(student.tokenizer, turn) for turn in turns] * 2
    doses = [0.0, 0.5, 1.0, 2.0, 0.0, 3.0]

    def replies(batch_size: int) -> list[Any]:
        with student.running() as model:
            return sample_replies(
                model,
                student.tokenizer,
                prompts,
                seed=3,
                max_new_tokens=24,
                batch_size=batch_size,
                around_batch=lambda rows: add_vector(
                    layers, vector.band_directions, torch.tensor([doses[row] for row in rows])
                ),
            )

    together = replies(len(prompts))
    assert together == replies(1)
    assert len({reply.token_ids for reply in together}) == len(prompts)


def test_the_same_seed_gives_the_same_bytes_on_linear_attention(
    runs: Callable[[Family], FamilyRun], tmp_path: Path
) -> None:
    folders = [one.run.path for one in (runs("qwen3_5"), made("qwen3_5", tmp_path))]
    for file in (
        *("doctor.json", "base.json", "round-00/completions.jsonl", "round-00/eval.json"),
        "round-00/adapter/adapter_model.safetensors",
    ):
        first, second = ((folder / file).read_bytes() for folder in folders)
        assert first == second, file


def test_the_preset_of_real_models_holds_for_every_family() -> None:
    """What the runs above change of it are sizes, the filter's opening and the step."""
    config = resolve_config(["model=somewhere/some-model"])
    assert config.trait == "care-over-authority"
    assert config.heal == HealConfig()
    assert (config.generate.batch_size, config.generate.max_new_tokens) == ("auto", 128)
