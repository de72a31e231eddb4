"""Comparing runs: against plain Python over the JSON files, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from eval.errors import UserError
from eval.files import write_json
from steer_heal.compare import compare_runs
from steer_heal.config import resolve_config
from steer_heal.loop import run_rounds
from steer_heal.manifest import run_path
from steer_heal.saved import prompt_means, read_saved_run
from tests.browser import PHONE_WIDTH, Tabs
from tests.processes import command, refusal
from tests.small import FOUNDATIONS, small_settings
from tests.tiny import tiny_model_folder

FIGURES = ["enacted", *(f"{name}_nats" for name in sorted(FOUNDATIONS)), "pmass", "mundane"]
FIGURES += ["mean tail nats", "selectivity", "flip rate"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs on the same items, at two learning rates; one on fewer samples a prompt."""
    folder = tmp_path_factory.mktemp("compare")
    settings = small_settings(tiny_model_folder(folder, "qwen3"), folder)
    varied = r"run=|heal\.learning_rate|evaluate\.samples"
    settings = [item for item in settings if not re.match(varied, item)]
    changes = {
        "slow": ["heal.learning_rate=0.003", "evaluate.samples_per_prompt=2"],
        "fast": ["heal.learning_rate=0.1", "evaluate.samples_per_prompt=2"],
        "few": ["heal.learning_rate=0.003", "evaluate.samples_per_prompt=1"],
    }
    paths = {}
    for name, change in changes.items():
        config = resolve_config([*settings, *change, f"run={name}", "N=1"])
        paths[name] = run_path(config)
        run_rounds(config, paths[name])
    return paths


@pytest.fixture
def copy(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["slow"], tmp_path / "copy"))


def _lines(block: str) -> dict[str, list[str]]:
    """Name of a figure -> the rest of its line."""
    names = sorted(FIGURES, key=len, reverse=True)
    found = {}
    for line in block.splitlines():
        for name in names:
            if line.startswith(name + " "):
                found[name] = line[len(name) :].split()
                break
    return found


def _healed(path: Path) -> dict[str, Any]:
    return json.loads((path / "round-00" / "eval.json").read_text())["healed"]


def _figures(path: Path) -> dict[str, float]:
    rows, base = _healed(path), json.loads((path / "base.json").read_text())
    figures = _moved(rows["choices"], base["choices"]) | {
        "enacted": statistics.mean(reply["enacted"] for reply in rows["replies"]),
        "pmass": statistics.mean(row["pmass"] for row in rows["choices"]),
        "mundane": statistics.mean(task["right"] for task in rows["tasks"]),
        "mean tail nats": statistics.mean(
            reply["surprisal"]["tail_nll_nats"] for reply in rows["replies"]
        ),
    }
    for name in FOUNDATIONS:
        shares = []
        for row in rows["choices"]:
            total = sum(math.exp(score) for score in row["scores"].values())
            shares.append(math.exp(row["scores"][name]) / total)
        figures[f"{name}_nats"] = math.log(statistics.mean(shares))
    return figures


def _moved(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, float]:
    """Selectivity and flip rate for more care and less authority, an item at a time."""
    moved = dict.fromkeys(FOUNDATIONS, 0.0)
    flips = []
    for after, before in zip(rows, base, strict=True):
        worth = []
        for sign, scores in ((1, after["scores"]), (-1, before["scores"])):
            for name in FOUNDATIONS:
                centred = scores[name] - statistics.mean(scores.values())
                moved[name] += sign * centred / len(rows)
            picked = max(scores, key=lambda name: scores[name])
            worth.append({"care": 1, "authority": -1}.get(picked, 0))
        flips.append((worth[0] > worth[1]) - (worth[0] < worth[1]))
    masses = [sum(row["pmass"] for row in side) for side in (rows, base)]
    others = [abs(moved[name]) for name in FOUNDATIONS if name not in ("care", "authority")]
    on = (moved["care"] - moved["authority"]) / 2
    kept = min(1.0, masses[0] / masses[1]) ** 2
    return {
        "selectivity": (on - 0.1 * statistics.mean(others)) * kept,
        "flip rate": statistics.mean(flips),
    }


