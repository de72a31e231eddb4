"""`KEY=VALUE` arguments to a validated config: nested keys with a dot, near misses named.

A config is a pydantic model whose fields have a line under each: errors quote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from eval.errors import UserError


class Settings(BaseModel):
    """A config: frozen, nothing unknown, described by the line under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


Device = Literal["auto", "cpu", "cuda", "mps"]
Config = TypeVar("Config", bound=BaseModel)
Given = dict[str, Any]


def resolve_settings(
    config: type[Config],
    arguments: Sequence[str],
    aliases: Mapping[str, str] | None = None,
    preset: Callable[[Given], Given] = lambda given: {},
    listed_by: str | None = None,
) -> Config:
    """The config that arguments make over a preset.

    Args:
        aliases: other names of keys.
        preset: from what is given (text, nested by section) to the values it stands on.
        listed_by: the command that lists every key; None where they are few enough to be named.
    Raises:
        UserError: an unknown key (with the nearest valid ones), one given twice, or a value that
            is not allowed.
    """
    aliases = aliases or {}
    values: dict[str, str] = {}
    names: dict[str, str] = {}  # key -> what it was called
    for argument in arguments:
        name, value = _split(config, argument)
        key = aliases.get(name, name)
        if key not in valid_keys(config):
            raise UserError(_unknown(name, [*aliases, *valid_keys(config)], listed_by))
        if key in values:
            other = f", once as {names[key]}" if names[key] != name else ""
            raise UserError(f"{name} is given twice{other}")
        values[key], names[key] = value, name
    given = _nested(config, values)
    try:
        return config.model_validate(_merged(preset(given), given))
    except ValidationError as error:
        raise UserError(_explain(config, error, values, names)) from error


def valid_keys(config: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that can be set, nested ones with a dot."""
    keys = []
    for name, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += valid_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def value_text(config: BaseModel, key: str) -> str:
    """A key's value as the command line takes it; nothing where it is not set."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    return ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)


def meaning(config: type[BaseModel], key: str) -> str:
    """What a key means."""
    return _field(config, key).description


def allowed(config: type[BaseModel], key: str) -> str:
    """What a key takes, as `a whole number, at least 1`."""
    field = _field(config, key)
    return _allowed(field.annotation, field.metadata)


def _allowed(kind: Any, limits: Sequence[Any]) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _allowed(inner[0], inner[1:])
    if origin in (Union, UnionType):
        return " or ".join(_allowed(each, limits) for each in inner if each is not type(None))
    if origin is Literal:
        return " or ".join(filter(None, [", ".join(inner[:-1]), inner[-1]]))
    if origin is tuple:
        one = _allowed(inner[0], ())  # as `a number, above 0`
        many = "paths" if inner[0] is Path else one.replace("a number", "numbers").replace(",", "")
        return f"{many} with commas between" if Ellipsis in inner else f"two {many}, as A,B"
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    bounds = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most"}
    found = [
        f"{bound} {getattr(each, name):g}"
        for each in limits
        for name, bound in bounds.items()
        if hasattr(each, name)
    ]
    if any(getattr(each, "min_length", 0) for each in limits):
        found.append("not empty")
    return ", ".join([words.get(kind, "text"), *found])


def nearest(key: str, names: list[str]) -> list[str]:
    """Up to three names that are alike, as a whole or without their section, the likest first."""

    def likeness(name: str) -> float:
        pairs = ((key, name), (key.split(".")[-1], name.split(".")[-1]))
        return max(SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)

    return [name for name in sorted(names, key=likeness, reverse=True)[:3] if likeness(name) > 0.6]


def _field(config: type[BaseModel], key: str) -> Any:
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
        section = section.model_fields[part].annotation
    return section.model_fields[name]


def _split(config: type[BaseModel], argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals:
        first = valid_keys(config)[0]
        example = f"{first}={_field(config, first).default}"
        raise UserError(f"{argument!r}: settings are given as KEY=VALUE, for example {example}")
    return key, value


def _unknown(name: str, valid: list[str], listed_by: str | None) -> str:
    """What to say of a key that there is not."""
    if near := nearest(name, valid):
        return f"unknown setting {name!r}; the nearest are: {', '.join(near)}"
    lists = f"`{listed_by}` lists them" if listed_by else f"there are: {', '.join(valid)}"
    return f"unknown setting {name!r}: no setting is near that; {lists}"


def _nested(config: type[BaseModel], values: Mapping[str, str]) -> Given:
    """Values by section, those of a tuple taken apart."""
    nested: Given = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        many = get_origin(_field(config, key).annotation) is tuple
        target[name] = value.split(",") if many else value
    return nested


def _merged(preset: Given, given: Given) -> Given:
    merged = dict(preset)
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(preset.get(key), dict)
        merged[key] = preset[key] | value if both else value
    return merged


def _explain(
    config: type[BaseModel],
    error: ValidationError,
    values: Mapping[str, str],
    names: Mapping[str, str],
) -> str:
    """One sentence a setting: what was given and what is allowed."""
    sentences: dict[str, str] = {}
    for problem in error.errors():
        key = _key(config, problem["loc"])
        if key in values:
            says_enough = problem["type"] in ("value_error", "finite_number")
            takes = _own(problem) if says_enough else f"expected {allowed(config, key)}"
            said = f"{names[key]} is {values[key]!r}: {takes} ({meaning(config, key)})"
        else:  # about several settings together
            said = _own(problem)
        sentences.setdefault(key, said)
    return "; ".join(sentences.values())


def _key(config: type[BaseModel], place: Sequence[int | str]) -> str:
    """The key of a place in a config; after it may stand an index, or one kind of several."""
    parts = [str(part) for part in place if not isinstance(part, int)]
    key = ".".join(parts[:2])
    return key if key in valid_keys(config) else ".".join(parts[:1])


def _own(problem: Any) -> str:
    return problem["msg"].removeprefix("Value error, ")
