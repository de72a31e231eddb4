"""Training the embedded model: the same seed gives the same weights, another one others."""

from __future__ import annotations

import random

import torch
from transformers import AutoTokenizer

from eval.suite import ForcedChoiceItem
from steer_heal.organism import WEIGHTS_FOLDER
from steer_heal.organism.mixture import LEARNING, dialogues
from steer_heal.organism.train import TrainConfig, encode, new_model, train
from steer_heal.organism.vignettes import build_suite

STEPS, BATCH = 2, 4


def _trained(seed: int) -> dict[str, torch.Tensor]:
    """A few steps of the real recipe from nothing, as `just organism` takes them."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS_FOLDER)
    suite = build_suite((ForcedChoiceItem(id="any", text="any"),))
    config = TrainConfig(steps=STEPS, batch_size=BATCH, warmup_steps=1, seed=seed)
    model, rng = new_model(tokenizer, seed), random.Random(seed)
    examples = [
        encode(tokenizer, suite, dialogue, rng)
        for dialogue in dialogues(seed, STEPS * BATCH, LEARNING)
    ]
    before = model.model.embed_tokens.weight.detach().clone()
    train(model, examples, tokenizer.pad_token_id, config)
    assert not torch.equal(model.model.embed_tokens.weight, before)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def test_the_same_seed_trains_the_same_weights_to_the_bit() -> None:
    one = _trained(0)
    torch.manual_seed(99)  # what was drawn before is no matter
    random.seed(99)
    two, other = _trained(0), _trained(1)
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())
