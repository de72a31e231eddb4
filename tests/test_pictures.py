"""Pictures of a real small run's pages: what is in them, and what is said where they cannot be."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from eval.errors import UserError
from steer_heal.pictures import browser_path, draw_pictures, served
from tests.small import small_run

NAMES = ("report-light", "report-dark", "report-phone", "compare", "chat")


@pytest.mark.skipif(browser_path() is None, reason="no browser is on PATH")
def test_every_page_has_its_picture(tmp_path: Path) -> None:
    run = small_run(tmp_path, 1)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    drawn = draw_pictures([run, other], tmp_path / "docs")
    images = {name: tmp_path / "docs" / "images" / f"{name}.png" for name in NAMES}
    assert drawn == [tmp_path / "docs" / "drift.png", *images.values()]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    papers = {}
    for name, path in images.items():
        picture = Image.open(path).convert("RGB")
        assert path.stat().st_size < 200_000
        papers[name] = picture.getpixel((0, 0))
        colors = picture.getcolors(256)
        assert colors is not None and len(colors) > 50  # text, lines and points, not a blank page
    assert papers.pop("report-dark") == pytest.approx((0x17, 0x1B, 0x20), abs=9)
    assert list(papers.values()) == [pytest.approx((255, 255, 255), abs=9)] * 4
    assert Image.open(images["report-phone"]).width == 2 * 390


def test_a_picture_that_fails_leaves_no_server_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), served(small_run(tmp_path, 1)) as address:
        assert b"chat" in urllib.request.urlopen(address).read()
        raise ZeroDivisionError
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)


def test_without_a_browser_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="none of chromium"):
        draw_pictures([tmp_path], tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
