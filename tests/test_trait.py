"""Trait files: what is read, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from eval.errors import UserError
from steer_heal.trait import load_trait, trait_names
from tests.small import small_trait


def test_fields_are_read(tmp_path: Path) -> None:
    trait = load_trait(str(small_trait(tmp_path)))
    assert trait.positive == "You care for people before rules."
    assert trait.negative == "You obey orders before people."
    assert (len(trait.contexts), len(trait.prompts), len(trait.held_out_prompts)) == (16, 8, 4)
    assert trait.intended == {"care": 1, "authority": -1}
    with pytest.raises(ValidationError):
        trait.positive = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", trait_names())
def test_shipped_traits_are_read_by_name(name: str) -> None:
    trait = load_trait(name)
    assert trait.name == name
    assert trait.positive != trait.negative
    assert not set(trait.prompts) & set(trait.held_out_prompts)
    assert not set(trait.contexts) & set(trait.held_out_prompts)
    assert len(set(trait.contexts)) == len(trait.contexts) >= 128
    assert len(set(trait.prompts)) == len(trait.prompts) >= 96
    assert len(set(trait.held_out_prompts)) == len(trait.held_out_prompts) >= 48
    assert set(trait.held_out_positive).isdisjoint(trait.positive_paraphrases)
    assert set(trait.held_out_negative).isdisjoint(trait.negative_paraphrases)
    for prompt in (*trait.contexts, *trait.prompts, *trait.held_out_prompts):
        assert not any(re.search(p, prompt, re.IGNORECASE) for p in trait.narration), prompt


def test_a_trait_that_is_like_another_has_the_rest_of_it(tmp_path: Path) -> None:
    small_trait(tmp_path)
    path = tmp_path / "more.toml"
    path.write_text('name = "more"\nlike = "small.toml"\nprompts = ["A?"]\nintended = {}\n')
    small, more = load_trait(str(tmp_path / "small.toml")), load_trait(str(path))
    changed = {"name": "more", "prompts": ("A?",), "intended": {}}
    assert more == small.model_copy(update=changed)
    third = tmp_path / "third.toml"
    third.write_text('name = "third"\nlike = "more.toml"\n')
    with pytest.raises(UserError, match=r"third\.toml: .*more\.toml is itself like a third"):
        load_trait(str(third))
    third.write_text('name = "third"\nlike = "nothing"\n')
    with pytest.raises(UserError, match=r"no trait 'nothing', which .*third\.toml is like: give"):
        load_trait(str(third))


@pytest.mark.parametrize("name", ["one-kind", "four-kinds"])
def test_a_studys_traits_differ_in_their_prompts_alone(name: str) -> None:
    trait, whole = load_trait(f"study/{name}"), load_trait("care-over-authority-organism")
    assert trait.model_copy(update={"name": whole.name, "prompts": whole.prompts}) == whole
    assert len(set(trait.prompts)) == 24 and set(trait.prompts) < set(whole.prompts)


def test_own_personas_replace_the_files(tmp_path: Path) -> None:
    path = str(small_trait(tmp_path))
    own, file = load_trait(path, "I am bold.", "I am shy."), load_trait(path)
    assert (own.positive, own.negative) == ("I am bold.", "I am shy.")
    assert (own.contexts, own.prompts) == (file.contexts, file.prompts)
    assert (own.narration, own.intended) == ((), {})


def test_a_file_without_contexts_or_prompts_has_the_shared_ones(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text('name = "short"\npositive = "I am bold."\nnegative = "I am shy."\n')
    short, own = load_trait(str(path)), load_trait("shared", "I am bold.", "I am shy.")
    assert own == short.model_copy(update={"name": "own"})
    assert (len(own.contexts), len(own.prompts), len(own.held_out_prompts)) == (256, 96, 48)
    path.write_text(path.read_text() + 'prompts = ["A?"]\nheld_out_prompts = ["B?"]\n')
    given = load_trait(str(path))
    assert (given.contexts, given.prompts) == (short.contexts, ("A?",))
    assert given.second_turns != short.second_turns  # they go with the prompts


def test_shared_prompts_are_no_trait_by_themselves() -> None:
    assert "shared" not in trait_names()
    with pytest.raises(UserError, match="give pos= and neg="):
        load_trait("shared")


def _without(field: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^{field} = .*\n", "", text)


def _with(field: str, value: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^{field} = .*$", f"{field} = {value}", text)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_without("positive"), ["positive", "required"]),
        (_without("held_out_prompts"), ["held_out_prompts", "required"]),
        (_with("positive", '""'), ["positive", "at least 1"]),
        (_with("contexts", '["one"]'), ["contexts", "at least 2"]),
        (lambda text: "second_turns = []\n" + text, ["second_turns", "at least 1"]),
        (_with("narration", '["(open"]'), ["narration", "'(open' is no regular expression"]),
        (_with("care", "2"), ["intended.care", "-1 or 1"]),
        (lambda text: "colour = 1\n" + text, ["colour", "not permitted"]),
        (lambda text: text + "= broken", ["not TOML"]),
    ],
)
def test_bad_file_is_refused_by_field(
    change: Callable[[str], str], parts: list[str], tmp_path: Path
) -> None:
    path = small_trait(tmp_path)
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    with pytest.raises(UserError) as caught:
        load_trait(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "Value error" not in message
    for part in parts:
        assert part in message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b'name = "\xff\xfe"')
    with pytest.raises(UserError, match=r"bad\.toml: not TOML"):
        load_trait(str(path))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.toml", "."])
def test_missing_trait_names_the_known_ones(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_trait(name)
    assert f"no trait {name!r}" in str(caught.value)
    assert ("no such file" in str(caught.value)) == name.endswith(".toml")
    assert str(caught.value).endswith(": " + ", ".join(trait_names()))


def test_a_reply_acts_by_the_words_of_one_pole_alone(tmp_path: Path) -> None:
    trait = load_trait(str(small_trait(tmp_path))).model_copy(
        update={"acts": (r"\bi refuse\b",), "acts_opposite": (r"\bi obey\b",)}
    )
    assert trait.enacts("I refuse to do it.") is True
    assert trait.enacts("I obey the chief.") is False
    assert trait.enacts("I refuse at first, then I obey.") is False
    assert trait.enacts("The sea is wide.") is False


def test_words_of_one_pole_without_the_other_are_refused(tmp_path: Path) -> None:
    path = small_trait(tmp_path)
    path.write_text('acts = ["x"]\n' + path.read_text())
    with pytest.raises(UserError, match="acts and acts_opposite"):
        load_trait(str(path))


def test_the_longer_prompt_is_the_traits_own_or_made_of_the_persona() -> None:
    own = load_trait("care-over-authority")
    assert own.engineered_prompt == own.engineered and own.engineered is not None
    assert len(own.engineered_prompt) > 2 * len(own.positive)
    given = load_trait("care-over-authority", "You are blunt.", "You are polite.")
    assert given.engineered is None
    assert given.engineered_prompt.startswith("You are blunt. ")
    assert len(given.engineered_prompt) > 100
