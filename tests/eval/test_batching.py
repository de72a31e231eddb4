from __future__ import annotations

import sys

import pytest
import torch

from eval.batching import batches, left_pad

ROWS = [[5, 6], [7, 8, 9, 10], [11], [12, 13, 14, 15], [16, 17, 18]]


def test_left_pad_by_hand() -> None:
    inputs = left_pad([[5, 6], [7, 8, 9, 10]], pad_id=3, device="cpu")
    assert inputs["input_ids"].tolist() == [[3, 3, 5, 6], [7, 8, 9, 10]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert all(value.dtype == torch.long for value in inputs.values())


def test_no_padding_token_pads_with_id_0() -> None:
    inputs = left_pad([[5], [7, 8]], pad_id=None, device="cpu")
    assert inputs["input_ids"].tolist() == [[0, 5], [7, 8]]
    assert inputs["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_longest_rows_come_first_and_each_once() -> None:
    rows = [batch.rows for batch in batches(ROWS, 2, 0, "cpu")]
    assert rows == [[1, 3], [4, 0], [2]]


def test_a_batch_holds_its_rows_and_no_more_padding_than_it_needs() -> None:
    for batch in batches(ROWS, 2, 0, "cpu"):
        kept = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(
                batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True
            )
        ]
        assert kept == [ROWS[row] for row in batch.rows]
        assert batch.inputs["input_ids"].shape[1] == max(len(ids) for ids in kept)


def test_progress_is_drawn_only_with_a_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(batches(ROWS, 2, 0, "cpu"))
    assert capsys.readouterr().err == ""
    list(batches(ROWS, 2, 0, "cpu", label="counting"))
    assert "counting" in capsys.readouterr().err


def test_no_rows_no_batches() -> None:
    assert list(batches([], 4, 0, "cpu")) == []
