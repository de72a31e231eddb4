"""What is timed is the same work on both sides, and the table says all of it; no time is asserted.

Rows are measured for real on tiny models, where a turn takes a moment.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.errors import UserError
from steer_heal import speed
from steer_heal.config import resolve_config
from steer_heal.peers import peer_rows
from steer_heal.side_by_side import Ratio, Row
from steer_heal.speed import measured, page, round_seconds, rounds_row
from steer_heal.speed_heal import heal_rows, heal_ways, peak_gib
from steer_heal.speed_models import Models, Subject, as_kept, subject
from steer_heal.speed_sampling import (
    decode_ways,
    drafts_ways,
    extraction_ways,
    logits_ways,
    replaced_ways,
    replies_ways,
    sampling_rows,
    vignettes_ways,
)
from steer_heal.trait import load_trait
from tests.processes import Work
from tests.small import small_run, small_settings
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def tiny_subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("subject")
    model = tiny_model_folder(folder, "qwen3")
    config = resolve_config(small_settings(model, folder))
    return subject(str(model), load_trait(config.trait, None, None), config)


def test_a_ratio_is_time_a_unit_over_time_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: clock[0])

    def work(seconds: float, units: int) -> int:
        clock[0] += seconds
        return units

    others = iter([9.0, 3.0, 6.0])
    row = Row(
        name="row",
        what="this",
        against="that",
        asked=1.5,
        ways=lambda: (lambda: work(2.0, 4), lambda: work(next(others), 3)),
    )
    found = row.measure(3)
    assert found.values == pytest.approx((6.0, 2.0, 4.0))
    assert str(found) == "| this | that | **4.00x** | 2.00 to 6.00 | 1.50x |"


def test_both_sides_do_the_same_number(tiny_subject: Subject) -> None:
    vignettes, logits = vignettes_ways(tiny_subject, 4, 3, 3), logits_ways(tiny_subject)
    for ours, other in (vignettes, logits, extraction_ways(tiny_subject)):
        assert ours() == other() > 0
    kept = as_kept(tiny_subject, 8)
    ours, other = heal_ways(tiny_subject, kept, soft_weight=3.0)
    assert ours() == other() == 2 * math.ceil(8 / tiny_subject.config.heal.batch_size)
    ours, other = decode_ways(tiny_subject, num_rows=3)
    assert ours() == other() == 16


def test_reading_a_prompt_anew_says_the_same(tiny_subject: Subject) -> None:
    ours, other = replies_ways(tiny_subject)
    assert ours() == other() > 96


def test_replaced_rows_are_as_many_as_those_of_batch_after_batch(tiny_subject: Subject) -> None:
    ours, other = replaced_ways(tiny_subject, count=70)
    assert min(ours(), other()) > 70


def test_drafts_are_counted_in_tokens_that_were_sampled(tiny_subject: Subject) -> None:
    ours, other = drafts_ways(tiny_subject, count=6, count_alone=2, max_new_tokens=5)
    torch.manual_seed(0)
    assert (ours(), other()) == (6 * 5, 2 * 5)  # none of these happens to end


def test_a_row_is_measured_for_real(tiny_subject: Subject) -> None:
    row = Row(
        name="extraction",
        what="extraction",
        against="forwards",
        asked=None,
        ways=lambda: extraction_ways(tiny_subject),
    )
    values = row.measure(2).values
    assert len(values) == 2 and all(math.isfinite(value) and value > 0 for value in values)


def test_random_weights_have_the_shapes_that_are_said(tmp_path: Path) -> None:
    given = Models(tmp_path).wordy
    config = given.student.loaded.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 192, 32_000)
    assert max(map(max, given.prompts)) < len(given.student.tokenizer) < 2000


def test_the_page_has_every_row(tmp_path: Path) -> None:
    models = Models(tmp_path)
    names = [row.name for row in (*sampling_rows(models), *heal_rows(models))]
    assert len(set(names)) == len(names)
    rows = [Ratio(what=name, against="other", asked=None, values=(1.5,)) for name in names]
    text = page(rows, ["Said of the memory."], repeats=1)
    assert all(str(row) in text for row in rows)
    assert "Said of the memory." in text and "`just speed --repeats 1`" in text
    assert "`just speed --repeats 1 --peers`" in page(rows, [], repeats=1, more=" --peers")


def test_a_row_that_there_is_not_is_refused_with_those_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"no row 'heel'; there are: drafts, .*memory"):
        measured(Models(tmp_path), ["heel"], repeats=1)
    monkeypatch.setattr(sys, "argv", ["speed", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        speed.main()
    assert stopped.value.code == 2
    assert "fewer than two finished rounds" in capsys.readouterr().err


def test_rounds_are_compared_by_what_a_run_logged(tmp_path: Path) -> None:
    start = time.monotonic()
    path = small_run(tmp_path, rounds=2)
    wall_s = time.monotonic() - start
    first, second = round_seconds((path / "log.txt").read_text())
    assert 0 < first + second < wall_s
    assert rounds_row(path).values == pytest.approx((2 * first / (first + second),))


def test_a_round_that_was_stopped_is_the_sum_of_its_parts() -> None:
    log = (
        "2026 INFO round 1 (round-00) took drafts 8.1 s (81%), eval 1.9 s (19%)\n"
        "2026 INFO 1 of 2 rounds done, 10 s each\n"
        "2026 INFO round 2 (round-01) took heal 3.0 s (100%)\n"
        "2026 INFO round 2 (round-01) took eval 2.5 s (100%)\n"
        "2026 INFO run small itself took limits 4.0 s (100%)\n"
    )
    assert round_seconds(log) == pytest.approx([10.0, 5.5])


@pytest.mark.slow
def test_other_libraries_extract_from_the_same_pairs(tmp_path: Path) -> None:
    rows = peer_rows(tmp_path, repeats=1)
    assert [row.against.split(",")[0] for row in rows] == [
        "repeng 0.4.0",
        "steering-vectors 0.12.2",
    ]
    assert all(math.isfinite(row.values[0]) and row.values[0] > 0 for row in rows)
    pairs = json.loads((tmp_path / "pairs.json").read_text())
    assert len(pairs) == 128 and all(one != other for one, other in pairs)


def test_a_peak_that_is_begun_anew_is_that_of_what_followed(tmp_path: Path) -> None:
    """In a process of its own, as it is used: in a test's large one it once came out as nothing."""
    done = Work(tmp_path, {}, _hold_much_then_little).end()
    assert done.code == 0, done.err


def _hold_much_then_little() -> None:
    held = torch.ones(2**28)  # 1 GiB
    assert peak_gib() >= 1
    del held
    before = peak_gib(anew=True)
    added = torch.ones(2**26)
    assert peak_gib() - before == pytest.approx(0.25, abs=0.05)
    assert len(added) == 2**26
