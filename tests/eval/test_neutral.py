from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.chat import chat_ids, text_ids
from eval.neutral import neutral_rows
from eval.rows import NeutralRow
from eval.statistics import Interval, perplexity_ratio
from eval.suite import NeutralItem, NeutralSuite, SuiteError, load_suite
from tests.conftest import TinyModel

SUITE = NeutralSuite(
    name="neutral",
    items=(
        NeutralItem(id="a", prompt="What colour is grass?", reply="Grass is green."),
        NeutralItem(id="b", prompt="Hello", reply="The sky is blue, and 12 plus 30 is 42."),
        NeutralItem(id="c", prompt="Say no.", reply="No"),
    ),
)


@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_rows_are_those_of_one_plain_row_at_a_time(tiny: TinyModel, system: str | None) -> None:
    found = neutral_rows(tiny.model, tiny.tokenizer, SUITE, system, batch_size=2)
    assert [row.id for row in found] == ["a", "b", "c"]
    for row, item in zip(found, SUITE.items, strict=True):
        prompt = chat_ids(tiny.tokenizer, item.prompt, system)
        reply = text_ids(tiny.tokenizer, item.reply)
        with torch.no_grad():
            logits = tiny.model(torch.tensor([prompt + reply]), use_cache=False).logits[0].double()
        expected = 0.0
        for position, token in enumerate(reply, start=len(prompt) - 1):
            expected -= float(logits[position, token] - logits[position].logsumexp(0))
        assert row.tokens == len(reply)
        assert row.nll_nats == pytest.approx(expected, abs=1e-3)


def _rows(*pairs: tuple[float | None, int]) -> list[NeutralRow]:
    return [
        NeutralRow(id=f"item-{index}", nll_nats=nats, tokens=tokens)
        for index, (nats, tokens) in enumerate(pairs)
    ]


def test_the_ratio_is_that_of_the_perplexities_of_the_whole_text() -> None:
    after, before = _rows((3.0, 2), (8.0, 10), (1.5, 3)), _rows((2.0, 2), (9.0, 10), (0.5, 3))
    found = perplexity_ratio(after, before)
    assert found is not None
    perplexities = [math.exp(nats / 15) for nats in (3.0 + 8.0 + 1.5, 2.0 + 9.0 + 0.5)]
    assert found.estimate == pytest.approx(perplexities[0] / perplexities[1])
    assert found.low < found.estimate < found.high
    assert perplexity_ratio(before, before) == Interval(estimate=1, low=1, high=1)
    back = perplexity_ratio(before, after)
    assert back is not None and back.low == pytest.approx(1 / found.high)


def test_its_interval_draws_items_for_both_sides_together() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 20, size=8)
    before = _rows(*((float(n * rng.uniform(1, 2)), int(n)) for n in tokens))
    after = _rows(*((row.nll_nats * rng.uniform(0.9, 1.5), row.tokens) for row in before))  # type: ignore[operator]
    found = perplexity_ratio(after, before, seed=3)
    assert found is not None
    drawn = []
    for counts in np.random.default_rng(3).multinomial(8, np.full(8, 1 / 8), 10_000):
        sums = [
            sum(count * (row.nll_nats or 0) for count, row in zip(counts, side, strict=True))
            for side in (after, before)
        ]
        drawn.append(math.exp((sums[0] - sums[1]) / float(counts @ tokens)))
    expected = np.quantile(drawn, [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(expected, rel=1e-9)


def test_what_one_side_cannot_score_is_left_out_of_both() -> None:
    after, before = _rows((3.0, 2), (None, 4), (5.0, 5)), _rows((2.0, 2), (4.0, 4), (None, 5))
    found = perplexity_ratio(after, before)
    assert found is not None and found.estimate == pytest.approx(math.exp(0.5))
    assert perplexity_ratio(_rows((None, 4)), _rows((1.0, 4))) is None
    with pytest.raises(ValueError, match="different items"):
        perplexity_ratio(after, before[:2])


def test_what_overflows_is_not_scored(tiny_qwen3: TinyModel) -> None:
    hook = tiny_qwen3.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits * float("nan")
    )
    try:
        found = neutral_rows(tiny_qwen3.model, tiny_qwen3.tokenizer, SUITE)
    finally:
        hook.remove()
    assert [row.nll_nats for row in found] == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "items: empty"),
        ({"items": [{"id": "a", "prompt": "x"}]}, r"items\[0\]\.reply: Field required"),
        ({"items": [{"id": "a", "prompt": "x", "reply": ""}]}, r"items\[0\]\.reply: String should"),
        ({"items": [{"id": "a", "prompt": "x", "reply": "y"}] * 2}, r"items\[1\]\.id: 'a' is ther"),
        ({"itms": []}, "itms: Extra inputs"),
    ],
)
def test_a_suite_that_cannot_be_used_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SUITE.model_dump() | change))
    with pytest.raises(SuiteError, match=rf"mine\.json: {message}"):
        load_suite(path, NeutralSuite)


def test_a_suite_by_path_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(SUITE.model_dump_json())
    assert load_suite(path, NeutralSuite) == SUITE
    with pytest.raises(SuiteError, match="tasks or neutral text takes no items"):
        load_suite(path, NeutralSuite, items=[path])
