"""The doctor on healthy families, and on models that are broken in one way each."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import steer_heal.loop
import steer_heal.memory
from eval.errors import UserError
from steer_heal.batch_sizes import settled
from steer_heal.case import Finding
from steer_heal.checks import CHECKS
from steer_heal.cli import app
from steer_heal.config import GenerateConfig, HealConfig, RunConfig, resolve_config
from steer_heal.doctor import Checkup, check_up
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.memory import GIB, estimate_memory
from steer_heal.model import Student, load_student, outline_student
from steer_heal.plan import needed_memory
from steer_heal.reach import adapter_reach
from steer_heal.trait import load_trait
from tests.conftest import TinyModel
from tests.small import small_run, small_settings
from tests.tiny import QWEN3_TEMPLATE, Family, tiny_model_folder


def looked_over(student: Student, *settings: str) -> dict[str, Finding]:
    config = resolve_config(["model=somewhere/some-model", *settings])
    found = check_up(student, load_trait(config.trait, None, None), config)
    assert [finding.check for finding in found.findings] == list(CHECKS)
    return {finding.check: finding for finding in found.findings}


def statuses(findings: dict[str, Finding]) -> dict[str, str]:
    """Of what is not ok."""
    return {name: one.status for name, one in findings.items() if one.status != "ok"}


def copied(tiny: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder, tmp_path / "copy"))


def with_template(tiny: TinyModel, tmp_path: Path, template: str) -> Path:
    folder = copied(tiny, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def asked(*arguments: str) -> tuple[int, str]:
    """Exit code and all that `steer-heal doctor` says."""
    done = CliRunner().invoke(app, ["doctor", *arguments])
    return done.exit_code, done.output


# --------------------------------------------------------------------------------------- healthy


def test_three_families_have_nothing_to_complain_of(tiny: TinyModel) -> None:
    found = looked_over(load_student(str(tiny.folder), [], "cpu"))
    assert statuses(found) == {}
    folded = "first user turn" in found["chat template"].measured
    assert folded == (tiny.family == "gemma3")
    assert f"{3 if tiny.family == 'gemma3' else 2} layers" in found["decoder"].measured
    assert "width 32" in found["decoder"].measured
    assert "float32 on cpu" in found["number format"].measured


@pytest.mark.parametrize(
    ("family", "warned"),
    [
        ("gemma3_vision", {}),
        ("mistral", {}),
        ("phi3", {}),
        ("qwen3_5", {"slow paths": "warn"}),
        ("qwen3_moe", {"adapter reach": "warn", "slow paths": "warn"}),
    ],
)
def test_other_families_are_warned_of_what_is_theirs(
    family: Family, warned: dict[str, str], tmp_path: Path
) -> None:
    found = looked_over(load_student(str(tiny_model_folder(tmp_path, family)), [], "cpu"))
    assert statuses(found) == warned
    assert all(found[name].advice for name in warned)


def test_the_model_is_left_as_it_was(tiny_qwen3: TinyModel) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    before = {key: value.clone() for key, value in student.loaded.model.state_dict().items()}
    draws = torch.random.get_rng_state()
    looked_over(student)
    model = student.loaded.model
    assert not isinstance(model, PeftModel) and not model.training
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("steer_heal")]


def test_command_prints_a_line_a_check(tiny_qwen3: TinyModel) -> None:
    code, said = asked(str(tiny_qwen3.folder))
    lines = [line for line in said.splitlines() if line.startswith(("ok", "warn", "fail"))]
    assert code == 0
    assert [line[6:].partition(":")[0] for line in lines] == list(CHECKS)


# ---------------------------------------------------------------------------------------- broken


def test_a_model_without_a_template_cannot_be_loaded(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    (folder / "chat_template.jinja").unlink()
    code, said = asked(str(folder))
    assert (code, "no chat template" in said) == (2, True)


def test_a_template_that_ignores_the_system_turn_is_worked_around(
    tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    ignoring = QWEN3_TEMPLATE.replace(
        "in messages %}", "in messages if message.role != 'system' %}"
    )
    folder = with_template(tiny_qwen3, tmp_path, ignoring)
    found = looked_over(load_student(str(folder), [], "cpu"))
    assert statuses(found) == {}
    assert "no system role" in found["chat template"].measured


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('out of order') }}", "out of order"),
        (QWEN3_TEMPLATE.replace("message.content", "message.content[-9:]"), "drops the persona"),
        (QWEN3_TEMPLATE.replace("in messages %}", "in messages[-1:] %}"), "earlier turns"),
    ],
)
def test_a_template_that_breaks_prompts_fails(
    tiny_qwen3: TinyModel, tmp_path: Path, template: str, said: str
) -> None:
    code, lines = asked(str(with_template(tiny_qwen3, tmp_path, template)))
    assert code == 1
    assert any(
        line.startswith("fail  chat template") and said in line for line in lines.split("\n")
    )


def test_a_template_that_opens_a_think_is_warned_of(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    template = QWEN3_TEMPLATE.replace("\\n</think>\\n\\n", "")
    found = looked_over(load_student(str(with_template(tiny_qwen3, tmp_path, template)), [], "cpu"))
    assert statuses(found) == {"chat template": "warn"}
    assert "opened think" in found["chat template"].measured


def test_digits_of_several_tokens_fail(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "5"}, "content": "five"}
    path.write_text(json.dumps(tokenizer))
    code, said = asked(str(folder))
    assert code == 1
    assert "fail  digits: the tokenizer does not spell the digits 0 to 6" in said


def test_no_end_of_turn_fails(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        fields = json.loads((folder / name).read_text())
        kept = {key: value for key, value in fields.items() if not key.startswith("eos_token")}
        (folder / name).write_text(json.dumps(kept))
    code, said = asked(str(folder))
    assert code == 1
    assert "fail  end of turn" in said and "eos_token_id" in said


def test_a_reply_that_does_not_end_where_the_template_ends_it_is_warned_of(
    tiny_gemma3: TinyModel, tmp_path: Path
) -> None:
    folder = copied(tiny_gemma3, tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    found = looked_over(load_student(str(folder), [], "cpu"))
    assert statuses(found) == {"end of turn": "warn"}
    assert "'<end_of_turn>'" in found["end of turn"].measured
    assert "generation_config.json" in found["end of turn"].advice


def test_a_model_that_reads_its_padding_fails(tiny: TinyModel) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    model = student.loaded.model
    original = model.forward

    def blind(*args: Any, attention_mask: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)  # of positions alone transformers would infer the mask

    model.forward = blind
    found = looked_over(student)
    assert found["padding"].status == "fail"
    assert float(found["padding"].measured.split("differ by ")[1].split(" ")[0]) > 0.1


def test_logits_that_are_not_projected_as_the_config_says_fail(tiny_qwen3: TinyModel) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    student.loaded.model.config.final_logit_softcapping = 1.0  # which Qwen3 does not heed
    assert statuses(looked_over(student)) == {"logits": "fail"}


def test_hooks_on_modules_that_do_not_run_fail(tiny_qwen3: TinyModel) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    student.loaded.layers[:] = copy.deepcopy(student.loaded.layers)
    found = looked_over(student)
    assert statuses(found) == {"decoder": "fail", "steering": "fail"}
    assert "do not run" in found["decoder"].measured


def test_weights_that_overflow_fail(tiny_qwen3: TinyModel) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    student.loaded.model.lm_head.weight.data[7] = float("inf")
    found = looked_over(student)
    assert found["number format"].status == "fail"
    assert "not finite" in found["number format"].measured


def test_a_family_without_linear_modules_has_nothing_to_adapt(
    tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    """GPT-2's projections are Conv1D."""
    folder = copied(tiny_qwen3, tmp_path)
    size = len(tiny_qwen3.tokenizer)
    config = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, bos_token_id=0)
    config.eos_token_id = tiny_qwen3.tokenizer.eos_token_id
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    code, said = asked(str(folder))
    assert code == 1
    assert "fail  adapter reach: GPT2LMHeadModel: no linear module" in said


