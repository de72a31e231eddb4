"""Pictures of runs for README and docs: drift.png, and images/ with the pages as they look.

    report-light, report-dark, report-phone    the page of the first run
    compare                                    all runs side by side, where there are two or more
    chat                                       a held-out prompt answered by all four

The pages are opened in a headless Chromium of the system's, driven by playwright: the dev extra.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from loguru import logger

from eval.errors import UserError
from eval.files import write_bytes
from steer_heal.compare import Comparison, compare_runs
from steer_heal.compare_page import write_page
from steer_heal.figures import draw_drift
from steer_heal.progress import read_progress
from steer_heal.report import drift_of, render_page
from steer_heal.saved import SavedRun, read_saved_run
from steer_heal.summary import summarise

try:
    from PIL import Image
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError as error:
    raise UserError(
        f"pictures need {error.name}, which is not there: pip install 'steer-heal[dev]', or take "
        "`just pictures`, which has it"
    ) from error

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_WIDTH, _HEIGHT = 1280, 560  # CSS pixels
_PHONE = (390, 844)


def draw_pictures(runs: Sequence[Path], out: Path) -> list[Path]:
    """Draws the pictures of the first run, and of all beside each other; returns where they are.

    Raises:
        UserError: no browser, no run, or one without a finished round.
    """
    path = browser_path()
    if path is None:
        raise UserError(
            f"pictures need a browser, and none of {', '.join(BROWSERS)} is on PATH; install one "
            "(Debian: apt-get install chromium)"
        )
    saved = read_saved_run(runs[0])
    comparison = compare_runs(list(runs)) if len(runs) > 1 else None
    (out / "images").mkdir(parents=True, exist_ok=True)
    write_bytes(out / "drift.png", draw_drift(drift_of(summarise(saved)), "png"))
    drawn = [out / "drift.png"]
    with sync_playwright() as playwright, TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=path)
        for name, picture in _pictures(browser, saved, comparison, Path(folder)):
            drawn.append(out / "images" / f"{name}.png")
            write_bytes(drawn[-1], _in_few_colors(picture))
        browser.close()
    for each in drawn:
        logger.info("picture: {}, {:.0f} kB", each, each.stat().st_size / 1000)
    return drawn


def browser_path() -> str | None:
    """Where a Chromium is; None: nowhere on PATH."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def _pictures(
    browser: Browser, saved: SavedRun, comparison: Comparison | None, folder: Path
) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each.

    Args:
        folder: where pages are put meanwhile.
    """
    page = folder / "report.html"
    page.write_text(render_page(read_progress(saved.path), summarise(saved)), encoding="utf-8")
    with _opened(browser, page.as_uri()) as light:
        yield "report-light", _picture(light, "header", "#drift")
    with _opened(browser, page.as_uri(), is_dark=True) as dark:
        yield "report-dark", _picture(dark, "#filtered", "#healing")
    with _opened(browser, page.as_uri(), is_phone=True) as phone:
        yield "report-phone", phone.screenshot()
    if comparison is not None:
        write_page(comparison, folder / "compare.html")
        with _opened(browser, (folder / "compare.html").as_uri()) as compared:
            yield "compare", _picture(compared, "header", "#last")
    with served(saved.path) as address, _opened(browser, address) as chat:
        yield "chat", _chat(chat, saved.trait.held_out_prompts[0])


@contextmanager
def _opened(
    browser: Browser, address: str, *, is_dark: bool = False, is_phone: bool = False
) -> Iterator[Page]:
    width, height = _PHONE if is_phone else (_WIDTH, _HEIGHT)
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if is_dark else "light",
        is_mobile=is_phone,
        device_scale_factor=2 if is_phone else 1,
    )
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def _picture(page: Page, first: str, last: str) -> bytes:
    """From the top of an element to the bottom of another, with their charts."""
    for chart in page.locator(f":is({first}, {last}) .chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
    page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
    top, bottom = (page.locator(each).first.bounding_box() for each in (first, last))
    assert top is not None and bottom is not None
    start = max(0, top["y"] - 24)
    end = bottom["y"] + bottom["height"] + 24
    return page.screenshot(
        full_page=True, clip={"x": 0, "y": start, "width": _WIDTH, "height": end - start}
    )


def _chat(page: Page, prompt: str) -> bytes:
    """A prompt and its four answers."""
    page.fill("#user", prompt)
    page.locator("#send:enabled").click()
    page.locator("#again:enabled").wait_for()
    return page.screenshot()


@contextmanager
def served(run: Path) -> Iterator[str]:
    """`steer-heal chat` of a run, and its address."""
    command = [sys.executable, "-m", "steer_heal", "chat", str(run.absolute()), "port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield _address(server)
        finally:
            server.terminate()


def _address(server: subprocess.Popen[str]) -> str:
    """Where it says that it serves."""
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        if found := re.search(r"chat: (http://\S+)", line):
            return found[1]
    raise UserError(f"the chat did not begin: {said.strip().splitlines()[-1]}")


def _in_few_colors(png: bytes) -> bytes:
    """The same picture in a third of the bytes; colours were off by 9 of 255 at most."""
    whole = Image.open(io.BytesIO(png)).convert("RGB")
    buffer = io.BytesIO()
    few = whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(buffer, "png", optimize=True)
    return buffer.getvalue()
