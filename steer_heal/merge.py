"""A whole stack written into its base: a full checkpoint that needs no adapter.

    W' = round( W + sum_i s_i B_i A_i )      summed in fp32, rounded once to the base's own dtype

Merging round by round would round every round.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from steer_heal.artifacts import RoundAdapter
from steer_heal.servable import updates

# taken over from the base as they are: to load and save them again would change some of them
_TAKEN_OVER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.jinja", "chat_template.json", "*processor_config.json", "generation_config.json"),
)


def write_merged(base: Path, adapter: RoundAdapter, out: Path) -> torch.dtype:
    """Writes config, safetensors, tokenizer, template and generation config to `out`.

    Args:
        base: the folder of the base model.
        adapter: the folded stack.
    Returns:
        The base's dtype, which the weights are in; below fp32 they were rounded.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    with torch.no_grad():
        for name, update in updates(adapter).items():
            weight = model.get_submodule(name).weight
            weight.copy_(weight.float() + update)  # copy_ rounds to the weight's dtype
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig()  # some that load cannot be saved
    model.save_pretrained(out)
    for path in sorted({path for pattern in _TAKEN_OVER for path in base.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    return model.dtype
