from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

import eval.suite
from eval.sources import read_items
from eval.suite import ForcedChoiceSuite, SuiteError, TaskSuite, load_suite

FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social_norms")
COLUMNS = ("Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms")
PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "tinymfv"
published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"the published vignettes are not at {PUBLISHED}"
)


def _row(item_id: str = "a", **fields: Any) -> dict[str, Any]:
    shares = (70.0, 0.0, 0.0, 20.0, 0.0, 0.0, 10.0)
    return {
        "id": item_id,
        "foundation": "Care (e)",
        "foundation_coarse": "Care",
        "wrong": 3.5,
        "text": f"Somebody locks cat {item_id} out in the snow.",
        "ai_Care": 50.0,
        **{f"human_{name}": share for name, share in zip(COLUMNS, shares, strict=True)},
    } | fields


def _without(row: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in fields}


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _pair(folder: Path, other: list[Any], own: list[Any]) -> list[Path]:
    return [
        _write(folder / "x_other_violate.jsonl", other),
        _write(folder / "x_self_violate.jsonl", own),
    ]


def test_a_row_becomes_an_item(tmp_path: Path) -> None:
    rows = [_row("a"), _row("b", foundation_coarse="Social Norms")]
    first, second = read_items([_write(tmp_path / "rows.jsonl", rows)], FOUNDATIONS)
    assert (first.id, first.label, first.perspective, first.conflict) == ("a", "care", "other", 0)
    assert first.text == "Somebody locks cat a out in the snow."
    assert first.human == pytest.approx(
        {"care": 0.7, "authority": 0.2, "social_norms": 0.1}
        | dict.fromkeys(("fairness", "loyalty", "sanctity", "liberty"), 0.0)
    )
    assert second.label == "social_norms"


@pytest.mark.parametrize(
    "written", ["Social Norms", "SocialNorms", "social_norms", " social norms"]
)
def test_a_foundation_is_matched_however_it_is_written(tmp_path: Path, written: str) -> None:
    path = _write(tmp_path / "rows.jsonl", [_row(foundation_coarse=written)])
    assert read_items([path], FOUNDATIONS)[0].label == "social_norms"


@pytest.mark.parametrize("written", [83, 83.0, "83", "83 %", "83%", " 83.0 % "])
def test_percentages_as_number_and_as_text(tmp_path: Path, written: object) -> None:
    row = _row(human_Care=written, human_Authority=17, human_SocialNorms=0)
    (item,) = read_items([_write(tmp_path / "rows.jsonl", [row])], FOUNDATIONS)
    assert item.human is not None
    assert item.human["care"] == pytest.approx(0.83)


@pytest.mark.parametrize("care", [68.0, 72.0, 65.0, 75.0])
def test_shares_off_by_rounding_are_made_to_sum_to_one(tmp_path: Path, care: float) -> None:
    (item,) = read_items([_write(tmp_path / "rows.jsonl", [_row(human_Care=care)])], FOUNDATIONS)
    assert item.human is not None
    assert math.fsum(item.human.values()) == pytest.approx(1, abs=1e-15)
    assert item.human["authority"] == pytest.approx(20 / (care + 30))


@pytest.mark.parametrize("gap", ["absent", "null"])
def test_no_human_columns_no_human_labels(tmp_path: Path, gap: str) -> None:
    columns = [f"human_{name}" for name in COLUMNS]
    row = _without(_row(), *columns) if gap == "absent" else _row() | dict.fromkeys(columns)
    assert read_items([_write(tmp_path / "rows.jsonl", [row])], FOUNDATIONS)[0].human is None


def test_perspective_is_told_by_the_name_of_the_file(tmp_path: Path) -> None:
    items = read_items(_pair(tmp_path, [_row("a"), _row("b")], [_row("b"), _row("a")]), FOUNDATIONS)
    found = [(item.id, item.perspective) for item in items]
    assert found == [("a", "other"), ("b", "other"), ("b", "self"), ("a", "self")]