def test_a_run_does_not_differ_from_its_copy(runs: dict[str, Path], copy: Path) -> None:
    table, differences = compare_runs([runs["slow"], copy]).text.split("\n\n")
    assert set(_lines(table)) == set(FIGURES)
    lines = _lines(differences)
    assert set(lines) == set(FIGURES)
    for rest in lines.values():
        assert rest[:3] == ["+0.000", "[+0.000,", "+0.000]"]
        assert " ".join(rest[3:]) == "no difference shown"


def test_table_and_differences_are_those_of_the_files(runs: dict[str, Path]) -> None:
    table, differences = compare_runs([runs["slow"], runs["fast"]]).text.split("\n\n")
    slow, fast = (_figures(runs[name]) for name in ("slow", "fast"))
    assert differences.startswith("fast minus slow")
    columns, lines = _lines(table), _lines(differences)
    for name in FIGURES:
        assert columns[name] == [f"{slow[name]:.3f}", f"{fast[name]:.3f}"]
        assert float(lines[name][0]) == pytest.approx(fast[name] - slow[name], abs=6e-4)
        low, high = (float(lines[name][index].strip("[],")) for index in (1, 2))
        assert low <= float(lines[name][0]) <= high
        is_shown = low > 0 or high < 0
        assert is_shown != (lines[name][3:] == ["no", "difference", "shown"])
    assert slow != fast


@pytest.mark.parametrize("intended", [{"care": 1}, {}])
def test_runs_that_mean_to_move_other_foundations_are_not_compared_in_that(
    intended: dict[str, int], runs: dict[str, Path], copy: Path
) -> None:
    description = json.loads((copy / "run.json").read_text())
    description["trait"]["intended"] = intended
    write_json(copy / "run.json", description)
    table, differences = compare_runs([runs["slow"], copy]).text.split("\n\n")
    assert "mean to move different foundations" in differences.splitlines()[-1]
    left = set(FIGURES) - {"selectivity", "flip rate"}
    assert set(_lines(table)) == set(_lines(differences)) == left


def test_three_runs_are_each_compared_with_the_first(runs: dict[str, Path], copy: Path) -> None:
    table, *pairs = compare_runs([runs["slow"], runs["fast"], copy]).text.split("\n\n")
    assert table.splitlines()[0].split()[-3:] == ["slow", "fast", "copy"]
    assert [pair.split(",")[0] for pair in pairs] == ["fast minus slow", "copy minus slow"]


def test_a_run_is_not_compared_with_itself(runs: dict[str, Path]) -> None:
    again = runs["slow"] / ".." / "slow"
    for given in ([runs["slow"], again], [runs["slow"], runs["fast"], again]):
        with pytest.raises(UserError, match="is given twice: a run does not differ from itself"):
            compare_runs(given)


def test_other_samples_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"different items.*samples to held-out prompts differ"):
        compare_runs([runs["slow"], runs["few"]])


def test_other_held_out_prompts_are_refused(runs: dict[str, Path], copy: Path) -> None:
    description = json.loads((copy / "run.json").read_text())
    trait = read_saved_run(copy).trait
    asked = ["Something else?", *trait.held_out_prompts[1:]]
    description["trait"] = trait.model_dump(mode="json") | {"held_out_prompts": asked}
    write_json(copy / "run.json", description)
    with pytest.raises(UserError, match="their held-out prompts differ"):
        compare_runs([runs["slow"], copy])


def test_other_suites_are_refused(runs: dict[str, Path], copy: Path) -> None:
    description = json.loads((copy / "run.json").read_text())
    write_json(copy / "run.json", description | {"suites": "0" * 64})
    with pytest.raises(UserError, match="the texts of their suites differ"):
        compare_runs([runs["slow"], copy])


def test_fewer_than_two_runs_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="two runs or more, 1 given"):
        compare_runs([runs["slow"]])


def test_a_folder_that_is_no_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        compare_runs([runs["slow"], tmp_path])


