from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eval.suite
from eval.suite import ForcedChoiceSuite, SuiteError, TaskSuite, load_suite


def _write(folder: Path, data: Any, name: str = "broken") -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_a_file_is_read_as_it_is_written(tmp_path: Path, suite_data: dict[str, Any]) -> None:
    suite = load_suite(_write(tmp_path, suite_data))
    assert suite.foundations == tuple(suite_data["options"])
    assert [item.id for item in suite.items] == ["kick", "queue", "flag", "order", "soup"]
    assert suite.items[3].label is None and suite.items[3].conflict
    assert not suite.items[0].conflict
    assert suite.schema_tail == suite_data["schema_tail"]


def test_a_suite_is_found_by_name(
    tmp_path: Path, suite_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval.suite, "SUITES_FOLDER", tmp_path)
    _write(tmp_path, suite_data, "here")
    assert load_suite("here").name == "small"
    with pytest.raises(SuiteError, match=r"no suite 'there'.*\['here'\]"):
        load_suite("there")


def test_a_task_suite_is_read(tmp_path: Path) -> None:
    item = {"id": "t0", "kind": "sum", "prompt": "2 + 2?", "answer": "4"}
    suite = load_suite(_write(tmp_path, {"name": "tasks", "items": [item]}), TaskSuite)
    assert suite.items[0].model_dump() == item


def _without_text(data: dict[str, Any]) -> None:
    del data["items"][2]["text"]


def _without_question(data: dict[str, Any]) -> None:
    del data["question"]


def _duplicate_id(data: dict[str, Any]) -> None:
    data["items"][4]["id"] = "kick"


def _one_option(data: dict[str, Any]) -> None:
    data["options"] = {"care": "someone is harmed"}


def _eleven_options(data: dict[str, Any]) -> None:
    data["options"] = {str(index): "x" for index in range(11)}


def _unknown_label(data: dict[str, Any]) -> None:
    data["items"][1]["label"] = "honesty"


def _misspelt_field(data: dict[str, Any]) -> None:
    data["items"][1]["lable"] = "care"


def _number_for_text(data: dict[str, Any]) -> None:
    data["items"][3]["text"] = 7


def _no_items(data: dict[str, Any]) -> None:
    data["items"] = []


def _line_without_index(data: dict[str, Any]) -> None:
    data["schema_line"] = "- {option}"


def _line_with_single_brace(data: dict[str, Any]) -> None:
    data["schema_line"] = '{"index": {index}, "option": {option}'


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_text, "items[2].text: Field required"),
        (_without_question, "question: Field required"),
        (_duplicate_id, "items[4].id: 'kick' is there twice"),
        (_one_option, "options: 1 given"),
        (_eleven_options, "options: 11 given"),
        (_unknown_label, "items[1].label: 'honesty' is none of ['care',"),
        (_misspelt_field, "items[1].lable: Extra inputs are not permitted"),
        (_number_for_text, "items[3].text: Input should be a valid string"),
        (_no_items, "items: empty"),
        (_line_without_index, "schema_line: placeholders ['option'] instead of"),
        (_line_with_single_brace, "schema_line: "),
    ],
)
def test_an_error_names_file_row_and_field(
    tmp_path: Path, suite_data: dict[str, Any], spoil: Callable[[dict[str, Any]], None], says: str
) -> None:
    assert ForcedChoiceSuite.model_validate(suite_data)  # sound until spoilt
    spoil(suite_data)
    path = _write(tmp_path, suite_data)
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_a_duplicate_task_is_named(tmp_path: Path) -> None:
    item = {"id": "t0", "kind": "sum", "prompt": "2 + 2?", "answer": "4"}
    path = _write(tmp_path, {"name": "tasks", "items": [item, item]})
    with pytest.raises(SuiteError) as caught:
        load_suite(path, TaskSuite)
    assert str(caught.value) == f"{path}: items[1].id: 't0' is there twice"


@pytest.mark.parametrize("content", [b'{"name": "x",', b"", b'{"name": "\xff\xfe"}'])
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}: not JSON (")


def test_a_list_is_no_suite(tmp_path: Path, suite_data: dict[str, Any]) -> None:
    path = _write(tmp_path, [suite_data])
    with pytest.raises(SuiteError, match="valid dictionary") as caught:
        load_suite(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"nowhere\.json"):
        load_suite(tmp_path / "nowhere.json")