def test_blank_lines_a_mark_at_the_front_and_odd_separators_are_no_rows(tmp_path: Path) -> None:
    """A line separator inside a text (U+2028) ends no line of a JSONL file."""
    rows = [_row("a", text="One\u2028two."), _row("b")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join([*lines, ""]).encode())
    first, second = read_items([path], FOUNDATIONS)
    assert (first.text, second.id) == ("One\u2028two.", "b")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (_row(foundation_coarse="Purity"), "foundation_coarse: 'Purity' is none of ['care',"),
        (_without(_row(), "foundation_coarse"), "foundation_coarse: missing, a text"),
        (_row(text="  "), "text: '  ', a text that is not empty is expected"),
        (_without(_row(), "text"), "text: missing, a text that is not empty is expected"),
        (_row(id=7), "id: 7, a text that is not empty is expected"),
        (_row(id=""), "id: '', a text that is not empty is expected"),
        (
            _without(_row(), "human_Liberty", "human_SocialNorms"),
            "human_Liberty, human_SocialNorms: missing; a percentage for every",
        ),
        (_row(human_Care=None), "human_Care: missing; a percentage for every"),
        (_row(human_Care="many"), "human_Care: 'many', a percentage from 0 to 100 is expected"),
        (_row(human_Care="70,0"), "human_Care: '70,0', a percentage from 0 to 100 is expected"),
        (_row(human_Care=""), "human_Care: '', a percentage"),
        (_row(human_Care=True), "human_Care: True, a percentage"),
        (_row(human_Care=[70]), "human_Care: [70], a percentage"),
        (_row(human_Care=-3), "human_Care: -3, a percentage"),
        (_row(human_Care="-3"), "human_Care: '-3', a percentage"),
        (_row(human_Care=101), "human_Care: 101, a percentage"),
        (_row(human_Care=math.nan), "human_Care: nan, a percentage"),
        (_row(human_Care=math.inf), "human_Care: inf, a percentage"),
        (_row(human_Care=0.7), "human columns: the shares sum to 0.307, 1 is expected, give"),
        (_row(human_Care=64), "human columns: the shares sum to 0.94, 1 is expected"),
        (_row(human_Care=76), "human columns: the shares sum to 1.06, 1 is expected"),
        (["care"], "['care'] is no JSON object with the columns as keys"),
        ("x" * 500, "'xxx"),
    ],
)
def test_an_error_names_file_row_field_value_and_what_is_expected(
    tmp_path: Path, row: object, says: str
) -> None:
    path = _write(tmp_path / "rows.jsonl", [_row("first"), row])
    with pytest.raises(SuiteError) as caught:
        read_items([path], FOUNDATIONS)
    assert str(caught.value).startswith(f"{path}: row 2: {says}")
    assert len(str(caught.value)) < len(str(path)) + 250


def test_rows_are_counted_as_an_editor_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(_row()) + "\n\n\n{'id': 'b'}\n")
    with pytest.raises(SuiteError) as caught:
        read_items([path], FOUNDATIONS)
    assert str(caught.value).startswith(f"{path}: row 4: not JSON (")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SuiteError) as caught:
        read_items([path], FOUNDATIONS)
    assert str(caught.value) == f"{path}: empty; one JSON object a line is expected"


def test_what_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(SuiteError, match=r"rows\.jsonl: row 1: not JSON \(.*utf-8"):
        read_items([path], FOUNDATIONS)


def test_no_such_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"gone\.jsonl: no such file; give a JSONL file"):
        read_items([tmp_path / "gone.jsonl"], FOUNDATIONS)
    with pytest.raises(SuiteError, match=r": a folder; give the JSONL files"):
        read_items([tmp_path], FOUNDATIONS)


def test_an_id_twice_in_one_perspective_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", [_row("a"), _row("b"), _row("a")])
    with pytest.raises(SuiteError) as caught:
        read_items([path], FOUNDATIONS)
    assert str(caught.value) == f"{path}: row 3: id: 'a' is there already ({path}: row 1)"
    again = _write(tmp_path / "more.jsonl", [_row("b")])
    with pytest.raises(SuiteError, match=r"more\.jsonl: row 1: id: 'b' is there already"):
        read_items([_write(path, [_row("a"), _row("b")]), again], FOUNDATIONS)


@pytest.mark.parametrize(
    ("other", "own", "says"),
    [
        (["a", "b"], ["a"], "x_other_violate.jsonl: row 2: id: 'b' is there as 'other' but not"),
        (["a"], ["a", "b", "c"], "x_self_violate.jsonl: row 2: id: 'b' is there as 'self' but not"),
    ],
)
def test_ids_that_have_no_partner_are_refused(
    tmp_path: Path, other: list[str], own: list[str], says: str
) -> None:
    paths = _pair(tmp_path, [_row(name) for name in other], [_row(name) for name in own])
    with pytest.raises(SuiteError) as caught:
        read_items(paths, FOUNDATIONS)
    assert says in str(caught.value)


# --- the suite that is shipped, and its data set on the Hub ---


