"""Pages in a real browser: a Chromium of the system's, driven by playwright, headless.

Playwright's own browsers are not downloaded. Where no Chromium is found, what asks for one skips.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Error,
    Page,
    sync_playwright,
)

from steer_heal.pictures import BROWSERS, browser_path

PHONE_WIDTH = 375  # CSS pixels
_PATIENCE_MS = 120_000  # a machine may be busy


class Tabs:
    """Pages that are open, and all that went wrong in any of them."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self.errors: list[str] = []  # console errors, uncaught errors and rejections
        self.requests: list[str] = []  # every address that was asked for

    def open(
        self, address: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> Page:
        """Opens a file or an address in a window of its own, and waits until it is loaded."""
        context = self._browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            is_mobile=width <= PHONE_WIDTH,
        )
        self._contexts.append(context)
        context.set_default_timeout(_PATIENCE_MS)
        page = context.new_page()
        page.on("console", self._hear)
        page.on("pageerror", self._note)
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(address.absolute().as_uri() if isinstance(address, Path) else address)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()
        self._contexts.clear()

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _note(self, error: Error) -> None:
        self.errors.append(str(error))


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium, closed at the end; skips where none is on PATH."""
    path = browser_path()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()
