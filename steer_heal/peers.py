"""Extraction by other libraries, on the same weights and pairs, each in an environment of its own.

They need numpy 1 and transformers 4; torch is this environment's. Each turn starts a process a
library, one after another, which loads the embedded model, warms up on two pairs, and gives the CPU
seconds of one extraction over 128 pairs and all layers: theirs 32 rows a pass, ours as a run does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from loguru import logger

from eval.chat import chat_text
from eval.errors import UserError
from steer_heal.config import ORGANISM, resolve_config
from steer_heal.model import load_student
from steer_heal.model_folder import ORGANISM_FOLDER
from steer_heal.side_by_side import Ratio
from steer_heal.trait import Trait, load_trait
from steer_heal.vector import extract_vector

_BOTH_NEED = (
    "numpy==1.26.4",
    "transformers==4.57.1",
    "tokenizers==0.22.1",
    "huggingface-hub==0.36.0",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "joblib==1.6.0",
    "cloudpickle==3.1.2",
    "threadpoolctl==3.8.0",
)
_LOADS = """
import json, sys, time, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
torch.set_num_threads(1)
folder, pairs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
"""
_ENDS = """
extract(pairs[:2])
start = time.process_time()
extract(pairs)
print(time.process_time() - start)
"""
_REPENG = """
from repeng import ControlVector, DatasetEntry  # its ControlModel breaks this Qwen3's layers
def extract(pairs):
    entries = [DatasetEntry(positive, negative) for positive, negative in pairs]
    ControlVector.train(model, tokenizer, entries, batch_size=32)
"""
_STEERING_VECTORS = """
from steering_vectors import train_steering_vector
def extract(pairs):
    train_steering_vector(model, tokenizer, [tuple(pair) for pair in pairs], batch_size=32)
"""
_PEERS = {"repeng==0.4.0": _REPENG, "steering-vectors==0.12.2": _STEERING_VECTORS}


def peer_rows(scratch: Path, repeats: int) -> list[Ratio]:
    """A row a library; their environments are made in `scratch`.

    Raises:
        UserError: pip cannot install one.
    """
    pairs = scratch / "pairs.json"
    pairs.write_text(json.dumps(_pairs()), encoding="utf-8")
    values: dict[str, list[float]] = {peer: [] for peer in _PEERS}
    pythons = {peer: _environment(scratch / peer, peer) for peer in _PEERS}
    for _ in range(repeats):
        ours_s = _seconds([sys.executable, "-c", "from steer_heal import peers; peers.ours()"])
        for peer, program in _PEERS.items():
            code = _LOADS + program + _ENDS
            peer_s = _seconds([str(pythons[peer]), "-c", code, str(ORGANISM_FOLDER), str(pairs)])
            values[peer].append(peer_s / ours_s)
            logger.info("{}: {:.2f} times our time", peer, values[peer][-1])
    return [
        Ratio(
            what="extraction, 128 pairs, all layers, templates and AUC included",
            against=f"{peer.replace('==', ' ')}, in a process of its own",
            asked=1,
            values=tuple(found),
        )
        for peer, found in values.items()
    ]


def ours() -> None:
    """Prints the CPU seconds of our extraction, warmed up as theirs is."""
    torch.set_num_threads(1)
    config, trait = resolve_config([]).vector, _trait()
    student = load_student(ORGANISM, [], "cpu")
    extract_vector(student, trait, config.model_copy(update={"num_contexts": 2}), seed=0)
    start = time.process_time()
    extract_vector(student, trait, config, seed=0)
    print(time.process_time() - start)


def _trait() -> Trait:
    return load_trait(resolve_config([]).trait, None, None)


def _pairs() -> list[tuple[str, str]]:
    """The texts that ours extracts from, templates filled in: the other libraries take text."""
    trait, config = _trait(), resolve_config([]).vector
    tokenizer = load_student(ORGANISM, [], "cpu").tokenizer
    return [
        (
            chat_text(tokenizer, context, trait.positive),
            chat_text(tokenizer, context, trait.negative),
        )
        for context in trait.contexts[: config.num_contexts]
    ]


def _environment(folder: Path, library: str) -> Path:
    """The python of a new environment with a library in it; torch is this one's."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    shared = Path(own.strip(), "shared.pth")
    shared.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    quiet = ["-q", "--disable-pip-version-check", "--no-deps"]
    command = [str(python), "-m", "pip", "install", *quiet, library, *_BOTH_NEED]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip cannot install {library} ({last}); leave --peers out, or go online")
    return python


def _seconds(command: Sequence[str]) -> float:
    """What a process prints last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a peer's extraction failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])
