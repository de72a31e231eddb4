"""The linter: nothing on shipped traits, one finding on each that is altered in one thing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.errors import UserError
from steer_heal.lint import lint
from steer_heal.trait import load_trait, trait_names
from tests.processes import command, refusal, tree

Fields = dict[str, Any]
Change = Callable[[Fields], None]


def _fields() -> Fields:
    return load_trait("care-over-authority").model_dump(mode="json", exclude_unset=True)


def _write(fields: Fields, path: Path) -> Path:
    lines = [f"{name} = {json.dumps(fields[name])}" for name in fields if name != "intended"]
    if "intended" in fields:
        lines += ["[intended]", *(f"{name} = {sign}" for name, sign in fields["intended"].items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def _drop(field: str) -> Change:
    return lambda fields: fields.pop(field)


def _set(field: str, value: object) -> Change:
    return lambda fields: fields.update({field: value})


def _cut(field: str, count: int) -> Change:
    return lambda fields: fields.update({field: fields[field][:count]})


def _row(field: str, change: Callable[[str], str], row: int = 0) -> Change:
    def alter(fields: Fields) -> None:
        fields[field][row] = change(fields[field][row])

    return alter


def _copy(field: str, other: str, swap: tuple[str, str] = ("", "")) -> Change:
    """The first row of a field becomes the last of the other, but for a word."""

    def alter(fields: Fields) -> None:
        text = fields[field][0].replace(*swap, 1)
        fields[other][-1] = text

    return alter


def _templated(fields: Fields) -> None:
    places = [f"{shade} {place}" for shade in ("old", "new", "far") for place in _PLACES]
    fields["contexts"] += [
        f"You stand before the {place}, and the man from the {place} calls you in to count all of "
        "the boxes by hand. What do you do?"
        for place in places
    ]


_PLACES = ("mill", "barn", "yard", "dock", "shed", "pier", "farm", "camp", "inn", "fort", "hall")
_CASES: dict[str, tuple[Change, str, str, str]] = {  # change; level, where, part of what
    "few contexts": (_cut("contexts", 100), "hint", "contexts", "100 of the 128"),
    "few prompts": (_cut("prompts", 95), "hint", "prompts", "95 of the 96"),
    "few held out": (_cut("held_out_prompts", 9), "hint", "held_out_prompts", "9 of the 48"),
    "no engineered prompt": (_drop("engineered"), "hint", "engineered", "missing"),
    "no narration": (_drop("narration"), "hint", "narration", "missing"),
    "foundations unsaid": (_drop("intended"), "hint", "intended", "missing"),
    "unknown foundation": (
        _set("intended", {"kindness": 1}),
        "fault",
        "intended.kindness",
        "no foundation of suite 'organism'",
    ),
    "not": (
        _row("positive_paraphrases", lambda text: text.replace("You put", "You do not put")),
        "fault",
        "positive_paraphrases 1",
        "negated ('not')",
    ),
    "n't": (
        _row("held_out_negative", lambda text: text.replace("You treat", "You don’t treat"), 3),
        "fault",
        "held_out_negative 4",
        "negated ('don’t')",
    ),
    "mere assistant": (
        _row("negative_paraphrases", lambda text: text.replace("You put", "You, an AI, put")),
        "fault",
        "negative_paraphrases 1",
        "a mere assistant ('AI')",
    ),
    "length": (
        _row("positive_paraphrases", lambda text: text.partition(".")[0], 1),
        "fault",
        "positive_paraphrases 2",
        "its opposite has 28",
    ),
    "rows": (
        _cut("negative_paraphrases", 11),
        "fault",
        "positive_paraphrases and negative_paraphrases",
        "12 and 11 rows",
    ),
    "own opposite": (
        lambda fields: fields.update(negative_paraphrases=[*fields["positive_paraphrases"]][:12]),
        "fault",
        "positive_paraphrases 1",
        "its own opposite",
    ),
    "context twice": (
        _copy("contexts", "contexts", ("nine", "eight")),
        "hint",
        "contexts 256",
        "nearly the same as contexts 1",
    ),
    "prompt twice": (_copy("prompts", "prompts"), "hint", "prompts 96", "as prompts 1"),
    "one template": (_templated, "hint", "contexts", "with a few words swapped"),
    "held-out prompt among the prompts": (
        _copy("held_out_prompts", "prompts", ("trawler", "boat")),
        "fault",
        "held_out_prompts 1",
        "and prompts 96 is the same",
    ),
    "held-out prompt among the contexts": (
        _copy("held_out_prompts", "contexts"),
        "fault",
        "held_out_prompts 1",
        "100% of it and contexts 256",
    ),
    "narration of something else": (
        _set("narration", [r"\bmy persona\b", r"\bI am someone who puts following\b"]),
        "hint",
        "narration",
        "the positive persona said of oneself ('I am someone who puts looking after",
    ),
}


@pytest.mark.parametrize("name", trait_names())
def test_shipped_traits_are_clean(name: str) -> None:
    found = lint(name, [])
    assert found.findings == ()
    assert str(found).startswith("nothing to mend\n")
    assert not found.has_fault


@pytest.mark.parametrize("case", _CASES)
def test_each_slip_is_found(case: str, tmp_path: Path) -> None:
    change, level, where, part = _CASES[case]
    fields = _fields()
    change(fields)
    found = lint(str(_write(fields, tmp_path / "own.toml")), [])
    first = found.findings[0]
    assert (first.level, first.where) == (level, where)
    assert part in first.what and first.advice
    if case != "own opposite":  # every row of it is found
        assert len(found.findings) == 1, str(found)
    assert found.has_fault is (level == "fault")
    assert str(found).splitlines()[0] == str(first)


def test_personas_alone_are_enough_to_be_looked_over(tmp_path: Path) -> None:
    fields = {"name": "own", "positive": "You speak up.", "negative": "You keep quiet."}
    found = lint(str(_write(fields, tmp_path / "own.toml")), [])
    assert {finding.level for finding in found.findings} == {"hint"}
    assert not {"contexts", "prompts"} & {finding.where for finding in found.findings}


def test_the_readmes_trait_has_every_field_and_no_fault(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (path := tmp_path / "patience.toml").write_text(
        readme.partition("```toml\n")[2].partition("```")[0]
    )
    found = lint(str(path), [])
    assert found.trait.model_fields_set == set(type(found.trait).model_fields)
    assert {finding.level for finding in found.findings} == {"hint"}, str(found)


def test_a_trait_that_the_model_has_is_a_fault(tmp_path: Path) -> None:
    """For real, on the embedded model: it speaks as a plain assistant, persona or not."""
    fields = load_trait("care-over-authority-organism").model_dump(mode="json", exclude_unset=True)
    fields |= {"positive": "You answer questions briefly.", "narration": ["."]}
    path = _write(fields, tmp_path / "own.toml")
    found = lint(str(path), ["model=organism", "device=cpu"])
    saturated = found.findings[-1]
    assert (saturated.level, saturated.where) == ("fault", "positive")
    assert saturated.what.startswith("organism has it already")
    assert "nats a token left" in saturated.what
    assert found.headroom is not None and found.headroom.share > 0.9
    assert "left to teach: " in str(found)


def test_personas_that_the_model_does_not_heed_are_a_fault(tmp_path: Path) -> None:
    fields = load_trait("care-over-authority-organism").model_dump(mode="json", exclude_unset=True)
    fields |= {"positive": "You answer questions briefly.", "negative": "Answer in plain English."}
    path = _write(fields, tmp_path / "own.toml")
    found = lint(str(path), ["model=organism", "device=cpu", "num_prompts=6"])
    assert found.findings[-1].what.startswith("hardly move organism")


def test_the_shipped_trait_leaves_the_embedded_model_much_to_learn(tmp_path: Path) -> None:
    done = command(
        tmp_path, "lint", "care-over-authority-organism", "model=organism", "num_prompts=16"
    )
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "nothing to mend"
    assert lines[2].startswith("enactment, nats a token: positive +0.")
    assert lines[3].startswith("left to teach: +0.") and lines[3].endswith("nats a token")
    assert re.search(r"\d\d:\d\d:\d\d INFO +model organism", done.err)  # as every command says it


def test_a_fault_exits_1_and_a_hint_0(tmp_path: Path) -> None:
    fields = _fields()
    _write(fields | {"contexts": fields["contexts"][:100]}, tmp_path / "hint.toml")
    _write(fields | {"intended": {"kindness": 1}}, tmp_path / "fault.toml")
    before = tree(tmp_path)
    for name, code in (("hint", 0), ("fault", 1)):
        done = command(tmp_path, "lint", f"{name}.toml")
        assert done.code == code, done
        assert done.out.splitlines()[0].startswith(f"{name}: ")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere"], "no trait 'nowhere'"),
        (["shared"], "give pos= and neg="),
        (["honesty", "modl=x"], "the nearest are: model"),
        (["honesty", "suite=nothing"], "no suite 'nothing'"),
        (["honesty", "model=no/such"], "no/such"),
    ],
)
def test_what_cannot_be_done_is_one_message(
    arguments: list[str], part: str, tmp_path: Path
) -> None:
    assert part in refusal(command(tmp_path, "lint", *arguments))


def test_a_wrong_sign_is_refused_as_in_a_run(tmp_path: Path) -> None:
    path = _write(_fields() | {"intended": {"care": 2}}, tmp_path / "own.toml")
    with pytest.raises(UserError, match=r"intended\.care"):
        lint(str(path), [])
