"""What goes wrong in a page is noticed: else no test of a page could fail for it."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from tests.browser import PHONE_WIDTH, Tabs

_BROKEN = """<!doctype html><title>broken</title><script>
console.error("said");
setTimeout(() => { throw new Error("thrown"); });
setTimeout(() => Promise.reject(new Error("rejected")));
setTimeout(() => setTimeout(() => { document.title = "done"; }));
</script>"""


def test_console_errors_exceptions_and_rejections_are_noticed(
    browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(_BROKEN)
    tabs = Tabs(browser)
    page = tabs.open(tmp_path / "page.html")
    page.wait_for_function("document.title === 'done'")
    assert [word for word in ("said", "thrown", "rejected") if word in " ".join(tabs.errors)] == [
        "said",
        "thrown",
        "rejected",
    ]
    tabs.close()


def test_a_window_is_as_wide_and_as_dark_as_asked(tabs: Tabs, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><p>page</p>'
    )
    for dark in (False, True):
        page = tabs.open(tmp_path / "page.html", width=PHONE_WIDTH, dark=dark)
        assert page.evaluate("innerWidth") == PHONE_WIDTH
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    assert {request.partition(":")[0] for request in tabs.requests} == {"file"}
