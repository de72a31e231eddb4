"""The model card of an export: what it is, what it reaches, how it is served, how it was made.

Drawn from the run's saved files and the proof alone.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from steer_heal.config import ORGANISM
from steer_heal.guards import alarms
from steer_heal.proof import Proof
from steer_heal.report import command_of
from steer_heal.summary import Summary
from steer_heal.wording import templates

_ORGANISM_PATH = "steer_heal/organism/weights"  # from the project's root


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported: `export.json` beside the weights."""

    form: str  # adapter or merged
    num_rounds: int  # the sum of the first so many
    stack_rank: int  # sum of the rounds' ranks
    rank: int | None  # as written; None: merged into the base
    dtype: str  # of the written weights
    proof: Proof

    @property
    def text(self) -> str:
        """What became of the rounds, as half a sentence."""
        what = "the first round"
        if self.num_rounds > 1:
            what = f"the sum of the first {self.num_rounds} rounds"
        if self.rank is None:
            return f"{what}, added to the base's weights in fp32 and written in {self.dtype}"
        if self.rank < self.stack_rank:
            return f"{what}, of rank {self.stack_rank}, cut to rank {self.rank} by SVD"
        how = f", padded from {self.stack_rank}" if self.rank > self.stack_rank else ""
        return f"{what} as one LoRA of rank {self.rank}{how}, exactly"


def card_text(report: Summary, exported: Exported, out: Path) -> str:
    """The card as Markdown.

    Args:
        out: where the export will lie.
    """
    config = report.run.description.config
    base, revision = served_base(config["model"])
    round = report.rounds[exported.num_rounds - 1]
    settings = [f"round={exported.num_rounds}", f"as={exported.form}"]
    if exported.rank is not None:
        settings.append(f"rank={exported.rank}")
    command = shlex.join(["just", "export", str(report.run.path), str(out), *settings])
    return (
        templates(is_html=False)
        .get_template("card.md")
        .render(
            name=out.name,
            base=base,
            revision=revision,
            report=report,
            run=report.run,
            trait=report.run.trait,
            exported=exported,
            round=round,
            warnings=[alarm for alarm in alarms(report) if alarm.round == exported.num_rounds],
            is_best=report.best is not None and report.best.number == exported.num_rounds,
            conditions=[
                *(report.base, report.prompted, report.engineered),
                *(*report.random, round.healed),
            ],
            loading=loading_code(exported, config["model"], out),
            serving="\n".join(map(shlex.join, serving_lines(exported, config["model"], out))),
            commands="\n".join([command_of(config), command]),
        )
    )


def loading_code(exported: Exported, model_id: str, out: Path) -> str:
    """Python that loads an export with transformers, and peft where it is an adapter."""
    base, revision = served_base(model_id)
    place, at = repr(base), f", revision={revision!r}" if revision else ""
    if exported.rank is None:
        place, at = repr(str(out)), ""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({place}{at})",
        f"model = AutoModelForCausalLM.from_pretrained({place}{at})",
    ]
    if exported.rank is not None:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f"model = PeftModel.from_pretrained(model, {str(out)!r})")
    return "\n".join(lines)


def serving_lines(exported: Exported, model_id: str, out: Path) -> list[list[str]]:
    """The commands, word by word, that serve an export.

    vLLM, SGLang, llama.cpp; a checkpoint also by transformers itself.
    """
    base, revision = served_base(model_id)
    gguf, path = f"{out.name}.gguf", str(out)
    named = f"{out.name}={path}"
    sglang = ["python", "-m", "sglang.launch_server", "--model-path"]
    if exported.rank is None:
        return [
            ["transformers", "serve", path],
            ["vllm", "serve", path, "--served-model-name", out.name],
            [*sglang, path, "--served-model-name", out.name],
            ["python", "convert_hf_to_gguf.py", path, "--outfile", gguf],
            ["llama-server", "-m", gguf],
        ]
    lora = ["--enable-lora", "--max-lora-rank", str(exported.rank)]
    at = ["--revision", revision] if revision else []
    is_local = model_id == ORGANISM or Path(base).expanduser().is_dir()
    where = "--base" if is_local else "--base-model-id"
    convert = ["python", "convert_lora_to_gguf.py", where, base, "--outfile", gguf, path]
    return [
        ["vllm", "serve", base, *at, *lora, "--lora-modules", named],
        [*sglang, base, *at, *lora, "--lora-paths", named],
        convert,
        ["llama-server", "-m", "BASE.gguf", "--lora", gguf],
    ]


def served_base(model_id: str) -> tuple[str, str | None]:
    """The base as servers take it, a folder or a hub id, and its revision."""
    if model_id == ORGANISM:
        return _ORGANISM_PATH, None
    if Path(model_id).expanduser().is_dir():  # an @ in its name is no revision
        return model_id, None
    place, _, revision = model_id.partition("@")
    return place, revision or None
