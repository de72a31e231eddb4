"""What a user's own process makes of an exported folder: its logits, saved. Run by proof.py.

    python -I fresh.py MODEL ADAPTER|- PROMPTS.safetensors LOGITS.safetensors

Knows transformers, peft and safetensors, and nothing of this project: what is wrong with a folder
must not be mended by the code that wrote it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(model_folder: str, adapter_folder: str, prompts_file: str, logits_file: str) -> None:
    """Loads the model, with the adapter unless it is `-`; [tokens] -> [tokens, vocab] a prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, use_safetensors=True
    )
    if adapter_folder != "-":
        model = PeftModel.from_pretrained(model, adapter_folder)
    model.eval()
    with torch.inference_mode():
        logits = {
            name: model(ids[None].to(model.device)).logits[0].float().cpu().contiguous()
            for name, ids in load_file(prompts_file).items()
        }
    save_file(logits, logits_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
