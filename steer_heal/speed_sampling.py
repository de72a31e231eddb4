"""Rows of the speed table about sampling, scoring and reading; `*_alone` is what a script has.

One at a time is transformers' own `generate` on a batch of one, with its cache, the same hook where
there is a vector, and the same length limit; scoring alone is one forward pass a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from eval.batching import batches
from eval.chat import chat_ids
from eval.forced_choice import ORDERS, digit_ids, forced_choice, forced_choice_pieces
from eval.logits import completion_ends, end_logits
from eval.sampling import sample_replies
from eval.suite import ForcedChoiceSuite, load_suite
from eval.think import Thinking
from steer_heal.drafts import steered_replies
from steer_heal.hooks import add_vector
from steer_heal.memory import rows_that_fit
from steer_heal.side_by_side import Row, Work
from steer_heal.speed_models import Models, Subject
from steer_heal.vector import extract_vector

_DOSE = 0.4
_STEPS = 16  # of decoding, timed
_BATCH = 64  # replies at a time, fewer than there are


def sampling_rows(models: Models) -> list[Row]:
    return [
        Row(
            name="drafts",
            what="tokens of 384 steered drafts, embedded model",
            against="one at a time",
            asked=14,
            ways=lambda: drafts_ways(models.embedded, 384, 12, 96),
        ),
        Row(
            name="drafts-512",
            what="tokens of 128 steered drafts, 6 layers of 512",
            against="one at a time",
            asked=9,
            ways=lambda: drafts_ways(models.wide, 128, 3, 64),
        ),
        Row(
            name="decode",
            what="a decoding step of 128 rows, 8 layers of 1,024, bf16",
            against="its matrix products alone",
            asked=1 / 1.8,
            ways=lambda: decode_ways(models.deep, 128),
        ),
        Row(
            name="replies",
            what="tokens of replies, four to each of 24 prompts",
            against="each prompt read anew",
            asked=None,
            ways=lambda: replies_ways(models.embedded),
        ),
        Row(
            name="replaced",
            what="tokens of 384 replies, 64 at a time, rows that end replaced",
            against="a batch after another",
            asked=None,
            ways=lambda: replaced_ways(models.embedded, 384),
        ),
        *_reading_rows(models),
    ]


def _reading_rows(models: Models) -> list[Row]:
    return [
        Row(
            name="logits",
            what="logits of 96 replies to 24 prompts",
            against="the same rows read whole",
            asked=None,
            ways=lambda: logits_ways(models.embedded),
        ),
        Row(
            name="vignettes",
            what="132 vignettes in two frames, no think",
            against="one row at a time",
            asked=None,
            ways=lambda: vignettes_ways(models.embedded, 0, 132, 16),
        ),
        Row(
            name="vignettes-64",
            what="132 vignettes in two frames, a think of 64 tokens",
            against="one row at a time",
            asked=8,
            ways=lambda: vignettes_ways(models.embedded, 64, 132, 4),
        ),
        Row(
            name="extraction",
            what="extraction, 128 pairs, all layers",
            against="its forward passes alone",
            asked=1 / 1.15,
            ways=lambda: extraction_ways(models.embedded),
        ),
    ]


def drafts_ways(
    given: Subject, count: int, count_alone: int, max_new_tokens: int
) -> tuple[Work, Work]:
    """Tokens of steered replies, as many at a time as `auto` takes, or one at a time.

    Prompts and two doses in turn; alone, one dose.
    """
    doses, prompts = (_DOSE - 0.05, _DOSE + 0.05), given.prompts
    many = [prompts[(draft // len(doses)) % len(prompts)] for draft in range(count)]
    fitting = rows_that_fit(given.student, max(map(len, prompts)), max_new_tokens)
    changes = {"batch_size": fitting, "max_new_tokens": max_new_tokens}
    config = given.config.generate.model_copy(update=changes)

    def together() -> int:
        rows_doses = [doses[draft % len(doses)] for draft in range(count)]
        found = steered_replies(given.student, given.vector, many, rows_doses, config, 1, None)
        return sum(len(reply.token_ids) for reply in found)

    def alone() -> int:
        directions, student = given.vector.band_directions, given.student
        layers = [student.loaded.layers[layer] for layer in given.vector.band]
        with add_vector(layers, directions, torch.tensor([_DOSE])), student.running() as model:
            taken = many[: 2 * count_alone : 2]
            return sum(len(_generated_alone(model, ids, max_new_tokens)) for ids in taken)

    return together, alone


def decode_ways(given: Subject, num_rows: int) -> tuple[Work, Work]:
    """Steps of decoding, the reading of the one prompt and the sampling included."""
    changes = {"batch_size": num_rows, "max_new_tokens": _STEPS}
    config = given.config.generate.model_copy(update=changes)
    model = given.student.loaded.model
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
    states = [torch.randn(num_rows, 1, each.in_features).to(model.dtype) for each in linear]

    def steps() -> int:
        prompts, doses = [given.prompts[0]] * num_rows, [_DOSE] * num_rows
        found = steered_replies(given.student, given.vector, prompts, doses, config, 1, None)
        return max(len(reply.token_ids) for reply in found)

    @torch.inference_mode()
    def products() -> int:
        for _ in range(_STEPS):
            for each, state in zip(linear, states, strict=True):
                each(state)
        return _STEPS

    return steps, products


def replies_ways(given: Subject) -> tuple[Work, Work]:
    """Tokens of unsteered replies; of the other way no row shares its prompt's reading."""
    four = _four_each(given)
    return (
        lambda: sum(map(len, _replies(given, four))),
        lambda: sum(map(len, _replies(given, four, kinds=range(len(four))))),
    )


