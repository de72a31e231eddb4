"""The page in a real browser: what is drawn against the run's files, and what a reader can do."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loguru import logger
from playwright.sync_api import Browser, Locator, Page
from plotly.offline import get_plotlyjs_version

from eval.files import write_json
from steer_heal.filter_charts import filter_charts
from steer_heal.page import PLOTLY
from steer_heal.palette import PALETTE
from steer_heal.progress import Progress, read_progress
from steer_heal.report import draw_page, render_page, write_report
from steer_heal.summary import summarise
from steer_heal.wording import visible
from tests.browser import PHONE_WIDTH, Tabs
from tests.processes import REPORT_FILES, rewind
from tests.small import small_run

ROUNDS = 2
HOSTILE = "<script>window.hacked=1</script><img src=x onerror='hacked=1'>\x1b \u202edeppilf"
SHOWN = "<script>window.hacked=1</script><img src=x onerror='hacked=1'>␛ ⟨U+202E⟩deppilf"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished run and what its page said at the start of the last round."""

    path: Path
    on_the_way: str

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def rows(self, number: int) -> list[dict[str, Any]]:
        """What a round's filter saw."""
        lines = (self.path / f"round-{number - 1:02d}" / "completions.jsonl").open()
        return [json.loads(line) for line in lines]

    def of(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    path = small_run(tmp_path_factory.mktemp("page"), ROUNDS)
    on_the_way = (path / "report.html").read_text(encoding="utf-8")
    write_report(path)
    return Made(path=path, on_the_way=on_the_way)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """The run, to spoil; without a report."""
    ignored = shutil.ignore_patterns(*REPORT_FILES)
    return Path(shutil.copytree(made.path, tmp_path / "run", ignore=ignored))


@pytest.fixture(scope="module")
def shown(made: Made, browser: Browser) -> Iterator[tuple[Page, Tabs]]:
    """The page in a wide window with every chart drawn; nothing in it may go wrong."""
    tabs = Tabs(browser)
    page = tabs.open(made.page)
    _all_drawn(page)
    yield page, tabs
    tabs.close()
    assert tabs.errors == []


@pytest.fixture
def page(shown: tuple[Page, Tabs]) -> Page:
    """The same, as it is for someone who comes to it."""
    opened, _ = shown
    opened.evaluate("document.getElementById('filters').reset()")
    return opened


def _all_drawn(page: Page) -> None:
    """Goes down the page as a reader does, until every chart is there."""
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()


def _traces(page: Page, name: str) -> list[dict[str, Any]]:
    """What Plotly holds of a chart that is drawn."""
    return page.evaluate(
        "name => document.getElementById(name).data.map("
        "({x, y, name, marker}) => ({x, y, name, marker}))",
        name,
    )


def _with_symbol(page: Page, name: str, symbol: str) -> list[dict[str, Any]]:
    return [each for each in _traces(page, name) if (each["marker"] or {}).get("symbol") == symbol]


# --------------------------------------------------------------------------------- what is drawn


def test_every_chart_is_drawn_from_the_files(made: Made, page: Page) -> None:
    assert page.locator(".chart").count() == 2 + 7 + 5 + 3 + 2 + 5

    evals = [made.of(f"round-{index:02d}/eval.json") for index in range(ROUNDS)]
    shares = [made.of("base.json"), *(each["healed"] for each in evals)]
    (enacted,) = [each for each in _traces(page, "enacted")[1:] if len(each["x"]) == ROUNDS + 1]
    assert enacted["y"] == pytest.approx([_enacted(rows) for rows in shares])

    (healed,) = [t for t in _with_symbol(page, "map", "circle") if len(t["x"]) == ROUNDS]
    table = page.locator("#foundations tbody tr")
    for axis, row in (("y", 0), ("x", 1)):  # care, then authority
        cells = [text.partition("[")[0] for text in _cells(table.nth(row))[-ROUNDS:]]
        shifts = [float(cell.replace("−", "-")) for cell in cells]
        assert healed[axis] == pytest.approx(shifts, abs=0.006)

    for number in range(1, ROUNDS + 1):
        kept = [row for row in made.rows(number) if row["dropped"] is None]
        bars = {each["name"]: each["x"][number - 1] for each in _traces(page, "drops")}
        assert bars["kept"] == pytest.approx(len(kept) / len(made.rows(number)))
        assert sum(bars.values()) == pytest.approx(1)
        steps = [
            json.loads(line)
            for line in (made.path / f"round-{number - 1:02d}" / "train.jsonl").open()
        ]
        for name, field in (
            ("heal-nll", "nll_nats"),
            ("heal-soft", "soft_nats"),
            ("heal-kl", "kl_nats"),
            ("heal-share", "share_over"),
            ("heal-ratio", "barrier_gradient_ratio"),
        ):
            drawn = _traces(page, name)[number - 1]
            measured = [step for step in steps if step[field] is not None]
            assert drawn["y"] == [step[field] for step in measured]
            assert drawn["x"] == [step["step"] for step in measured]
        curve = made.of(f"round-{number - 1:02d}/dose.json")
        chosen = _with_symbol(page, "dose-pass", "circle")[number - 1]
        assert chosen["x"] == [point["dose"] for point in curve]
        tried = _with_symbol(page, "dose-pass", "circle-open")[number - 1]
        assert tried["y"] == [
            p["pass_rate"] for p in made.of(f"round-{number - 1:02d}/probe.json")["probe"]
        ]


def _enacted(rows: dict[str, Any]) -> float:
    return sum(reply["enacted"] for reply in rows["replies"]) / len(rows["replies"])


def _cells(row: Locator) -> list[str]:
    return [cell.text_content() or "" for cell in row.locator("td").all()]


def test_nothing_is_fetched(made: Made, shown: tuple[Page, Tabs]) -> None:
    _, tabs = shown
    assert tabs.requests == [made.page.absolute().as_uri()]


def test_pointing_at_a_round_says_its_figures(made: Made, page: Page) -> None:
    point = page.locator("#enacted .points path").last
    point.hover(force=True)
    said = page.locator("#enacted .hovertext").text_content() or ""
    rows = made.of(f"round-{ROUNDS - 1:02d}/eval.json")["healed"]
    assert f"round {ROUNDS}, healed" in said and f"{100 * _enacted(rows):.1f} %" in said


def test_every_chart_says_its_figures_in_words(made: Made, page: Page) -> None:
    for chart in page.locator(".chart").all():
        assert chart.get_attribute("role") == "img"
        assert re.search(r"\d", chart.get_attribute("aria-label") or "")


def test_the_diary_sets_steered_and_healed_side_by_side(made: Made, page: Page) -> None:
    first = page.locator("details.entry").first
    replies = made.of("round-00/eval.json")["healed"]["replies"]
    text = next(r["text"] for r in replies if r["prompt_index"] == 0 and r["sample"] == 0)
    assert visible(text) in (first.locator("article").nth(3).text_content() or "")
    steered, healed = (first.locator("article").nth(n).bounding_box() for n in (2, 3))
    assert steered is not None and healed is not None
    assert steered["y"] == healed["y"] and steered["x"] < healed["x"]


def test_boxes_are_the_quantiles_of_the_files(made: Made, page: Page) -> None:
    for number in range(1, ROUNDS + 1):
        kept = [row["enactment_nats"] for row in made.rows(number) if row["dropped"] is None]
        low, q1, median, q3, high = np.quantile(kept, [0.05, 0.25, 0.5, 0.75, 0.95])
        bar, point = page.evaluate(
            "document.getElementById('kept-dropped').data.slice(0, 2).map("
            "({y, base, error_y}) => ({y, base, error_y}))"
        )
        at = number - 1
        assert [bar["base"][at], bar["base"][at] + bar["y"][at]] == pytest.approx([q1, q3])
        whiskers = point["error_y"]
        ends = [point["y"][at] - whiskers["arrayminus"][at], point["y"][at] + whiskers["array"][at]]
        assert [point["y"][at], *ends] == pytest.approx([median, low, high])


def test_without_scripts_there_is_a_figure_and_words(made: Made, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(made.page.absolute().as_uri())
    still = page.locator("img.still")
    box = still.bounding_box()
    assert box is not None and box["width"] > 500 and box["height"] > 300
    assert (still.get_attribute("src") or "").startswith("data:image/svg+xml;base64,")
    charts = page.locator("figure")
    assert charts.count() == page.locator("figure p.note").count() > 20
    assert not page.locator(".chart").first.is_visible()
    assert not page.locator("#rows").is_visible()
    context.close()


def test_every_chart_is_on_paper(made: Made, tabs: Tabs) -> None:
    """Those that nobody has come near yet, too."""
    page = tabs.open(made.page)
    page.locator("#map .main-svg").first.wait_for()
    assert page.locator("#heal-nll .main-svg").count() == 0
    page.pdf()
    assert page.locator(".chart .plot-container").count() == page.locator(".chart").count()


def test_plotly_is_the_file_that_is_written_down() -> None:
    about = (PLOTLY.parent / "README.md").read_text()
    assert hashlib.sha256(PLOTLY.read_bytes()).hexdigest() in about
    head = re.search(r"plotly\.js \(basic - minified\) v(\d+)\.\S+", PLOTLY.read_text()[:400])
    assert head is not None and head[1] == get_plotlyjs_version().partition(".")[0]


# ---------------------------------------------------------------------------------------- browse


def _browse(page: Page) -> None:
    page.locator("#rows").scroll_into_view_if_needed()
    page.locator(".row").first.wait_for()
    page.dispatch_event("#by-round", "change")


def _count(page: Page, expected: int, of: int) -> None:
    page.locator("#count", has_text=re.compile(f"^{expected:,} of {of:,} ")).wait_for()


def test_filters_find_what_the_files_hold(made: Made, page: Page) -> None:
    _browse(page)
    rows = {number: made.rows(number) for number in range(1, ROUNDS + 1)}
    total = sum(map(len, rows.values()))
    _count(page, total, total)

    page.select_option("#by-round", "2")
    _count(page, len(rows[2]), total)
    kept = [row for row in rows[2] if row["dropped"] is None]
    page.select_option("#by-outcome", label="kept")
    _count(page, len(kept), total)
    page.select_option("#by-round", "")
    page.select_option("#by-outcome", "dropped")
    dropped = [row for each in rows.values() for row in each if row["dropped"] is not None]
    _count(page, len(dropped), total)
    reason = dropped[0]["dropped"]
    page.select_option("#by-outcome", label=f"dropped: {reason}")
    _count(page, sum(row["dropped"] == reason for row in dropped), total)

    page.select_option("#by-outcome", "")
    dose = rows[1][0]["dose"]
    page.select_option("#by-dose", label=f"{float(f'{dose:.3g}')}")
    same = [r for each in rows.values() for r in each if f"{r['dose']:.3g}" == f"{dose:.3g}"]
    _count(page, len(same), total)

    page.select_option("#by-dose", "")
    word = "school"
    page.fill("#search", word.upper())
    hits = [
        row
        for each in rows.values()
        for row in each
        if word.lower() in f"{row['text']}\n{row['prompt']}".lower()
    ]
    _count(page, len(hits), total)


def test_only_rows_that_can_be_seen_are_in_the_page(made: Made, page: Page) -> None:
    _browse(page)
    page.select_option("#order", "-enactment")
    rows = [row for number in range(1, ROUNDS + 1) for row in made.rows(number)]
    assert page.locator(".row").count() < 20 < len(rows)
    page.evaluate("document.getElementById('rows').scrollTop = 1e9")
    page.wait_for_timeout(100)
    least = min(row["enactment_nats"] for row in rows)
    said = (page.locator(".row").last.text_content() or "").replace("−", "-")
    assert f"enactment {float(f'{least:.3g}')}" in said


def test_a_completion_is_read_whole_by_the_keyboard(made: Made, page: Page) -> None:
    _browse(page)
    page.locator(".row").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    row = made.rows(1)[1]
    assert page.locator("dialog .said").text_content() == visible(row["text"])
    assert page.locator("dialog .asked").text_content() == row["prompt"]
    scores = dict(
        zip(
            page.locator("dialog dt").all_text_contents(),
            page.locator("dialog dd").all_text_contents(),
            strict=True,
        )
    )
    tail = row["surprisal"]["tail_nll_nats"]
    assert float(scores["tail surprisal, nats a token"]) == pytest.approx(tail, rel=0.01)
    page.locator("#later").click()
    assert page.locator("dialog .said").text_content() == visible(made.rows(1)[2]["text"])
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


# --------------------------------------------------------------------------------------- hostile


def _spoilt(progress: Progress) -> Progress:
    """The same run with texts and figures that would break a careless page."""
    assert progress.saved is not None
    saved, nan = progress.saved, float("nan")
    texts = [HOSTILE + "\ud83d", "long " * 210_000, *["plain"] * 50]
    rounds = []
    for round in saved.rounds:
        rows = tuple(
            row.model_copy(update={"text": text, "kl_p95_nats": nan})
            for row, text in zip(round.screened.rows, texts, strict=False)
        )
        curve = tuple(p.model_copy(update={"kl_p95_nats": nan}) for p in round.screened.curve)
        screened = round.screened.model_copy(update={"rows": rows, "curve": curve})
        steps = tuple(step.model_copy(update={"kl_nats": nan}) for step in round.steps)
        rounds.append(replace(round, screened=screened, steps=steps))
    base = saved.controls.base
    replies = tuple(r.model_copy(update={"text": HOSTILE}) for r in base.replies)
    controls = saved.controls.model_copy(
        update={"base": base.model_copy(update={"replies": replies})}
    )
    trait = saved.trait.model_copy(update={"positive": HOSTILE, "name": HOSTILE})
    saved = replace(saved, rounds=tuple(rounds), controls=controls, trait=trait)
    description = progress.description.model_copy(update={"trait": trait})
    return replace(progress, saved=saved, rounds=saved.rounds, description=description)


def test_hostile_texts_are_shown_as_text(made: Made, tabs: Tabs, tmp_path: Path) -> None:
    spoilt = _spoilt(read_progress(made.path))
    assert spoilt.saved is not None
    (tmp_path / "page.html").write_text(
        render_page(spoilt, summarise(spoilt.saved)), encoding="utf-8"
    )
    page = tabs.open(tmp_path / "page.html")
    _all_drawn(page)
    assert page.locator(".reply p").first.text_content() == SHOWN
    assert SHOWN in (page.locator("#facts").text_content() or "")
    _browse(page)
    page.locator(".row").first.click()
    assert page.locator("dialog .said").text_content() == SHOWN + "⟨U+D83D⟩"
    assert "–" in page.locator("dialog dd").all_text_contents()  # its KL is none
    page.locator("#later").click()
    assert len(page.locator("dialog .said").text_content() or "") == 5000
    page.get_by_text("Show all 1,050,000 characters").click()
    assert len(page.locator("dialog .said").text_content() or "") == 1_050_000
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


# --------------------------------------------------------------------------- themes and widths

_CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = (color) => rgb(color).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => { const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : color; };
  return [...document.querySelectorAll("main *:not(svg *):not(i)")]
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .filter((e) => !e.disabled && e.checkVisibility())
    .map((e) => { const pair = [light(getComputedStyle(e).color), light(behind(e))].sort();
      return [(pair[1] + 0.05) / (pair[0] + 0.05), e.tagName + e.textContent.slice(0, 30)]; });
}"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_charts_follow_the_theme(made: Made, tabs: Tabs, dark: bool) -> None:
    page = tabs.open(made.page, dark=dark)
    page.locator("#heal-nll").scroll_into_view_if_needed()
    page.locator("#heal-nll .js-line").first.wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert min(page.evaluate(_CONTRASTS))[0] >= 4.5
    line = page.locator("#heal-nll .js-line").first
    assert _rgb(PALETTE["round-1"][dark]) in (line.get_attribute("style") or "")
    page.emulate_media(color_scheme="light" if dark else "dark")
    page.wait_for_function(
        "color => document.querySelector('#heal-nll .js-line').style.stroke === color",
        arg=_rgb(PALETTE["round-1"][not dark]),
    )


def _rgb(color: str) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


def test_more_reasons_than_colours_are_told_apart(made: Made) -> None:
    """By a pattern: one colour twice would be one reason to the eye."""
    (first, *_), names = read_progress(made.path).rounds, "abcdefghijk"
    assert first.screened is not None
    rows = tuple(
        row.model_copy(update={"dropped": names[n % len(names)]})
        for n, row in enumerate(first.screened.rows)
    )
    spoilt = replace(first, screened=first.screened.model_copy(update={"rows": rows}))
    bars = filter_charts([spoilt], None)[0].figure.data
    looks = {(bar.marker.color, bar.marker.pattern.shape) for bar in bars}
    assert len(looks) == len(bars) == 1 + len(names)


def test_what_is_drawn_stands_out_from_the_paper() -> None:
    """By 3 to 1, as WCAG 2.2 asks of what is not text; grid, shades and stripes are not to."""
    for name in PALETTE.keys() - {"line", "panel", "healed-band", "base-band"}:
        for color, paper in zip(PALETTE[name], ("#ffffff", "#171b20"), strict=True):
            assert _contrast(color, paper) >= 3, name


def _contrast(*colors: str) -> float:
    dim, bright = sorted(map(_luminance, colors))
    return (bright + 0.05) / (dim + 0.05)


def _luminance(color: str) -> float:
    shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def test_a_colour_has_one_name() -> None:
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


def test_a_phone_shows_all_of_it(made: Made, tabs: Tabs) -> None:
    page = tabs.open(made.page, width=PHONE_WIDTH)
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    _all_drawn(page)
    _browse(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE_WIDTH
    for chart in page.locator(".chart").all():
        box, svg = chart.bounding_box(), chart.locator(".main-svg").first.bounding_box()
        assert box is not None and svg is not None
        assert svg["width"] <= box["width"] + 1 and box["x"] + box["width"] <= PHONE_WIDTH
    page.locator(".row").first.click()
    assert page.evaluate("document.querySelector('dialog').getBoundingClientRect().right") <= 375


# ------------------------------------------------------------------------------- a run under way


def _without(*stages: str) -> Callable[[Path], None]:
    def take(run: Path) -> None:
        recorded = json.loads((run / "stages.json").read_text())
        write_json(run / "stages.json", {k: v for k, v in recorded.items() if k not in stages})

    return take


def _first(stage: str, *own: str) -> Callable[[Path], None]:
    def take(run: Path) -> None:
        shutil.rmtree(run / "round-01")
        rewind(run, 0, stage)
        _without(*own)(run)

    return take


def _nothing_yet(run: Path) -> None:
    for folder in run.glob("round-*"):
        shutil.rmtree(folder)
    (run / "stages.json").unlink()


STOPS: dict[str, tuple[Callable[[Path], None], int, int]] = {  # next -> how, rounds done, charts
    "check the model (before round 1)": (_nothing_yet, 0, 0),
    "find the steering vector (round 1)": (_first("vector", "controls"), 0, 0),
    "choose doses (round 1)": (_first("doses", "controls"), 0, 0),
    "sample (round 1)": (_first("drafts", "controls"), 0, 3),
    "filter (round 1)": (_first("screened", "controls"), 0, 3),
    "measure base, prompts and random directions (round 1)": (_first("adapter", "controls"), 0, 5),
    "heal (round 1)": (_first("adapter"), 0, 19),
    "evaluate (round 1)": (_first("eval"), 0, 24),
    "find the steering vector (round 2)": (lambda run: rewind(run, 1, "vector"), 1, 24),
    "heal (round 2)": (lambda run: rewind(run, 1, "adapter"), 1, 24),
    "evaluate (round 2)": (lambda run: rewind(run, 1, "eval"), 1, 24),
}


@pytest.mark.parametrize("following", STOPS)
def test_a_run_stopped_anywhere_says_where_it_stands(following: str, copy: Path) -> None:
    stop, num_done, num_charts = STOPS[following]
    stop(copy)
    page = write_report(copy).read_text(encoding="utf-8")
    assert f"<b>{num_done} of {ROUNDS} rounds done.</b> Next: {following}." in page
    assert ("No round is finished yet" in page) is (num_done == 0)
    assert page.count('class="chart"') == num_charts
    drawn = {name for name in REPORT_FILES if (copy / name).exists()}
    assert drawn == (set(REPORT_FILES) if num_done else {"report.html"})


@pytest.mark.parametrize(
    "following",
    [
        "check the model (before round 1)",
        "measure base, prompts and random directions (round 1)",
        "evaluate (round 1)",
    ],
)
def test_what_there_is_of_a_stopped_run_is_drawn(following: str, copy: Path, tabs: Tabs) -> None:
    stop, _, num_charts = STOPS[following]
    stop(copy)
    page = tabs.open(write_report(copy))
    _all_drawn(page)
    assert page.locator(".chart .plot-container").count() == num_charts
    page.locator("#rows").scroll_into_view_if_needed()
    sampled = (copy / "round-00" / "completions.jsonl").exists()
    said = "24 of 24 completions" if sampled else "Nothing has been filtered yet."
    page.locator("#count", has_text=said).wait_for()


def test_the_stages_are_in_the_order_of_a_real_run(made: Made) -> None:
    log = (made.path / "log.txt").read_text()
    begun = re.findall(r"INFO (?:run small|round (\d) \(round-\d\d\)): (\w+)$", log, re.MULTILINE)
    parts = read_progress(made.path).parts
    assert [stage for _, stage in begun] == [step.stage for part in parts for step in part.steps]


def test_it_is_drawn_at_the_start_of_every_round(made: Made) -> None:
    assert "<b>1 of 2 rounds done.</b> Next: find the steering vector (round 2)" in made.on_the_way


def test_a_page_that_cannot_be_written_costs_no_more(copy: Path) -> None:
    (copy / "report.html").mkdir()
    said: list[str] = []
    sink = logger.add(lambda line: said.append(str(line)), format="{level} {message}")
    draw_page(copy)
    logger.remove(sink)
    assert len(said) == 1 and said[0].startswith("WARNING the page could not be drawn")


# -------------------------------------------------------------------------------------- large runs


@pytest.mark.slow
def test_fifty_thousand_completions_are_a_page_of_less_than_15_mb(
    made: Made, tabs: Tabs, tmp_path: Path
) -> None:
    large = _large(read_progress(made.path))
    assert large.saved is not None
    page = render_page(large, summarise(large.saved))
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert (tmp_path / "page.html").stat().st_size < 15e6
    opened = tabs.open(tmp_path / "page.html")
    _all_drawn(opened)
    _browse(opened)
    _count(opened, 50_000, 50_000)
    opened.select_option("#by-round", "8")
    _count(opened, 6_250, 50_000)
    opened.evaluate("document.getElementById('rows').scrollTop = 300_000")
    opened.wait_for_timeout(200)
    assert 5 < opened.locator(".row").count() < 30


def _large(progress: Progress) -> Progress:
    """Eight rounds of 6,250 completions each, like those of a small run."""
    assert progress.saved is not None
    rounds = []
    for number in range(1, 9):
        first = progress.saved.rounds[number % ROUNDS]
        rows = first.screened.rows
        many = tuple(
            rows[n % len(rows)].model_copy(update={"text": _other_words(rows, n)})
            for n in range(6250)
        )
        screened = first.screened.model_copy(update={"rows": many})
        rounds.append(replace(first, number=number, screened=screened))
    saved = replace(progress.saved, rounds=tuple(rounds))
    return replace(progress, saved=saved, rounds=saved.rounds)


def _other_words(rows: Any, number: int) -> str:
    """400 characters and more, of words in an order of their own."""
    words = " ".join(row.text for row in rows).split()
    return " ".join(random.Random(number).choices(words, k=80))