def test_a_run_without_a_finished_round_is_refused(runs: dict[str, Path], copy: Path) -> None:
    (copy / "round-00" / "DONE").unlink()
    with pytest.raises(UserError, match="no round is finished"):
        compare_runs([runs["slow"], copy])


def test_a_truncated_file_is_named(runs: dict[str, Path], copy: Path) -> None:
    content = (copy / "base.json").read_bytes()
    (copy / "base.json").write_bytes(content[:100])
    with pytest.raises(UserError, match=r"base\.json is not what was written"):
        compare_runs([runs["slow"], copy])


def test_prompt_means_keep_a_prompt_together(runs: dict[str, Path]) -> None:
    rows = read_saved_run(runs["slow"]).controls.base.replies
    means = prompt_means(rows, lambda reply: reply.sample)
    assert means == [0.5] * 4


# ---------------------------------------------------------------------------------------- the page

HOSTILE = "<img src=x onerror=window.hacked=1>"


def _data(page: Page, chart: str) -> list[dict[str, Any]]:
    """The traces of a chart that is drawn, those with something to be said of their points."""
    page.locator(f"#{chart}").scroll_into_view_if_needed()  # it is drawn when it comes near
    page.wait_for_function(f"document.getElementById('{chart}').data !== undefined")
    traces = page.evaluate(f"document.getElementById('{chart}').data")
    return [trace for trace in traces if trace["hoverinfo"] == "text"]


def test_the_page_draws_what_the_files_say(
    runs: dict[str, Path], tmp_path: Path, tabs: Tabs
) -> None:
    fast = Path(shutil.copytree(runs["fast"], tmp_path / HOSTILE))
    out = tmp_path / "page.html"
    done = command(tmp_path, "compare", str(runs["slow"]), str(fast), f"out={out}")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"page: {out}"
    assert out.stat().st_size < 4_000_000
    page = tabs.open(out, width=PHONE_WIDTH, dark=True)

    figures = {name: _figures(path) for name, path in (("slow", runs["slow"]), ("fast", fast))}
    for trace, name in zip(_data(page, "enacted"), figures, strict=True):
        base = json.loads((runs[name] / "base.json").read_text())["replies"]
        before = statistics.mean(reply["enacted"] for reply in base)
        assert trace["y"] == pytest.approx([before, figures[name]["enacted"]])
    (points,) = _data(page, "paired-nats")
    for name in ("care_nats", "authority_nats", "selectivity"):
        place = next(i for i, text in enumerate(points["hovertext"]) if f"<br>{name} " in text)
        moved = figures["fast"][name] - figures["slow"][name]
        assert points["x"][place] == pytest.approx(moved, abs=1e-9)
        bars = points["error_x"]
        assert bars["array"][place] >= 0 and bars["arrayminus"][place] >= 0

    rows = page.locator("#settings tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [["heal.learning_rate", "0.003", "0.1"]]
    heads = page.locator("#figures thead th").all_inner_texts()
    assert heads == ["healed", "slow", HOSTILE]
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH
    assert {request.partition(":")[0] for request in tabs.requests} <= {"file", "data"}


def test_the_page_lies_beside_the_runs_and_only_where_it_can(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    rounds = tmp_path / "rounds"
    for name in ("slow", "fast"):
        shutil.copytree(runs[name], rounds / name)
    assert "two runs or more" in refusal(command(tmp_path, "compare", "slow"))
    nowhere = tmp_path / "nowhere" / "page.html"
    message = refusal(command(tmp_path, "compare", "slow", "fast", "out=a.html", "out=b.html"))
    assert "out is given twice" in message and not list(tmp_path.glob("*.html"))
    message = refusal(command(tmp_path, "compare", "slow", "fast", f"out={nowhere}"))
    assert str(nowhere) in message
    assert sorted(path.name for path in rounds.iterdir()) == ["fast", "slow"]
    assert command(tmp_path, "compare", "slow", "fast").code == 0
    assert (rounds / "compare.html").is_file() and not list(rounds.glob(".tmp-*"))