def replaced_ways(given: Subject, count: int) -> tuple[Work, Work]:
    """Tokens of unsteered replies; the other way each batch waits for the longest of its own."""
    many = [given.prompts[reply % len(given.prompts)] for reply in range(count)]
    runs = [many[start : start + _BATCH] for start in range(0, count, _BATCH)]
    return (
        lambda: sum(map(len, _replies(given, many))),
        lambda: sum(len(ids) for some in runs for ids in _replies(given, some)),
    )


def logits_ways(given: Subject) -> tuple[Work, Work]:
    model, pad_id = given.student.loaded.model, given.student.tokenizer.pad_token_id
    four = _four_each(given)
    ends = completion_ends(four, _replies(given, four))
    whole = replace(ends, lengths=[0] * len(ends.rows))
    return (
        lambda: sum(1 for _ in end_logits(model, ends, 32, pad_id)),
        lambda: sum(1 for _ in end_logits(model, whole, 32, pad_id)),
    )


def vignettes_ways(
    given: Subject, num_think: int, count: int, count_alone: int
) -> tuple[Work, Work]:
    """Vignettes answered, as many rows at a time as a run takes.

    Alone, each frame thinks by itself and is then read whole.
    """
    suite = load_suite(given.config.evaluate.suite, ForcedChoiceSuite)
    tokenizer, thinking = given.student.tokenizer, Thinking(tokens=num_think)
    batch_size = given.config.evaluate.rows_at_a_time

    def together() -> int:
        some = suite.model_copy(update={"items": suite.items[:count]})
        with given.student.running() as model:
            return len(forced_choice(model, tokenizer, some, None, batch_size, None, thinking).rows)

    @torch.inference_mode()
    def alone() -> int:
        digits = digit_ids(tokenizer, suite)
        with given.student.running() as model:
            for item in suite.items[:count_alone]:
                for order in ORDERS:
                    about = (tokenizer, suite, item.text, order, None, num_think > 0)
                    pieces = forced_choice_pieces(*about)
                    thought = _generated_alone(model, pieces.prompt_ids, num_think, exactly=True)
                    row = torch.tensor([pieces.input_ids(thought)])
                    logits = model(input_ids=row, logits_to_keep=len(pieces.prefill_ids) + 1).logits
                    assert logits[0, -1].log_softmax(-1)[digits].isfinite().all()
        return count_alone

    return together, alone


def extraction_ways(given: Subject) -> tuple[Work, Work]:
    """Pairs; the other way encodes the same prompts and runs the same batches, and keeps none."""
    config, trait, student = given.config.vector, given.trait, given.student

    @torch.inference_mode()
    def forwards() -> int:
        contexts = trait.contexts[: config.num_contexts]
        prompts = [
            chat_ids(student.tokenizer, context, persona)
            for persona in (trait.positive, trait.negative)
            for context in contexts
        ]
        with student.running() as model:
            for batch in batches(prompts, config.batch_size, 0, model.device):
                model(**batch.inputs, logits_to_keep=1, use_cache=False)
        return len(contexts)

    return lambda: extract_vector(student, trait, config, seed=0).num_pairs, forwards


def _generated_alone(
    model: Any, prompt: Sequence[int], max_new_tokens: int, exactly: bool = False
) -> list[int]:
    """New token ids of one prompt as `generate` samples them, or greedily just so many."""
    if max_new_tokens == 0:
        return []
    ids = torch.tensor([prompt])
    how = {"do_sample": False, "min_new_tokens": max_new_tokens} if exactly else {"do_sample": True}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        top_k=0,
        **how,
    )
    return out[0, len(prompt) :].tolist()


def _four_each(given: Subject) -> list[list[int]]:
    turns = given.trait.held_out_prompts[:24]
    return [chat_ids(given.student.tokenizer, turn) for turn in turns for _ in range(4)]


def _replies(given: Subject, prompts: list[list[int]], kinds: Any = None) -> list[tuple[int, ...]]:
    with given.student.running() as model:
        found = sample_replies(
            *(model, given.student.tokenizer, prompts),
            seed=2,
            max_new_tokens=96,
            batch_size=_BATCH,
            kinds=kinds,
        )
    return [reply.token_ids for reply in found]