@pytest.mark.parametrize("arguments", [["nowhere/at-all.x!"], ["organism", "generate.dose=1"]])
def test_what_cannot_be_looked_at_ends_with_2(arguments: list[str]) -> None:
    assert asked(*arguments)[0] == 2


# ---------------------------------------------------------------------------------------- memory


@torch.inference_mode()
def test_the_cache_is_as_large_as_the_one_that_the_model_makes(tiny: TinyModel) -> None:
    student = load_student(str(tiny.folder), [], "cpu")
    modules = adapter_reach(student, (0, 1)).modules
    config = GenerateConfig(batch_size=3, max_new_tokens=4)
    found = estimate_memory(student, modules, 8, config, HealConfig())
    cache = student.loaded.model(torch.full((3, 12), 5), use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    vocab = student.loaded.model.config.vocab_size
    assert found.draft == cached + 3 * vocab * 24
    weights = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    assert found.parameters == sum(value.nbytes for value in weights.parameters())


def test_the_embedded_model_takes_about_what_it_is_said_to() -> None:
    """Measured: 0.83 to 0.86 GiB over three rounds."""
    config = RunConfig()
    student = load_student(config.model, [], "cpu")
    modules = adapter_reach(student, config.heal.layers).modules
    found = estimate_memory(student, modules, 110, config.generate, config.heal)
    assert 0.5 < found.run / GIB / 0.85 < 1.5


def test_the_plan_before_loading_is_the_estimate_of_the_loaded_model(
    tiny: TinyModel, tmp_path: Path
) -> None:
    config = resolve_config([*small_settings(tiny.folder, tmp_path), "generate.batch_size=auto"])
    trait = load_trait(config.trait, None, None)
    student, outline = load_student(config.model, [], "cpu"), outline_student(config.model, "cpu")
    assert {value.device.type for value in outline.loaded.model.parameters()} == {"meta"}
    assert outline.loaded.linear_names == student.loaded.linear_names
    needed = [needed_memory(one, trait, settled(one, trait, config)) for one in (student, outline)]
    assert needed[0] == needed[1]
    assert needed[0].parameters == sum(value.nbytes for value in tiny.model.parameters())


def test_a_quantised_model_is_planned_by_its_files(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    """Its outline is not quantised: counted by it, a model that fits would be refused."""
    folder = copied(tiny_qwen3, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config | quantised))
    save_file({"packed": torch.zeros(1000)}, folder / "model.safetensors")
    found = outline_student(str(folder), "cpu").loaded.parameter_bytes
    assert found == (folder / "model.safetensors").stat().st_size


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(
    tiny_qwen3: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny_qwen3, tmp_path)
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    config = resolve_config(small_settings(folder, tmp_path))
    monkeypatch.setattr(steer_heal.memory, "_device_total", lambda device: GIB / 8)
    with pytest.raises(UserError, match=r"memory: about .* the model alone does not fit"):
        run_rounds(config, run_path(config))
    assert not run_path(config).exists()


def test_a_run_tells_its_plan_before_it_loads_and_its_peak_at_the_end(tmp_path: Path) -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    small_run(tmp_path, 1)
    logger.remove(sink)
    plan, model, *_, peak = (line for line in lines if re.match("memory: |model ", line))
    assert plan.startswith("memory: about ") and model.startswith("model ")
    assert peak.endswith(f"expected: {plan.removeprefix('memory: ')}")


def test_what_does_not_fit_is_warned_of(tiny_qwen3: TinyModel) -> None:
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    found = looked_over(student, "generate.batch_size=100000000", "generate.num_drafts=100000000")
    assert statuses(found) == {"memory": "warn"}
    assert "generate.batch_size" in found["memory"].advice


# ---------------------------------------------------------------------------------------- a run


def test_a_run_is_refused_before_its_first_stage(tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    broken = with_template(tiny_qwen3, tmp_path, "{{ raise_exception('out of order') }}")
    config = resolve_config(small_settings(broken, tmp_path))
    with pytest.raises(UserError, match=r"model .*copy: chat template: .*out of order"):
        run_rounds(config, run_path(config))
    names = {path.name for path in run_path(config).iterdir()}
    assert names <= {"run.json", "log.txt", ".lock"}


def test_a_run_is_looked_over_once(
    tiny_qwen3: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve_config([*small_settings(tiny_qwen3.folder, tmp_path), "N=1"])

    def stopped(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(steer_heal.loop, "calibrate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(config, run_path(config))
    saved = (run_path(config) / "doctor.json").read_bytes()
    assert not Checkup.model_validate_json(saved).failed
    monkeypatch.setattr(steer_heal.loop, "admit", lambda *given: pytest.fail("looked over again"))
    with pytest.raises(KeyboardInterrupt):
        run_rounds(config, run_path(config))
    assert (run_path(config) / "doctor.json").read_bytes() == saved
    assert not any(word in saved.decode() for word in ("time", "seconds"))
