"""The benchmark's page says what was measured; no test asserts a time."""

from __future__ import annotations

from steer_heal.speed import Ratio, _page


def test_a_row_has_the_median_and_the_ends() -> None:
    row = Ratio(what="this", against="that", values=(2.0, 1.0, 4.5))
    assert str(row) == "| this | that | **2.00x** | 1.00 to 4.50 |"


def test_the_page_has_every_row_and_the_memory() -> None:
    rows = [Ratio(what=name, against="other", values=(1.5,)) for name in ("first", "second")]
    page = _page(rows, whole_gib=4.0, chunked_gib=0.5, repeats=1)
    assert all(str(row) in page for row in rows)
    assert "4.00 GiB with all logits at once, 0.50 GiB in chunks, 0.12 of it" in page
    assert "just speed --repeats 1" in page and "no GPU" in page
