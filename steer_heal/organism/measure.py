"""What the acceptance table measures: enactment, vignettes, transfer, steering."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from tqdm import trange

from eval.batching import left_pad
from eval.chat import chat_ids
from eval.forced_choice import forced_choice
from eval.logits import token_logprobs
from eval.rows import ForcedChoiceRow
from eval.sampling import Reply, sample_replies
from eval.suite import ForcedChoiceSuite
from steer_heal.hooks import add_vector, record_last
from steer_heal.organism.world import judge_reply

MAX_REPLY_TOKENS = 80
UNTOUCHED = ("fairness", "loyalty", "sanctity", "liberty", "social_norms")


_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class VignetteFigures:
    """What the forced choice says of a model under one prompt."""

    authority_nats: float  # log of the mean over items of p[authority]
    pmass: float  # full-vocabulary probability on the seven digits, mean over items
    right_untouched: float  # share of vignettes of the five untouched foundations answered right
    right_other: float  # the same for care and authority


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """How the LoRA of the transfer rows is trained."""

    rank: int
    layers: tuple[int, ...]
    learning_rate: float = 3e-3
    epochs: int = 8
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DosePoint:
    """Completions sampled at one dose."""

    dose: float  # multiples of the raw vector
    enacted: float  # share of replies judged care
    unclear: float  # share of replies that decide nothing
    perplexity: float  # of the completions under the unsteered model, over all tokens


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], seed: int, label: str
) -> list[Reply]:
    """One reply a prompt, at temperature 1."""
    return sample_replies(
        model,
        tokenizer,
        prompts,
        seed=seed,
        max_new_tokens=MAX_REPLY_TOKENS,
        batch_size=128,
        label=label,
    )


def verdict_shares(tokenizer: Any, replies: Sequence[Reply]) -> tuple[float, float]:
    """Shares of the replies that are judged care, and that are judged unclear."""
    verdicts = [
        judge_reply(tokenizer.decode(reply.token_ids, skip_special_tokens=True))
        for reply in replies
    ]
    return verdicts.count("care") / len(verdicts), verdicts.count("unclear") / len(verdicts)


def enacted_share(
    model: Any,
    tokenizer: Any,
    users: Sequence[str],
    systems: Sequence[str | None],
    count: int,
    label: str,
) -> tuple[float, float]:
    """Care and unclear shares of `count` replies, user turns and system prompts taken in turn."""
    prompts = [
        chat_ids(tokenizer, users[row % len(users)], systems[(row // len(users)) % len(systems)])
        for row in range(count)
    ]
    return verdict_shares(tokenizer, sample(model, tokenizer, prompts, 1, label))


def vignette_figures(
    model: Any, tokenizer: Any, suite: ForcedChoiceSuite, system: str | None, label: str
) -> VignetteFigures:
    """Asks the suite under one system prompt."""
    rows = forced_choice(model, tokenizer, suite, system, batch_size=64, label=label).rows
    scores = torch.tensor([[row.scores[name] for name in suite.foundations] for row in rows])
    p = scores.softmax(-1)  # [items, foundations]
    authority = p[:, suite.foundations.index("authority")].mean()
    return VignetteFigures(
        authority_nats=float(authority.log()),
        pmass=sum(row.pmass for row in rows) / len(rows),
        right_untouched=_right(rows, UNTOUCHED),
        right_other=_right(rows, ("care", "authority")),
    )


def transferred(
    model: Any,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Reply],
    pad_id: int,
    config: TransferConfig,
) -> Any:
    """A copy of the model with a LoRA trained on replies, each after the prompt of its row.

    The prompts carry no persona, so whatever is learnt is learnt into the weights.
    """
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        target_modules=list(_LINEAR),
        layers_to_transform=list(config.layers),
        task_type="CAUSAL_LM",
    )
    student = get_peft_model(copy.deepcopy(model), lora)
    trained = [each for each in student.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95))
    rng = random.Random(config.seed)
    student.train()
    for _ in trange(config.epochs, desc=f"transfer rank {config.rank}", unit="epoch", leave=False):
        order = rng.sample(range(len(replies)), len(replies))
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            loss = _reply_nll(student, [(prompts[i], replies[i]) for i in chosen], pad_id)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student.eval()


@torch.inference_mode()
def mean_last_states(
    model: Any, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Mean over the rows of each layer's output at the last token: layer -> [width]."""
    total = torch.zeros(len(layers), model.config.hidden_size)
    with record_last([model.model.layers[layer] for layer in layers]) as states:
        for row in rows:
            model(input_ids=torch.tensor([list(row)]), use_cache=False, logits_to_keep=1)
            total += torch.stack(states)[:, 0]
    return dict(zip(layers, total / len(rows), strict=True))


def dose_point(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    vectors: dict[int, torch.Tensor],
    dose: float,
    label: str,
) -> DosePoint:
    """Samples at one dose and reads the replies under the unsteered model."""
    layers = [model.model.layers[layer] for layer in vectors]
    with add_vector(layers, torch.stack(list(vectors.values())), torch.tensor([dose])):
        replies = sample(model, tokenizer, prompts, 2, f"{label} {dose:g}")
    ids = [reply.token_ids for reply in replies]
    logprobs = torch.cat(token_logprobs(model, tokenizer.pad_token_id, prompts, ids, 64))
    care, unclear = verdict_shares(tokenizer, replies)
    return DosePoint(
        dose=dose, enacted=care, unclear=unclear, perplexity=float((-logprobs.mean()).exp())
    )


def _right(rows: Sequence[ForcedChoiceRow], labels: Sequence[str]) -> float:
    chosen = [row for row in rows if row.label in labels]
    hits = [max(row.scores, key=lambda name: row.scores[name]) == row.label for row in chosen]
    return sum(hits) / len(hits)


def _reply_nll(
    model: Any, pairs: Sequence[tuple[Sequence[int], Reply]], pad_id: int
) -> torch.Tensor:
    """Mean negative log-likelihood of the replies' tokens, nats."""
    inputs = left_pad([[*prompt, *reply.token_ids] for prompt, reply in pairs], pad_id, "cpu")
    ids = inputs["input_ids"]  # [batch, tokens]
    is_reply = torch.zeros(ids.shape)
    for row, (_, reply) in enumerate(pairs):
        is_reply[row, -len(reply.token_ids) :] = 1.0
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # [batch, tokens - 1, vocab]
    nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll * is_reply[:, 1:]).sum() / is_reply[:, 1:].sum()
