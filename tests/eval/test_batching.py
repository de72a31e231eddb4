from __future__ import annotations

import sys

import pytest
import torch

from eval.batching import _PASS_TOKENS, batches, fitting, left_pad, passes, right_pad
from eval.errors import UserError

ROWS = [[5, 6], [7, 8, 9, 10], [11], [12, 13, 14, 15], [16, 17, 18]]


def test_left_pad_by_hand() -> None:
    inputs = left_pad([[5, 6], [7, 8, 9, 10]], pad_id=3, device="cpu")
    assert inputs["input_ids"].tolist() == [[3, 3, 5, 6], [7, 8, 9, 10]]
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert all(value.dtype == torch.long for value in inputs.values())


def test_right_pad_by_hand() -> None:
    inputs = right_pad([[5, 6], [7, 8, 9, 10]], pad_id=3, device="cpu")
    assert inputs["input_ids"].tolist() == [[5, 6, 3, 3], [7, 8, 9, 10]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 1, 1], [0, 1, 2, 3]]


def test_a_pass_on_a_cpu_has_no_more_tokens_than_its_caches_hold() -> None:
    most, cpu = _PASS_TOKENS * torch.get_num_threads(), "cpu"
    lengths = [most + 1, most // 2, most // 2, most // 4, most // 4, most // 2, 1]
    runs = list(passes([7, 6, 5, 4, 3, 2, 1], lengths, 9, cpu))
    assert runs == [[7], [6, 5], [4, 3], [2, 1]]  # a pass is as wide as its longest row
    assert list(passes([1, 2, 3], [most] * 3, 2, torch.device("cuda"))) == [[1, 2], [3]]
    assert list(passes([1, 2, 3], [0] * 3, 2, cpu)) == [[1, 2], [3]]
    assert list(passes([], [], 2, cpu)) == []


def test_rows_are_halved_until_they_fit() -> None:
    tried = []

    def three_at_most(rows: list[int]) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return [-row for row in rows]

    done = list(fitting(three_at_most, list(range(10))))
    assert tried == [10, 5, 2, 3, 5, 2, 3]
    assert [row for rows, _ in done for row in rows] == list(range(10))
    assert all(result == [-row for row in rows] for rows, result in done)


def test_a_row_that_does_not_fit_alone_is_refused_by_stage() -> None:
    def never(rows: list[int]) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with pytest.raises(UserError, match=r"^steered drafts: one row alone .* can't allocate"):
        list(fitting(never, [4, 5], "steered drafts"))


def test_another_error_is_not_taken_for_memory() -> None:
    def wrong(rows: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(fitting(wrong, [4, 5]))


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
