"""The page against the run's JSON files, read by plain Python; a real small run on a tiny model."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shlex
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation

from eval.errors import UserError
from eval.files import write_json
from eval.statistics import Interval
from eval.summary import interval_text
from steer_heal.artifacts import Controls, Limits, Unbarred
from steer_heal.config import resolve_config
from steer_heal.figures import (
    DPI,
    HEIGHT_INCHES,
    WIDTH_INCHES,
    _Label,
    _label_right,
    _spread,
    draw_drift,
)
from steer_heal.progress import read_progress
from steer_heal.report import command_of, diary_of, drift_of, render_page, write_report
from steer_heal.rounds import Run
from steer_heal.saved import condition_figures, length_correlation, read_saved_run
from steer_heal.summary import Summary, summarise
from steer_heal.wording import bounds, nats, percent, plain_bounds, script_json, visible
from tests.processes import REPORT_FILES
from tests.small import FOUNDATIONS, small_run

ROUNDS = 2


class _Tables(HTMLParser):
    """Table id -> rows of cell texts; and all that a browser would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self.tags: list[str] = []
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.sources += [v for k, v in attrs if k in ("src", "srcset", "href") and v is not None]
        if tag == "table":
            self._rows = self.tables.setdefault(found["id"] or "", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._rows[-1][-1] += f" {data}" if self._rows[-1][-1] else data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds; its model, its trait file and its suites are gone."""
    folder = tmp_path_factory.mktemp("report")
    path = small_run(folder, ROUNDS)
    for other in folder.iterdir():
        if other.is_dir() and other != path.parent:
            shutil.rmtree(other)
        elif other.is_file():
            other.unlink()
    return path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil; without a report."""
    ignored = shutil.ignore_patterns(*REPORT_FILES)
    return Path(shutil.copytree(made, tmp_path / "run", ignore=ignored))


@pytest.fixture(scope="module")
def report(made: Path) -> Summary:
    return summarise(read_saved_run(made))


@pytest.fixture(scope="module")
def page(made: Path) -> str:
    return write_report(made).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables(page: str) -> dict[str, list[list[str]]]:
    return _Tables(page).tables


def _conditions(path: Path) -> list[dict[str, Any]]:
    """Both prompts and random directions after base, then every round's two, as in the table."""
    names = ("base", "prompted", "engineered")
    found = [json.loads((path / f"{name}.json").read_text()) for name in names]
    found += json.loads((path / "random.json").read_text())
    for index in range(ROUNDS):
        rows = json.loads((path / f"round-{index:02d}" / "eval.json").read_text())
        found += [rows["steered"], rows["healed"]]
    return found


def _nats(rows: dict[str, Any], name: str) -> float:
    shares = []
    for row in rows["choices"]:
        total = sum(math.exp(score) for score in row["scores"].values())
        shares.append(math.exp(row["scores"][name]) / total)
    return math.log(sum(shares) / len(shares))


def _enacted(rows: dict[str, Any]) -> float:
    return statistics.mean(reply["enacted"] for reply in rows["replies"])


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-0.00", "+0.00").replace("-", "−")


def test_the_table_has_the_numbers_of_the_files(
    made: Path, tables: dict[str, list[list[str]]]
) -> None:
    conditions = _conditions(made)
    _, *lines = tables["conditions"]
    assert len(lines) == len(conditions) == 5 + 2 * ROUNDS
    for line, rows in zip(lines, conditions, strict=True):
        _, dose, enacted, care, authority, others, pmass, tail, mundane = line
        steered = rows["dose"] is not None
        assert dose == (f"{rows['dose']:.3f} KL {rows['kl_nats']:.3f}" if steered else "–")
        assert enacted.startswith(f"{100 * _enacted(rows):.1f} % ")
        for name, cell in (("care", care), ("authority", authority)):
            assert cell.startswith(_signed(_nats(rows, name)))
            if rows is not conditions[0]:
                shift = _nats(rows, name) - _nats(conditions[0], name)
                assert f" {_signed(shift)} [" in cell
        if rows is not conditions[0]:
            unintended = set(rows["choices"][0]["scores"]) - {"care", "authority"}
            moved = [abs(_nats(rows, name) - _nats(conditions[0], name)) for name in unintended]
            assert others == f"{statistics.mean(moved):.2f}"
        assert pmass == f"{statistics.mean(row['pmass'] for row in rows['choices']):.4f}"
        tails = [reply["surprisal"]["tail_nll_nats"] for reply in rows["replies"]]
        assert tail == f"{statistics.median(tails):.2f}"
        assert mundane == percent(statistics.mean(task["right"] for task in rows["tasks"]))


def test_every_foundation_is_shown_down_the_rounds(
    made: Path, tables: dict[str, list[list[str]]]
) -> None:
    base, prompted, *_ = conditions = _conditions(made)
    randoms, healed = conditions[3:5], conditions[6::2]
    header, *lines = tables["foundations"]
    rounds = [f"round {number}, shift" for number in range(1, ROUNDS + 1)]
    before = ["foundation", "base, nats", "persona prompt, shift", "random directions, shift"]
    assert header == [*before, *rounds]
    assert [line[0] for line in lines[:2]] == ["care wanted up", "authority wanted down"]
    assert {line[0] for line in lines[2:]} == {
        name.replace("_", " ") for name in FOUNDATIONS if name not in ("care", "authority")
    }
    for line in lines:
        name = line[0].partition(" wanted")[0].replace(" ", "_")
        assert line[1] == _signed(_nats(base, name))
        for cell, rows in zip([line[2], *line[4:]], [prompted, *healed], strict=True):
            shift = _signed(_nats(rows, name) - _nats(base, name))
            assert re.fullmatch(rf"{re.escape(shift)} \[\S+, \S+\]", cell)
        drawn = [_nats(rows, name) - _nats(base, name) for rows in randoms]
        mean, error = statistics.mean(drawn), statistics.stdev(drawn) / math.sqrt(2)
        low, high = mean - 12.7062 * error, mean + 12.7062 * error  # Student's t, one degree
        assert line[3] == f"{_signed(mean)} [{_signed(low)}, {_signed(high)}]"


def test_the_coherence_table_has_the_numbers_of_the_files(
    made: Path, tables: dict[str, list[list[str]]]
) -> None:
    conditions = _conditions(made)
    _, *lines = tables["coherence"]
    assert len(lines) == len(conditions)
    base = conditions[0]
    for line, rows in zip(lines, conditions, strict=True):
        _, perplexity, rmse, tail, repeated, length, neutral, acts, second = line
        first = [reply["surprisal"] for reply in rows["replies"]]
        assert perplexity == _spread_of([math.exp(each["mean_nll_nats"]) for each in first])
        assert rmse == _spread_of([each["rmse_nll_nats"] for each in first])
        assert tail == _spread_of([each["tail_nll_nats"] for each in first])
        assert repeated == percent(
            statistics.mean(_repeated(reply["text"]) for reply in rows["replies"])
        )
        if rows is base:
            assert (length, neutral) == ("1.00", "1.000")
        else:
            words = [_mean_words(each) for each in (rows, base)]
            assert length.startswith(f"{words[0] / words[1]:.2f} [")
            nats, tokens = (
                sum(row[key] for row in rows["neutral"]) for key in ("nll_nats", "tokens")
            )
            nats -= sum(row["nll_nats"] for row in base["neutral"])
            assert neutral.startswith(f"{math.exp(nats / tokens):.3f} [")
        replies = rows["second_replies"]
        share = statistics.mean(reply["enacted"] for reply in replies)
        assert len(replies) == 3 and acts.startswith(f"{percent(share)} [")
        assert second == _spread_of([reply["surprisal"]["tail_nll_nats"] for reply in replies])


def _spread_of(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} p90 {float(np.quantile(values, 0.9)):.2f}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _repeated(text: str) -> float:
    grams = list(zip(*(_words(text)[start:] for start in range(3)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean_words(rows: dict[str, Any]) -> float:
    """Mean over prompts of the mean over a prompt's replies."""
    prompts = {reply["prompt_index"] for reply in rows["replies"]}
    return statistics.mean(
        statistics.mean(
            len(_words(reply["text"])) for reply in rows["replies"] if reply["prompt_index"] == each
        )
        for each in prompts
    )


def test_what_length_has_to_do_with_enactment_is_said(report: Summary) -> None:
    for correlation, words in (
        (None, "never varies"),
        (Interval(estimate=0.5, low=0.2, high=0.7), "longer ones carry more of the trait"),
        (Interval(estimate=-0.5, low=-0.7, high=-0.2), "longer ones carry less of the trait"),
        (Interval(estimate=0.1, low=-0.2, high=0.4), "no link of length with enactment"),
    ):
        said = _page_of(replace(report, length_correlation=correlation))
        assert words in said.replace("\n", " ")


def test_replies_without_an_enactment_are_shown_without_one(report: Summary) -> None:
    """Words decide on the embedded model: only base's replies are scored."""
    controls = report.run.controls
    replies = tuple(
        reply.model_copy(update={"enactment_nats": None}) for reply in controls.prompted.replies
    )
    prompted = controls.prompted.model_copy(update={"replies": replies})
    run = replace(report.run, controls=controls.model_copy(update={"prompted": prompted}))
    page = _page_of(replace(report, run=run))
    articles = re.findall(r"<h3>persona prompt (.*?)</h3>", page)
    assert len(articles) > 1
    assert all(re.search(r"enacted</span>$", article) for article in articles)
    assert re.search(r"<h3>base .*enacted \([+−]\d\.\d\d nats\)</span>", page)


def test_length_goes_with_enactment_as_their_ranks_do(report: Summary) -> None:
    def told(*pairs: tuple[int, float]) -> Any:
        row = report.run.controls.base.replies[0]
        return length_correlation(
            [
                row.model_copy(
                    update={"prompt_index": n, "text": "a " * words, "enactment_nats": nats}
                )
                for n, (words, nats) in enumerate(pairs)
            ]
        )

    assert told((3, 0.1), (5, 0.2), (9, 0.3), (20, 9.0)).estimate == pytest.approx(1)
    assert told((3, 0.3), (5, 0.2), (9, 0.1), (20, -9)).estimate == pytest.approx(-1)
    assert told((3, 0.3), (3, 0.2), (3, 0.1)) is None


def test_neutral_text_that_cannot_be_scored_is_said(report: Summary) -> None:
    text = replace(report.rounds[0].healed.coherence, neutral_ratio=None)
    page = _page_of(_with_round(report, healed_coherence=text))
    assert _Tables(page).tables["coherence"][7][6] == "not finite"


def test_the_round_healed_without_the_barrier_stands_beside_it(report: Summary, page: str) -> None:
    assert report.unbarred is None and "no barrier" not in page
    other = report.run.rounds[0].evaluation.steered
    control = Unbarred(healed=other, steps=report.run.rounds[0].steps)
    page = _page_of(summarise(replace(report.run, unbarred=control)))
    labels = [line[0] for line in _Tables(page).tables["conditions"]]
    beside = [label.removesuffix(" best") for label in labels[6:9]]
    assert beside[0] == "round 1, steered"
    assert beside[1:] == ["round 1, healed", "round 1, no barrier"]
    line = _Tables(page).tables["conditions"][8]
    assert line[2].startswith(percent(statistics.mean(row.enacted for row in other.replies)))


def test_the_headline_says_the_judged_round(made: Path, page: str, report: Summary) -> None:
    base, prompted, *rounds = _conditions(made)
    number = report.best.number if report.best else ROUNDS
    healed = rounds[4 + 2 * (number - 1)]
    headline = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)
    assert headline is not None
    shares = [percent(_enacted(rows)) for rows in (healed, base, prompted)]
    assert (
        f"after round {number}, with no prompt, the model acts the trait in {shares[0]} of"
        in (headline[1])
    )
    assert (
        f"the untouched model does in {shares[1]}, and in {shares[2]} when a prompt"
        in (headline[1])
    )


def _dose(point: dict[str, Any]) -> float:
    return point["dose"]


def test_doses_drops_and_training_are_those_of_the_files(
    made: Path, tables: dict[str, list[list[str]]]
) -> None:
    for index in range(ROUNDS):
        folder = made / f"round-{index:02d}"
        rows = [json.loads(line) for line in (folder / "completions.jsonl").open()]
        header, *lines = tables["drops"]
        counts = dict(zip(header[1:], lines[index][1:], strict=True))
        assert int(counts.pop("drafts")) == len(rows) == 24
        assert int(counts.pop("kept")) == sum(row["dropped"] is None for row in rows)
        prompts = {row["prompt"] for row in rows if row["dropped"] is None}
        assert int(counts.pop("prompts")) == len(prompts)
        reasons = [row["dropped"] for row in rows]
        assert {k: int(v) for k, v in counts.items()} == {k: reasons.count(k) for k in counts}
        doses = [line for line in tables["doses"][1:] if line[0] == str(index + 1)]
        points = json.loads((folder / "dose.json").read_text())
        assert [line[1] for line in doses] == [f"{point['dose']:.3f}" for point in points]
        assert [line[5] for line in doses] == [_signed(p["enactment_nats"]) for p in points]
        probe = json.loads((folder / "probe.json").read_text())
        tried = [line for line in tables["probe"][1:] if line[0] == str(index + 1)]
        taken = {
            dose: " taken" if dose in probe["passing"] else ""
            for dose in map(_dose, probe["probe"])
        }
        assert [line[1] for line in tried] == [f"{d:.3f}{mark}" for d, mark in taken.items()]
        assert [line[3] for line in tried] == [percent(p["pass_rate"]) for p in probe["probe"]]
        steps = [json.loads(line) for line in (folder / "train.jsonl").open()]
        line = tables["training"][1 + index]
        assert line[1] == str(len(steps))
        assert len(steps) == 4  # so a quarter is one step
        assert line[2] == f"{steps[0]['nll_nats']:.2f} → {steps[-1]['nll_nats']:.2f}"
        soft = [abs(round(steps[end]["soft_nats"], 3)) for end in (0, -1)]  # no -0.000
        assert line[3] == f"{soft[0]:.3f} → {soft[1]:.3f}"
        assert line[4] == f"{steps[-1]['kl_nats']:.3f}"
        fired = sum(step["share_over"] > 0 for step in steps) / len(steps)
        assert line[6] == ("never fired" if fired == 0 else percent(fired))


def test_retention_is_healed_over_steered(made: Path, report: Summary) -> None:
    base, *_ = _conditions(made)
    pairs = _conditions(made)[5:]
    for index, figures in enumerate(report.rounds):
        shifts = [
            (_nats(rows, "care") - _nats(base, "care"))
            - (_nats(rows, "authority") - _nats(base, "authority"))
            for rows in pairs[2 * index : 2 * index + 2]
        ]
        assert figures.steered.trait_shift == pytest.approx(shifts[0] / 2)
        assert figures.healed.trait_shift == pytest.approx(shifts[1] / 2)
        if shifts[0] > 0:
            assert figures.retention == pytest.approx(shifts[1] / shifts[0])
        else:
            assert figures.retention is None


def test_the_retention_table_has_selectivity_flips_and_what_was_internalised(
    made: Path, report: Summary, tables: dict[str, list[list[str]]]
) -> None:
    for index, line in enumerate(tables["retention"][1:]):
        saved = json.loads((made / f"round-{index:02d}" / "eval.json").read_text())
        _, _, _, _, internalised, selective, flips, _ = line
        assert internalised == f"{saved['internalised']:.2f}".replace("-", "−")
        healed = report.rounds[index].healed
        assert healed.selectivity is not None and healed.flip_rate is not None
        assert selective.startswith(_signed(healed.selectivity.estimate))
        base = json.loads((made / "base.json").read_text())["choices"]
        moved = [
            _worth(after["scores"]) - _worth(before["scores"])
            for after, before in zip(saved["healed"]["choices"], base, strict=True)
        ]
        rate = sum((change > 0) - (change < 0) for change in moved) / len(moved)
        assert flips.startswith(_signed(rate))


def _worth(scores: dict[str, float]) -> int:
    """1 where the likeliest answer is meant to gain, -1 where it is meant to lose."""
    picked = max(scores, key=lambda name: scores[name])
    return {"care": 1, "authority": -1}.get(picked, 0)


def _with_round(report: Summary, **changes: Any) -> Summary:
    """The report with its first round changed: fields of the round, or healed_ figures."""
    first = report.rounds[0]
    healed = {k.removeprefix("healed_"): v for k, v in changes.items() if k.startswith("healed_")}
    own = {k: v for k, v in changes.items() if not k.startswith("healed_")}
    first = replace(first, healed=replace(first.healed, **healed), **own)
    return replace(report, rounds=(first, *report.rounds[1:]))


def _page_of(report: Summary) -> str:
    progress = read_progress(report.run.path)
    rounds = tuple(round.saved for round in report.rounds)
    run = report.run
    return render_page(
        replace(progress, description=run.description, saved=run, rounds=rounds), report
    )


def test_a_vignette_that_one_side_cannot_score_is_left_out_of_both(made: Path) -> None:
    run = read_saved_run(made)
    base, healed = run.controls.base, run.rounds[0].evaluation.healed
    lost = healed.choices[1].id
    fewer = healed.model_copy(
        update={
            "choices": tuple(row for row in healed.choices if row.id != lost),
            "unscorable": (lost,),
        }
    )
    rest = base.model_copy(update={"choices": tuple(r for r in base.choices if r.id != lost)})
    found = condition_figures("healed", fewer, base, run.trait)
    assert found.unscorable == 1
    assert found.shifts == condition_figures("healed", fewer, rest, run.trait).shifts
    assert found.shifts != condition_figures("healed", healed, base, run.trait).shifts


def test_an_automatic_threshold_is_shown_as_each_round_had_it(report: Summary) -> None:
    config = json.loads(json.dumps(report.run.description.config))
    assert f"exceeds {config['heal']['barrier_threshold_nats']} nats by." in _page_of(report)
    config["heal"]["barrier_threshold_nats"] = "auto"
    description = report.run.description.model_copy(update={"config": config})
    rounds = []
    for round, nats_ in zip(report.rounds, (0.2125, 0.0128), strict=True):
        changes = {"threshold_nats": nats_, "share_over": 0.0}
        steps = tuple(step.model_copy(update=changes) for step in round.saved.steps)
        rounds.append(replace(round, saved=replace(round.saved, steps=steps)))
    run = replace(report.run, description=description)
    page = _page_of(replace(report, run=run, rounds=tuple(rounds)))
    assert "before each round (0.212 → 0.013)." in page or "(0.213 → 0.013)." in page
    assert "auto nats" not in page and "round 1: highest step" in page and "threshold 0.2" in page


def test_the_best_round_has_the_largest_shift_among_the_coherent(report: Summary) -> None:
    def made_of(*rounds: tuple[float, bool]) -> Summary:
        return replace(
            report,
            rounds=tuple(
                replace(
                    report.rounds[0],
                    number=number,
                    is_coherent=coherent,
                    healed=replace(report.rounds[0].healed, trait_shift=shift),
                )
                for number, (shift, coherent) in enumerate(rounds, start=1)
            ),
        )

    best = made_of((0.1, True), (0.4, True), (0.9, False)).best
    assert best is not None and best.number == 2
    assert made_of((0.1, False)).best is None
    assert "None is marked as the best" in _page_of(made_of((0.1, False)))
    assert _page_of(made_of((0.1, True), (0.4, True))).count('class="best"') == 1


def test_coherent_is_pmass_and_tail_against_base(made: Path, report: Summary) -> None:
    limits = json.loads((made / "limits.json").read_text())
    high = np.quantile(limits["base_tail_nll_nats"], 0.95)
    base, *_ = _conditions(made)
    for index, figures in enumerate(report.rounds):
        rows = _conditions(made)[6 + 2 * index]
        mean = statistics.mean(row["pmass"] for row in rows["choices"])
        share = mean / statistics.mean(row["pmass"] for row in base["choices"])
        tails = [reply["surprisal"]["tail_nll_nats"] for reply in rows["replies"]]
        assert figures.is_coherent == (share >= 0.99 and statistics.median(tails) <= high)


def test_the_diary_asks_every_condition_the_same(report: Summary, page: str) -> None:
    diary = diary_of(report.run)
    assert [entry.prompt for entry in diary] == list(report.run.trait.held_out_prompts)
    for entry in diary:
        labels = [label for label, _ in entry.replies]
        rounds = [f"round {n}, {kind}" for n in (1, 2) for kind in ("steered", "healed")]
        assert labels == ["base", "persona prompt", *rounds]
        assert len({reply.prompt_index for _, reply in entry.replies}) == 1
    assert page.count('<article class="reply') == len(diary) * (2 + 2 * ROUNDS)


def test_model_text_is_shown_not_run(run: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\x1b\x07 & <img src=//example.org/x>"
    run_now, saved = Run(run, 0), read_saved_run(run)
    controls = saved.controls
    replies = tuple(row.model_copy(update={"text": hostile}) for row in controls.base.replies)
    spoilt = tmp_path / "hostile"
    shutil.copytree(run, spoilt)
    (spoilt / "stages.json").unlink()
    fresh = Run(spoilt, 0)
    fresh.once(Limits, lambda: run_now.read(Limits))
    fresh.once(
        Controls,
        lambda: controls.model_copy(
            update={"base": controls.base.model_copy(update={"replies": replies})}
        ),
    )
    description = json.loads((spoilt / "run.json").read_text())
    description["trait"] = saved.trait.model_dump(mode="json") | {"positive": hostile}
    write_json(spoilt / "run.json", description)
    page = write_report(spoilt).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;␛␇ &amp; &lt;img" in page
    parsed = _Tables(page)
    assert parsed.tags.count("img") == 1 and parsed.tags.count("script") == 5  # our own


def test_the_page_is_one_file(page: str) -> None:
    assert all(source.startswith(("#", "data:")) for source in _Tables(page).sources)
    assert "@import" not in page


def test_drawn_again_from_the_files_alone_it_is_the_same(made: Path, page: str, run: Path) -> None:
    assert write_report(run).read_text(encoding="utf-8") == page
    for name in REPORT_FILES:
        assert (run / name).read_bytes() == (made / name).read_bytes()
    assert not [path for path in run.iterdir() if path.name.startswith(".tmp")]


def test_the_table_for_other_programs_has_every_condition(made: Path, page: str) -> None:
    with (made / "drift.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    conditions = _conditions(made)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for line in lines:
        of = found.setdefault(f"{line['condition']} {line['round']}".strip(), {})
        of[line["figure"]] = line
    random = [f"random {number}" for number in range(1, len(conditions) - 2 - 2 * ROUNDS)]
    rounds = [f"{name} {number}" for number in (1, 2) for name in ("steered", "healed")]
    assert list(found) == ["base", "prompted", "engineered", *random, *rounds]
    for rows, name in zip(conditions, found, strict=True):
        figures = {key: line["estimate"] for key, line in found[name].items()}
        assert float(figures["enacted"]) == pytest.approx(_enacted(rows))
        assert float(found[name]["enacted"]["low"]) <= _enacted(rows)
        shift = _nats(rows, "authority") - _nats(conditions[0], "authority")
        assert float(figures["authority_shift_nats"]) == pytest.approx(shift)
        assert ("dose" in figures) == name.startswith(("random", "steered"))
        right = [task["right"] for task in rows["tasks"]]
        assert float(figures["mundane"]) == pytest.approx(sum(right) / len(right))


def test_the_plots_are_pictures(made: Path, page: str) -> None:
    image = imread(made / "drift.png")
    assert image.shape[:2] == (round(HEIGHT_INCHES * DPI), round(WIDTH_INCHES * DPI))
    assert image[..., :3].std() > 0.05
    drawing = ElementTree.parse(made / "drift.svg").getroot()
    assert drawing.get("viewBox") == f"0 0 {72 * WIDTH_INCHES:.0f} {72 * HEIGHT_INCHES:.0f}"
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}path"))) > 50


@pytest.mark.parametrize("intended", [{}, {"care": 1}])
def test_any_number_of_intended_foundations_can_be_drawn(
    report: Summary, intended: dict[str, Any]
) -> None:
    trait = report.run.trait.model_copy(update={"intended": intended})
    saved = replace(report.run, trait=trait, rounds=report.run.rounds[:1])
    changed = summarise(saved)
    assert draw_drift(drift_of(changed), "png").startswith(b"\x89PNG")
    assert "after round 1, with no prompt" in _page_of(changed)
    if not intended:
        rows = _conditions(saved.path)
        healed = changed.rounds[0].healed
        assert healed.trait_shift == pytest.approx(_enacted(rows[6]) - _enacted(rows[0]))


def test_names_in_the_plot_are_pushed_apart_no_further_than_needed() -> None:
    assert _spread([0.0, 5.0, 9.0], 1.0) == [0.0, 5.0, 9.0]
    assert _spread([0.0, 0.0, 0.0], 1.0) == [-1.0, 0.0, 1.0]
    assert _spread([0.0, 0.2, 5.0], 1.0) == pytest.approx([-0.4, 0.6, 5.0])


def test_every_name_in_the_plot_leads_to_the_lines_that_it_is_of() -> None:
    axes = Figure().add_axes((0.1, 0.1, 0.5, 0.8))
    axes.set_ylim(-1, 1)
    ends = {"one": (0.5,), "on another": (0.5,), "three": (-0.9, 0.1, 0.2)}
    labels = [_Label(text=text, heights=heights, color="k") for text, heights in ends.items()]
    _label_right(axes, labels, 3.0)
    leads = [lead for lead in axes.texts if isinstance(lead, Annotation)]
    texts, ended = [], []
    for lead in leads:  # a name's first lead carries its text
        texts.append(lead.get_text() or texts[-1])
        ended.append(lead.xy[1])
    assert sorted(zip(texts, ended, strict=True)) == [
        (text, height) for text, heights in sorted(ends.items()) for height in heights
    ]
    unit = 3.0 * 72 / 2  # points
    places = sorted(lead.xy[1] + lead.xyann[1] / unit for lead in leads if lead.get_text())
    assert min(b - a for a, b in itertools.pairwise(places)) >= 11 / unit  # a line of text


def test_the_command_makes_the_same_config_again(report: Summary) -> None:
    config = report.run.description.config
    just, verb, *settings = command_of(config).split()
    assert (just, verb) == ("just", "round")
    assert resolve_config(settings).model_dump(mode="json") == config
    assert command_of(resolve_config(["N=4"]).model_dump(mode="json")) == "just round N=4"
    own = ["N=4", "model=a/b", "pos=bold", "neg=shy"]
    for settings in (own, [*own, "trait=care-over-authority"]):
        found = command_of(resolve_config(settings).model_dump(mode="json"))
        assert found == shlex.join(["just", "round", *settings])


def test_only_finished_rounds_are_shown(run: Path) -> None:
    (run / "round-01" / "DONE").unlink()
    page = write_report(run).read_text(encoding="utf-8")
    assert "after round 1, with no prompt" in page and "1 of 2 asked for" in page
    assert "1 of 2 rounds done" in page and "Next: finish (round 2)" in page


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match=r"run\.json does not describe a run: model"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["round-00/eval.json", "prompted.json", "round-01/train.jsonl"])
def test_a_truncated_file_is_named(run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(run)
    assert not (run / "report.html").exists()


def test_numbers_of_a_column_have_the_same_digits_and_0_is_never_negative() -> None:
    shares = [percent(share) for share in (0, 0.004, 0.41, 0.992, 1)]
    assert shares == ["0.0 %", "0.4 %", "41.0 %", "99.2 %", "100.0 %"]
    assert [nats(value) for value in (-0.004, 0, -0.006)] == ["+0.00", "+0.00", "−0.01"]
    assert [nats(value, False) for value in (-0.004, -0.006, 0.5)] == ["0.00", "−0.01", "0.50"]
    near = Interval(estimate=-1e-9, low=-4e-4, high=4e-4)
    assert interval_text(near) == "+0.000 [+0.000, +0.000]"
    assert [plain_bounds(near), bounds(near)] == ["[0.00, 0.00]", "[+0.00, +0.00]"]


def test_no_table_shows_a_negative_0(page: str, tables: dict[str, list[list[str]]]) -> None:
    cells = [cell for rows in tables.values() for row in rows for cell in row]
    assert not [cell for cell in cells if re.search(r"(?<![\w/])[-−]0\.?0*(?![.\d])", cell)]


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible("a\x00b\x1b\nc\x7f") == "a␀b␛\nc␡"
    assert visible("a\u202eb\u2066c\x85") == "a⟨U+202E⟩b⟨U+2066⟩c⟨U+0085⟩"
    assert visible("half \ud83d of \U0001f600") == "half ⟨U+D83D⟩ of \U0001f600"
    assert visible("שלום, naïve 日本\t") == "שלום, naïve 日本\t"


def test_json_in_a_script_ends_no_script_and_has_no_nan() -> None:
    value = {"a": ["</script><!--", float("nan"), float("-inf"), 0.5, "\u2028&\ud800"]}
    text = script_json(value)
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text) == {"a": ["</script><!--", None, None, 0.5, "\u2028&\ud800"]}


def test_intervals_hold_their_estimate(report: Summary) -> None:
    healed = [round.healed for round in report.rounds]
    intervals: list[Interval] = [figures.enacted for figures in healed]
    intervals += [shift for figures in healed for shift in figures.shifts.values()]
    assert all(interval.low <= interval.estimate <= interval.high for interval in intervals)
