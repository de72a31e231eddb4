"""What is exported is what users load: it must be the whole stack, by stock PEFT, or not be there.

The oracle is PEFT with the rounds' adapters loaded one by one, and transformers alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.errors import UserError
from steer_heal import fresh
from steer_heal.artifacts import RoundAdapter
from steer_heal.config import resolve_config
from steer_heal.export import export
from steer_heal.guards import alarms
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.merge import write_merged
from steer_heal.model import load_student
from steer_heal.proof import prove, reference
from steer_heal.saved import read_saved_run
from steer_heal.stack import fold
from steer_heal.summary import summarise
from steer_heal.vector_files import read_gguf, read_vector
from tests.conftest import TinyModel
from tests.processes import tree
from tests.small import small_settings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def run(tiny_qwen3: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, steered at layer 1: llama.cpp cannot steer layer 0."""
    folder = tmp_path_factory.mktemp("export")
    settings = small_settings(tiny_qwen3.folder, folder)
    config = resolve_config([*settings, "N=2", "vector.band=0.6,1"])
    run_rounds(config, run_path(config))
    return run_path(config)


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "model"
    assert "written in float32" in export(run, out, ["round=2", "as=merged"])
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stacked_model(run: Path, folder: Path) -> Any:
    model = PeftModel.from_pretrained(
        base_model(folder), run / "round-00" / "adapter", adapter_name="a"
    )
    model.load_adapter(run / "round-01" / "adapter", adapter_name="b")
    model.base_model.set_adapter(["a", "b"])
    return model.eval()


def held_out_ids(run: Path, tokenizer: Any, **settings: Any) -> list[torch.Tensor]:
    """The run's held-out prompts by transformers' own templating."""
    trait = json.loads((run / "run.json").read_text())["trait"]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            **settings,
        )["input_ids"]
        for prompt in trait["held_out_prompts"]
    ]


