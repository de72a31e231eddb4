"""Settings: what is taken, what is refused, and what the message says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from eval.errors import UserError
from eval.settings import valid_keys, value_text
from steer_heal.config import (
    RunConfig,
    describe_settings,
    resolve_config,
)


def _sections(config: type[BaseModel] = RunConfig) -> list[type[BaseModel]]:
    nested = [field.annotation for field in config.model_fields.values()]
    models = [kind for kind in nested if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [config, *models]


def test_every_field_is_described_by_the_line_under_it() -> None:
    for section in _sections():
        for name, field in section.model_fields.items():
            if field.annotation not in _sections():
                assert field.description, f"{section.__name__}.{name}"


def _listed() -> dict[str, tuple[str, str]]:
    """Key -> the rest of its line, and the text under it on one line."""
    blocks = re.findall(r"^([\w.]+)=(.*)\n((?:    .*\n?)+)", describe_settings(), re.MULTILINE)
    return {key: (rest, " ".join(text.split())) for key, rest, text in blocks}


def test_every_setting_is_listed_with_its_defaults_and_what_it_takes() -> None:
    listed = _listed()
    assert set(listed) == set(valid_keys(RunConfig))
    embedded, other = resolve_config([]), resolve_config(["model=some/model"])
    for key, (rest, _) in listed.items():
        ours, theirs = value_text(embedded, key), value_text(other, key)
        assert rest.startswith(ours)
        if key != "model":
            assert (f"(other models: {theirs})" in rest) is (ours != theirs)
    assert listed["heal.rank"] == (
        "8  (other models: 16)",
        "[a whole number, at least 1] Rank of the LoRA.",
    )
    assert listed["rounds"][0] == "3  (or N=3)"
    for key, takes in (
        ("heal.barrier_aggregate", "[rmse, mean, p95 or max]"),
        ("heal.barrier_reference", "[previous, base or last_good]"),
        ("heal.barrier_threshold_nats", "[auto or a number, at least 0]"),
        ("device", "[auto, cpu, cuda or mps]"),
        ("filter.quantile", "[a number, above 0.5, at most 1]"),
        ("heal.layers", "[two numbers, as A,B]"),
        ("generate.doses", "[auto or numbers above 0 with commas between]"),
        ("generate.dose_grid", "[two numbers, as A,B]"),
        ("generate.target_kl_nats", "[a number, above 0]"),
        ("pos", "[text, not empty]"),
    ):
        assert listed[key][1].startswith(takes)
    assert max(map(len, describe_settings().splitlines())) <= 100


@pytest.mark.parametrize(
    ("settings", "path", "expected"),
    [
        (["N=7"], "rounds", 7),
        (["rounds=7"], "rounds", 7),
        (["heal.rank=3"], "heal.rank", 3),
        (["generate.doses=0.1,0.2"], "generate.doses", (0.1, 0.2)),
        (["generate.doses=0.1"], "generate.doses", (0.1,)),
        (["generate.doses=auto"], "generate.doses", "auto"),
        (["model=some/model"], "generate.doses", "auto"),
        ([], "generate.doses", (0.35, 0.45)),
        (["generate.target_kl_nats=1.5"], "generate.target_kl_nats", 1.5),
        (["vector.band=0,1"], "vector.band", (0.0, 1.0)),
        (["heal.barrier_aggregate=p95"], "heal.barrier_aggregate", "p95"),
        (["heal.barrier_threshold_nats=auto"], "heal.barrier_threshold_nats", "auto"),
        (["heal.barrier_threshold_nats=0"], "heal.barrier_threshold_nats", 0.0),
        (["pos=a=b", "neg=c"], "pos", "a=b"),
        (["run=mine"], "run", "mine"),
    ],
)
def test_overrides_land_on_their_field(settings: list[str], path: str, expected: Any) -> None:
    value: Any = resolve_config(settings)
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_presets_depend_on_the_model_and_yield_to_overrides() -> None:
    embedded, other = resolve_config([]), resolve_config(["model=some/model"])
    assert (embedded.model, embedded.trait) == ("organism", "care-over-authority-organism")
    assert (other.model, other.trait) == ("some/model", "care-over-authority")
    assert embedded.heal.rank < other.heal.rank
    assert other.generate.max_new_tokens > embedded.generate.max_new_tokens
    personas = ["pos=You are bold.", "neg=You are shy."]
    assert resolve_config(["model=some/model", *personas]).trait == "shared"
    assert resolve_config(["model=some/model", *personas, "trait=mine.toml"]).trait == "mine.toml"
    assert resolve_config(personas).trait == embedded.trait  # it knows its own world alone
    both = resolve_config(["model=some/model", "generate.batch_size=3", "trait=mine.toml"])
    assert (both.generate.batch_size, both.trait) == (3, "mine.toml")
    assert both.generate.max_new_tokens == other.generate.max_new_tokens  # the preset's rest stays
    assert resolve_config(["heal.rank=5"]).heal.layers == embedded.heal.layers


def test_config_is_frozen_and_comes_back_from_json() -> None:
    config = resolve_config(["heal.rank=3", "generate.doses=0.1,0.3"])
    with pytest.raises(ValidationError):
        config.heal.rank = 4  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.rounds = 4  # type: ignore[misc]
    saved = json.loads(json.dumps(config.model_dump(mode="json")))
    assert RunConfig.model_validate(saved) == config


@pytest.mark.parametrize(
    ("setting", "suggested"),
    [
        ("heal.barier_weight=1", "heal.barrier_weight"),
        ("barrier_weight=0.3", "heal.barrier_weight"),
        ("dose=0.1", "generate.doses"),
        ("round=3", "rounds"),
        ("heal.ranks=3", "heal.rank"),
        ("temperature=1", "generate.temperature"),
        ("n=3", ": N"),
        ("heal=3", "heal."),
    ],
)
def test_unknown_setting_names_the_nearest(setting: str, suggested: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_config([setting])
    message = str(caught.value)
    assert message.startswith(f"unknown setting {setting.partition('=')[0]!r}; the nearest are: ")
    assert suggested in message


@pytest.mark.parametrize("name", ["zzzz", "bogus"])
def test_unknown_setting_that_is_near_none_says_where_they_are_listed(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_config([f"{name}=1"])
    assert str(caught.value) == (
        f"unknown setting {name!r}: no setting is near that; `just settings` lists them"
    )


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("heal.rank=0", ["heal.rank is '0': expected a whole number, at least 1 (Rank of the"]),
        ("rounds=three", ["rounds is 'three': expected a whole number, at least 1"]),
        ("N=0", ["N is '0': expected a whole number, at least 1"]),
        ("N=2.5", ["N is '2.5': expected a whole number"]),
        ("heal.barrier_aggregate=median", ["'median': expected rmse, mean, p95 or max"]),
        ("device=tpu", ["device is 'tpu': expected auto, cpu, cuda or mps"]),
        (
            "generate.doses=0.1,x",
            ["generate.doses is '0.1,x': expected auto or numbers above 0 with"],
        ),
        ("generate.doses=", ["generate.doses is '': expected auto or numbers above 0 with"]),
        ("generate.doses=-1", ["generate.doses is '-1': expected auto or numbers above 0 with"]),
        ("filter.num_kept=4", ["filter.min_kept is 8, more than filter.num_kept (4)"]),
        ("generate.dose_grid=0,1", ["generate.dose_grid is '0,1'", "two doses above 0"]),
        ("generate.dose_grid=1,0.1", ["generate.dose_grid is '1,0.1'", "the lower one first"]),
        ("generate.temperature=nan", ["generate.temperature is 'nan'", "finite"]),
        ("heal.barrier_threshold_nats=car", ["is 'car': expected auto or a number, at least 0 (A"]),
        ("heal.barrier_threshold_nats=-0.1", ["is '-0.1': expected auto or a number, at least 0"]),
        ("heal.barrier_threshold_nats=nan", ["is 'nan': expected auto or a number, at least 0"]),
        ("heal.barrier_threshold_nats=", ["is '': expected auto or a number, at least 0"]),
        ("heal.learning_rate=inf", ["heal.learning_rate is 'inf'", "finite"]),
        ("vector.band=0.6,0.4", ["vector.band is '0.6,0.4'", "the lower one first"]),
        ("heal.layers=2,5", ["heal.layers is '2,5'", "shares from 0 to 1"]),
        ("heal.layers=0.5", ["heal.layers is '0.5': expected two numbers, as A,B (Layers that"]),
        ("heal.layers=0,0.5,1", ["heal.layers is '0,0.5,1': expected two numbers"]),
        ("seed=-1", ["seed is '-1': expected a whole number, at least 0"]),
        ("run=", ["run is ''", "a name is made of letters"]),
        ("run=..", ["run is '..'", "a name is made of letters"]),
        ("run=a/b", ["run is 'a/b'", "a name is made of letters", "folder="]),
        ("run=../x", ["run is '../x'", "a name is made of letters", "folder="]),
        ("run=a b", ["run is 'a b'", "a name is made of letters"]),
        ("pos=kind", ["pos and neg: give both personas or none"]),
        ("neg=cold", ["pos and neg: give both personas or none"]),
        ("rounds", ["'rounds'", "KEY=VALUE", "rounds=3"]),
    ],
)
def test_bad_value_names_field_value_and_what_is_allowed(setting: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_config([setting])
    message = str(caught.value)
    assert "\n" not in message
    assert not message.startswith(":")
    assert "Value error" not in message
    assert message.count(" is '") <= 1  # a setting is named once
    for part in parts:
        assert part in message


def test_a_persona_that_is_its_own_opposite_is_refused() -> None:
    with pytest.raises(UserError, match="pos and neg are the same"):
        resolve_config(["pos=You are kind.", "neg=You are kind."])


def test_empty_personas_are_refused() -> None:
    with pytest.raises(UserError, match=r"pos is ''.*neg is ''"):
        resolve_config(["pos=", "neg="])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["seed=1", "seed=2"], "seed is given twice"),
        (["N=1", "N=0"], "N is given twice"),
        (["N=1", "rounds=2"], "rounds is given twice, once as N"),
    ],
)
def test_same_key_twice_is_refused_by_the_name_it_was_given(
    settings: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve_config(settings)
    assert str(caught.value) == message


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        resolve_config(["heal.rank=0", "seed=x"])
    assert "heal.rank" in str(caught.value)
    assert "seed" in str(caught.value)