def _serve(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """In the place of the Hub; returns the calls that were made."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> Any:
        calls.append(arguments)
        return answer()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def _splits() -> dict[str, datasets.Dataset]:
    rows = {
        "self_violate": [_row("a", text="You lock it out."), _row("b")],
        "other_violate": [_row("a"), _row("b")],
    }
    return {name: datasets.Dataset.from_list(found) for name, found in rows.items()}


@pytest.mark.parametrize(
    ("name", "config"),
    [("tinymfv", "classic"), ("tinymfv:scifi", "scifi"), ("tinymfv:ai-actor", "ai-actor")],
)
def test_the_shipped_suite_takes_its_items_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, config: str
) -> None:
    calls = _serve(monkeypatch, _splits)
    suite = load_suite(name)
    assert calls == [("wassname/tiny-mfv", config)]
    assert (suite.name, suite.foundations) == (name, FOUNDATIONS)
    assert [(item.id, item.perspective) for item in suite.items] == [
        ("a", "other"),
        ("b", "other"),
        ("a", "self"),
        ("b", "self"),
    ]
    assert suite.items[2].text == "You lock it out."


def test_a_hub_that_cannot_be_reached_is_one_clear_message(tmp_path: Path) -> None:
    """The real client, told to stay offline, with nothing of the data set on this machine."""
    with pytest.raises(SuiteError) as caught:
        load_suite("tinymfv:no-such-config")
    message = str(caught.value)
    assert message.startswith(
        "dataset 'wassname/tiny-mfv', config 'no-such-config': cannot be read ("
    )
    assert "check the connection and the config's name, or give JSONL files" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        ValueError("BuilderConfig 'x' not found.\nAvailable: ['classic', 'scifi', 'ai-actor']"),
        ConnectionError(""),
        RuntimeError("of another library"),
    ],
)
def test_whatever_the_hub_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail() -> None:
        raise error

    _serve(monkeypatch, fail)
    with pytest.raises(SuiteError) as caught:
        load_suite("tinymfv")
    reason = str(error).split("\n")[0] or "ConnectionError"
    assert f"config 'classic': cannot be read ({reason}); check" in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_data_set_without_the_splits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, lambda: {"train": datasets.Dataset.from_list([_row()])})
    with pytest.raises(SuiteError, match=r"no split 'other_violate' among \['train'\]"):
        load_suite("tinymfv")


def test_a_bad_row_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = datasets.Dataset.from_list([_row("a"), _row("b", human_Care=None)])
    _serve(monkeypatch, lambda: _splits() | {"self_violate": bad})
    with pytest.raises(SuiteError, match=r"split 'self_violate': row 2: human_Care: missing"):
        load_suite("tinymfv")


def test_files_stand_in_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _serve(monkeypatch, _splits)
    suite = load_suite("tinymfv", items=_pair(tmp_path, [_row("z")], [_row("z")]))
    assert [item.id for item in suite.items] == ["z", "z"]
    assert calls == []


def test_files_stand_in_for_items_of_the_suite(tmp_path: Path, suite_data: dict[str, Any]) -> None:
    suite_data["options"]["social_norms"] = suite_data["options"].pop("norms")
    del suite_data["items"][4]  # labelled norms
    path = tmp_path / "own.json"
    path.write_text(json.dumps(suite_data))
    suite = load_suite(path, items=[_write(tmp_path / "rows.jsonl", [_row("z")])])
    assert [item.id for item in suite.items] == ["z"]
    assert suite.question == suite_data["question"]


def test_a_loaded_suite_is_the_same_after_saving(tmp_path: Path) -> None:
    rows = [_row(str(care), human_Care=care) for care in (66.0, 69.0, 70.0, 71.3, 74.0)]
    suite = load_suite("tinymfv", items=[_write(tmp_path / "rows.jsonl", rows)])
    assert ForcedChoiceSuite.model_validate_json(suite.model_dump_json()) == suite


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        ({"source": {"dataset": "a/b", "config": "c"}}, "", "items and source are both there"),
        ({"items": None}, "", "neither items nor source is there"),
        ({"items": None, "source": {"dataset": "a/b"}}, "", "source.config: Field required"),
        ({"items": None, "source": "a/b"}, "", "source: Input should be"),
        ({}, ":scifi", "the items have no source, so that there is no config 'scifi'"),
    ],
)
def test_where_items_come_from_is_said_once(
    tmp_path: Path, suite_data: dict[str, Any], change: dict[str, Any], config: str, says: str
) -> None:
    path = tmp_path / "own.json"
    fields = {key: value for key, value in (suite_data | change).items() if value is not None}
    path.write_text(json.dumps(fields))
    with pytest.raises(SuiteError) as caught:
        load_suite(f"{path}{config}")
    assert str(caught.value).startswith(f"{path}: {says}")


def test_a_config_and_files_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"config 'scifi' and files of items are given"):
        load_suite("tinymfv:scifi", items=[_write(tmp_path / "rows.jsonl", [_row()])])


def test_a_colon_with_nothing_after_it_is_no_suite() -> None:
    with pytest.raises(SuiteError, match="no suite 'tinymfv:'"):
        load_suite("tinymfv:")


def test_tasks_take_no_vignettes(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="tasks or neutral text takes no items and no config"):
        load_suite("organism_mundane", TaskSuite, [_write(tmp_path / "rows.jsonl", [_row()])])


def _human(data: dict[str, Any], **change: Any) -> None:
    shares = dict.fromkeys(data["options"], 0.0) | {"care": 0.75, "norms": 0.25} | change
    data["items"][1]["human"] = {key: value for key, value in shares.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"care": 0.5}, "items[1].human: the shares sum to 0.75, 1 is expected, give or take 0.05"),
        ({"care": -0.25, "loyalty": 1.0}, "items[1].human: 'care' is -0.25, a share from 0 to 1"),
        ({"care": math.nan}, "items[1].human: 'care' is nan, a share from 0 to 1 is expected"),
        ({"honesty": 0.0}, "items[1].human: shares of ['care',"),
        ({"loyalty": None}, "items[1].human: shares of ['care',"),
    ],
)
def test_shares_of_people_in_a_suite_are_checked(
    tmp_path: Path, suite_data: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    _human(suite_data)
    sound = ForcedChoiceSuite.model_validate(suite_data).items[1].human
    assert sound == dict.fromkeys(suite_data["options"], 0.0) | {"care": 0.75, "norms": 0.25}
    _human(suite_data, **change)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(suite_data))
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_an_id_is_there_once_a_perspective(suite_data: dict[str, Any]) -> None:
    suite_data["items"].append(suite_data["items"][0] | {"perspective": "self"})
    suite = ForcedChoiceSuite.model_validate(suite_data)
    assert [item.perspective for item in suite.items] == ["other"] * 5 + ["self"]
    suite_data["items"].append(suite_data["items"][-1])
    with pytest.raises(ValueError, match=r"items\[6\]\.id: 'kick' is there twice"):
        ForcedChoiceSuite.model_validate(suite_data)


def test_the_shipped_wording_names_no_foundation_twice_and_ends_at_the_digit() -> None:
    fields = json.loads((eval.suite.SUITES_FOLDER / "tinymfv.json").read_text(encoding="utf-8"))
    assert tuple(fields["options"]) == FOUNDATIONS
    assert len(set(fields["options"].values())) == 7
    assert fields["prefill"].endswith('"')
    lines = [
        fields["schema_line"].format(index=index, option=text)
        for index, text in enumerate(fields["options"].values())
    ]
    schema = fields["schema_head"] + "\n".join(lines) + fields["schema_tail"]
    body = schema[schema.index("{") :].split("\n")
    plain = "\n".join(line.split(" //")[0] for line in body)  # JSON with comments
    enumeration = json.loads(plain.replace(",\n      ]", "\n      ]"))["properties"]["foundation"]
    assert enumeration == {"enum": [str(index) for index in range(7)]}
    assert json.loads(fields["prefill"] + '3"}') == {"foundation": "3"}


# --- the published vignettes, where they are ---


@published
def test_published_vignettes_are_read_whole() -> None:
    suite = load_suite("tinymfv", items=sorted(PUBLISHED.glob("*classic*.jsonl")))
    others = [item for item in suite.items if item.perspective == "other"]
    own = [item for item in suite.items if item.perspective == "self"]
    assert [item.id for item in others] == [item.id for item in own]
    counts = dict(zip(FOUNDATIONS, (32, 17, 16, 17, 17, 17, 16), strict=True))
    assert Counter(item.label for item in others) == counts
    for item in suite.items:
        assert item.human is not None
        assert math.fsum(item.human.values()) == pytest.approx(1, abs=1e-12)
        assert max(item.human, key=lambda name: item.human[name]) == item.label  # type: ignore[index]
    assert all(one.human == two.human for one, two in zip(others, own, strict=True))
    assert ForcedChoiceSuite.model_validate_json(suite.model_dump_json()) == suite