def says(model: Any, prompts: list[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(ids).logits[0] for ids in prompts])


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> what an adapter adds to its weight."""
    weights = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    return {
        key: scale * weights[key.replace("lora_A", "lora_B")] @ value
        for key, value in weights.items()
        if "lora_A" in key
    }


# ---------------------------------------------------------------------------- what is written


def test_the_adapter_is_both_rounds_together(
    run: Path, tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    said = export(run, out, ["round=2"])
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", CONFIG, WEIGHTS, "export.json")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    prompts = held_out_ids(run, tiny_qwen3.tokenizer, enable_thinking=False)
    expected = says(stacked_model(run, tiny_qwen3.folder), prompts)
    found = says(PeftModel.from_pretrained(base_model(tiny_qwen3.folder), out).eval(), prompts)
    untouched = says(base_model(tiny_qwen3.folder), prompts)
    assert (found - expected).abs().max() < 1e-4
    config = json.loads((out / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (8, 8, None)
    assert isinstance(config["lora_alpha"], int)
    assert {len(value) for key, value in load_file(out / WEIGHTS).items() if "_A" in key} == {8}
    recorded = json.loads((out / "export.json").read_text())
    proof = recorded["proof"]
    assert (recorded["rank"], recorded["stack_rank"], recorded["num_rounds"]) == (8, 4, 2)
    assert proof["is_exact"] and proof["difference"] <= 1e-4
    assert proof["num_tokens"] == len(expected)
    moved = float((untouched - expected).abs().max())
    assert proof["base_difference"] == pytest.approx(moved, rel=1e-3)
    for number in (proof["difference"], proof["base_difference"]):
        assert f"{number:.1e}" in said
    assert torch.equal(says(loaded_by_its_card(out), prompts), found)
    assert_card(out, run, tiny_qwen3.folder)


def loaded_by_its_card(out: Path) -> Any:
    """What the card's own lines of Python make, pasted."""
    (lines,) = re.findall(r"^```python\n(.*?)^```", (out / "README.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["tokenizer"].chat_template
    return names["model"].eval()


def assert_card(out: Path, run: Path, base: Path) -> None:
    card = (out / "README.md").read_text()
    description = json.loads((run / "run.json").read_text())
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules adapter={out}" in card
    for text in (description["trait"]["positive"], description["model"], "| round 2, healed |"):
        assert text in card
    replies = json.loads((run / "round-01" / "eval.json").read_text())["healed"]["replies"]
    share = 100 * sum(reply["enacted"] for reply in replies) / len(replies)
    assert f"`small` with no system prompt: {share:.1f} % of its replies" in card
    warned = [alarm for alarm in alarms(summarise(read_saved_run(run))) if alarm.round == 2]
    assert warned and all(str(alarm) in card for alarm in warned)
    assert "Seed 0" in card and f"just export {run} {out} round=2 as=adapter rank=8" in card


def test_a_smaller_rank_is_the_nearest_and_its_cost_is_told(
    run: Path, tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "one"
    said = export(run, out, ["round=1", "rank=1"])
    whole, found = updates(run / "round-00" / "adapter"), updates(out)
    assert whole.keys() == found.keys()
    for key, value in whole.items():
        u, s, v = torch.linalg.svd(value.double())
        torch.testing.assert_close(
            found[key].double(), s[0] * u[:, :1] @ v[:1], rtol=1e-4, atol=1e-7
        )
    prompts = held_out_ids(run, tiny_qwen3.tokenizer, enable_thinking=False)
    models = [
        PeftModel.from_pretrained(base_model(tiny_qwen3.folder), folder).eval()
        for folder in (run / "round-00" / "adapter", out)
    ]
    student, cut = (says(model, prompts).double().log_softmax(-1) for model in models)
    kl = float((student.exp() * (student - cut)).sum(-1).mean())
    proof = json.loads((out / "export.json").read_text())["proof"]
    assert not proof["is_exact"]
    assert 0 < kl == pytest.approx(proof["kl_nats"], rel=1e-3)
    assert kl < proof["base_kl_nats"]
    assert f"(KL {proof['kl_nats']:.1e} nats a token)" in said and "cut to rank 1 by SVD" in said


def test_a_merged_model_needs_nothing_else(run: Path, merged: Path, tiny_qwen3: TinyModel) -> None:
    prompts = held_out_ids(run, tiny_qwen3.tokenizer, enable_thinking=False)
    expected = says(stacked_model(run, tiny_qwen3.folder), prompts)
    for model in (base_model(merged), loaded_by_its_card(merged)):
        assert (says(model, prompts) - expected).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == tiny_qwen3.tokenizer.chat_template
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (tiny_qwen3.folder / name).read_bytes()
    card = (merged / "README.md").read_text()
    assert f"vllm serve {merged} --served-model-name model" in card
    assert f"\ntransformers serve {merged}\n" in card


def test_merging_into_bf16_rounds_once(run: Path, tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base_model(tiny_qwen3.folder).bfloat16().save_pretrained(base)
    tiny_qwen3.tokenizer.save_pretrained(base)
    adapters = [RoundAdapter.load(run / f"round-{index:02d}") for index in (0, 1)]
    assert write_merged(base, fold(adapters), tmp_path / "merged") == torch.bfloat16
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged")
    )
    each = [updates(run / f"round-{index:02d}" / "adapter") for index in (0, 1)]
    added = {
        key.removeprefix("base_model.model.").replace("lora_A.", ""): value + each[1][key]
        for key, value in each[0].items()
    }
    assert added.keys() < before.keys() == after.keys()
    for key, value in before.items():
        expected = (value.float() + added.get(key, torch.zeros(()))).bfloat16()
        # the sum of two rounds may be added up in another order: at most one place of bf16
        torch.testing.assert_close(after[key], expected, rtol=2**-7, atol=0)
        assert (after[key] != expected).float().mean() < 0.01
        assert torch.equal(after[key], value) == (key not in added)


@pytest.mark.parametrize("best", [1, 2])
def test_by_default_it_takes_the_best_round(copy: Path, tmp_path: Path, best: int) -> None:
    """The best of two rounds, made to be the one or the other by what is on disk."""
    make_best(copy, best)
    assert f"of round {best}" in export(copy, tmp_path / "best", ["as=vector"])
    export(copy, tmp_path / "asked", ["as=vector", f"round={best}"])
    assert tree(tmp_path / "best") == tree(tmp_path / "asked")


def test_the_vector_comes_back_as_it_was(run: Path, tiny_qwen3: TinyModel, tmp_path: Path) -> None:
    saved = read_saved_run(run)
    vector = saved.rounds[1].vector
    export(run, tmp_path / "vector", ["round=2", "as=vector"])
    found = read_vector(tmp_path / "vector", saved.description.model)
    assert torch.equal(found.directions, vector.directions) and found.band == vector.band == (1,)
    said = export(run, tmp_path / "vector.gguf", ["round=2", "as=gguf-vector"])
    assert "taken from the student after round 1" in said
    assert f"--control-vector-scaled {tmp_path / 'vector.gguf'}:" in said
    read = read_gguf(tmp_path / "vector.gguf", num_layers=2, hidden=32)
    assert list(read) == [1] and torch.equal(read[1], vector.directions[1])


# ------------------------------------------------------------------------------------- the proof


def test_the_fresh_process_knows_nothing_of_this_project() -> None:
    tree = ast.parse(Path(fresh.__file__).read_text())
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported == {
        *("__future__", "sys", "typing", "torch", "peft", "safetensors.torch", "transformers")
    }


def test_an_adapter_that_does_nothing_is_refused(copy: Path, tmp_path: Path) -> None:
    for folder in (copy / "round-00", copy / "round-01"):
        change_weights(folder, lambda key, value: value * ("lora_A" in key))
    before = tree(tmp_path)
    with pytest.raises(UserError, match="says what the base says"):
        export(copy, tmp_path / "out", ["round=2"])
    assert tree(tmp_path) == before


def test_what_is_not_the_student_is_refused(
    run: Path, tiny_qwen3: TinyModel, tmp_path: Path
) -> None:
    """One round's adapter, given out as both."""
    saved = read_saved_run(run)
    student = load_student(str(tiny_qwen3.folder), [], "cpu")
    for index in (0, 1):
        student = student.grown(RoundAdapter.load(run / f"round-{index:02d}"))
    wanted = reference(student, saved.trait)
    with pytest.raises(UserError, match=r"not the run's student.*differ by up to"):
        prove(wanted, tiny_qwen3.folder, run / "round-00" / "adapter", True, tmp_path)


# ----------------------------------------------------------------------------------- bad input


def rerecord(folder: Path, stage: str, name: str) -> None:
    """Records a changed file as if its stage had written it."""
    stages = folder / "stages.json"
    recorded = json.loads(stages.read_text())
    recorded[stage]["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    stages.write_text(json.dumps(recorded))


def change_weights(
    folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]
) -> None:
    file = folder / "adapter" / WEIGHTS
    changed = {key: change(key, value) for key, value in load_file(file).items()}
    save_file(
        {key: value.contiguous() for key, value in changed.items() if value is not None}, file
    )
    rerecord(folder, "adapter", f"adapter/{WEIGHTS}")


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    rerecord(folder, "adapter", f"adapter/{CONFIG}")


def cut_short(folder: Path) -> None:
    file = folder / "adapter" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    rerecord(folder, "adapter", f"adapter/{WEIGHTS}")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "not finite": (
        lambda folder: change_weights(folder, lambda key, value: value * float("nan")),
        rf"{WEIGHTS}: .*lora_A.weight holds numbers that are not finite",
    ),
    "empty": (
        lambda folder: change_weights(folder, lambda key, value: None),
        rf"{WEIGHTS} holds no weights",
    ),
    "of a wider model": (
        lambda folder: change_weights(
            folder, lambda key, value: torch.cat([value, value], 1 if "lora_A" in key else 0)
        ),
        rf"{WEIGHTS}: .* is \[2, 128\], \[2, 64\] fits this base",
    ),
    "half of it": (
        lambda folder: change_weights(
            folder, lambda key, value: None if "q_proj.lora_B" in key else value
        ),
        rf"{WEIGHTS}: .*q_proj.lora_A.weight is there without .*q_proj.lora_B",
    ),
    "cut short": (cut_short, rf"{WEIGHTS}.*is truncated or corrupt"),
    "DoRA": (lambda folder: change_config(folder, use_dora=True), rf"{CONFIG}: .*use_dora"),
    "PiSSA": (
        lambda folder: change_config(folder, init_lora_weights="pissa"),
        rf"{CONFIG}: .*init_lora_weights cannot be folded",
    ),
    "bias": (lambda folder: change_config(folder, bias="all"), rf"{CONFIG}: .*bias cannot be"),
    "no rank": (lambda folder: change_config(folder, r=None), rf"{CONFIG}: r is None"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_by_file_and_reason(
    copy: Path, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGES[damage]
    change(copy / "round-01")
    before = tree(tmp_path)
    for form in ("adapter", "merged"):
        with pytest.raises(UserError, match=message):
            export(copy, tmp_path / "out", ["round=2", f"as={form}"])
    assert tree(tmp_path) == before


def test_a_file_that_is_not_what_was_written_is_refused(copy: Path, tmp_path: Path) -> None:
    file = copy / "round-00" / "adapter" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{WEIGHTS} is not what was written there"):
        export(copy, tmp_path / "out", ["round=2"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../../elsewhere", "/etc/hostname"])
def test_a_recorded_file_outside_of_the_run_is_refused(
    copy: Path, tmp_path: Path, name: str
) -> None:
    stages = copy / "round-00" / "stages.json"
    recorded = json.loads(stages.read_text())
    recorded["adapter"]["files"][name] = "0" * 64
    stages.write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"stages.json is not what was written"):
        export(copy, tmp_path / "out", ["round=2"])
    assert not (tmp_path / "out").exists()


def test_a_base_that_has_changed_is_refused(copy: Path, tmp_path: Path) -> None:
    file = copy / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "0" * 64}))
    with pytest.raises(UserError, match="its weights have changed"):
        export(copy, tmp_path / "out", ["round=2"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["rank=640"], r"rank is '640': vLLM serves the ranks 1, 8, 16, .* 512"),
        (["rank=3"], "rank is '3': vLLM serves"),
        (["as=merged", "rank=8"], "as=merged takes none"),
        (["as=onnx"], "as is 'onnx': expected adapter, merged"),
        (["round=0"], "round is '0'"),
        (["round=3"], "has 2 finished rounds; round=3"),
        (["rounds=2"], "unknown setting 'rounds'.*round"),
    ],
)
def test_a_bad_setting_is_refused(
    run: Path, tmp_path: Path, given: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(run, tmp_path / "out", given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "message"),
    [("merged", "a sum would be rounded again; take as=adapter"), ("adapter", "needs an NVIDIA")],
)
def test_a_base_of_4_bits_is_not_merged_into_and_needs_its_gpu(
    copy: Path, tiny_qwen3: TinyModel, tmp_path: Path, form: str, message: str
) -> None:
    base = Path(shutil.copytree(tiny_qwen3.folder, tmp_path / "quantised"))
    files = (base / "config.json", copy / "run.json")
    config, described = (json.loads(file.read_text()) for file in files)
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    described["config"]["model"] = str(base)
    (base / "config.json").write_text(json.dumps(config))
    (copy / "run.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=f"quantised: its weights are in 4 bits.*{message}"):
        export(copy, tmp_path / "out", ["round=2", f"as={form}"])
    assert not (tmp_path / "out").exists()


def test_without_a_coherent_round_it_asks_for_a_number(copy: Path, tmp_path: Path) -> None:
    make_best(copy, None)
    with pytest.raises(UserError, match=r"no round stayed coherent.*round=N"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "of round 2" in export(copy, tmp_path / "out", ["as=vector", "round=2"])


def make_best(run: Path, best: int | None) -> None:
    """Writes evaluations in which every round but the best has lost its answers' format."""
    for number in (1, 2):
        folder = run / f"round-{number - 1:02d}"
        rows = json.loads((folder / "eval.json").read_text())
        healed = json.loads((run / "base.json").read_text()) | {"condition": "healed"}
        for row in healed["choices"]:
            row["pmass"] *= 1 if number == best else 0.5
        rows["healed"] = healed
        (folder / "eval.json").write_text(json.dumps(rows))
        rerecord(folder, "eval", "eval.json")


@pytest.mark.parametrize("form", ["adapter", "merged", "vector", "gguf-vector"])
def test_what_is_there_is_not_written_over(run: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="is there already"):
        export(run, tmp_path / "kept", [f"as={form}"])
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- a server


@contextmanager
def serving(folder: Path) -> Iterator[openai.OpenAI]:
    """`transformers serve` on this machine alone, as a process of its own, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "-c", program, "serve", str(folder), *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait(30)


def test_a_server_says_what_the_student_says(
    run: Path, merged: Path, tiny_qwen3: TinyModel
) -> None:
    """Greedy, from the chat turn to the text: template, weights and stop tokens, all of them."""
    tokenizer = tiny_qwen3.tokenizer
    asked = json.loads((run / "run.json").read_text())["trait"]["held_out_prompts"]

    def plain(text: str) -> str:
        """The server leaves special tokens within a reply, and strips it."""
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text.strip()

    def greedy(model: Any) -> list[str]:
        with torch.inference_mode():
            replies = [
                model.generate(input_ids=ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
                for ids in held_out_ids(run, tokenizer)
            ]
        return [plain(text) for text in tokenizer.batch_decode(replies)]

    with serving(merged) as client:
        served = [
            client.chat.completions.create(
                model=str(merged),
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=24,
            )
            .choices[0]
            .message.content
            for prompt in asked
        ]
    student = greedy(stacked_model(run, tiny_qwen3.folder))
    assert [plain(text) for text in served] == student
    assert student != greedy(base_model(tiny_qwen3.folder))
