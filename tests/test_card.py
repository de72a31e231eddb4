"""The lines of a model card can be pasted, and no text or name breaks out of its place."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from steer_heal.card import Exported, serving_lines
from steer_heal.proof import Proof
from steer_heal.wording import code, fenced

PROOF = Proof(
    is_exact=True,
    num_prompts=2,
    num_tokens=9,
    difference=1e-6,
    base_difference=1.0,
    kl_nats=0.0,
    base_kl_nats=0.1,
)


def exported(**values: Any) -> Exported:
    given = {"form": "adapter", "num_rounds": 3, "stack_rank": 48, "rank": 64, "dtype": "float32"}
    return Exported(proof=PROOF, **(given | values))


def test_an_adapter_is_served_beside_its_base_at_its_revision() -> None:
    vllm, sglang, convert, llama = serving_lines(exported(), "org/model@main", Path("to/kind"))
    assert shlex.join(vllm) == (
        "vllm serve org/model --revision main --enable-lora --max-lora-rank 64 "
        "--lora-modules kind=to/kind"
    )
    assert shlex.join(sglang) == (
        "python -m sglang.launch_server --model-path org/model --revision main --enable-lora "
        "--max-lora-rank 64 --lora-paths kind=to/kind"
    )
    assert convert[2:4] == ["--base-model-id", "org/model"] and convert[-1] == "to/kind"
    assert llama[-2:] == ["--lora", "kind.gguf"]


def test_a_merged_model_is_served_alone() -> None:
    for line in serving_lines(exported(form="merged", rank=None), "org/model", Path("to/kind")):
        assert "org/model" not in line and not any("lora" in word for word in line)


def test_a_local_base_is_converted_from_its_folder(tmp_path: Path) -> None:
    base = tmp_path / "model@home"
    base.mkdir()
    lines = serving_lines(exported(), str(base), Path("a b"))
    assert lines[0][:4] == ["vllm", "serve", str(base), "--enable-lora"]
    assert lines[2][2:4] == ["--base", str(base)]
    assert all(shlex.split(shlex.join(line)) == line for line in lines)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "the sum of the first 3 rounds as one LoRA of rank 64, padded from 48, exactly"),
        ({"num_rounds": 1, "stack_rank": 64}, "the first round as one LoRA of rank 64, exactly"),
        ({"rank": 16}, "the sum of the first 3 rounds, of rank 48, cut to rank 16 by SVD"),
        ({"rank": None, "dtype": "bfloat16"}, "in fp32 and written in bfloat16"),
    ],
)
def test_it_says_what_became_of_the_rounds(values: dict[str, Any], text: str) -> None:
    assert text in exported(**values).text


@pytest.mark.parametrize("text", ["plain", "a `b` c", "```\nclosed", "`", "````"])
def test_no_backtick_ends_a_block_or_a_span(text: str) -> None:
    fence, *inside, last = fenced(text).split("\n")
    assert fence == last == "`" * len(fence) and len(fence) >= 3
    assert "\n".join(inside) == text and fence not in text
    span = code(text)
    ticks = len(span) - len(span.lstrip("`"))
    assert "\n" not in span and span.endswith("`" * ticks)
    assert "`" * ticks not in span[ticks:-ticks]
