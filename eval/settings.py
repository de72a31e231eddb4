"""`KEY=VALUE` arguments to a validated config: nested keys with a dot, near misses named.

A config is a pydantic model whose fields have a line under each: errors quote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal, TypeVar, get_origin

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
) -> Config:
    """The config that arguments make over a preset.

    Args:
        aliases: other names of keys.
        preset: from what is given (text, nested by section) to the values it stands on.
    Raises:
        UserError: an unknown key (with the nearest valid ones), one given twice, or a value that
            is not allowed.
    """
    given: Given = {}
    for argument in arguments:
        key, value = _split(config, argument, aliases or {})
        _assign(config, given, key, value)
    try:
        return config.model_validate(_merged(preset(given), given))
    except ValidationError as error:
        raise UserError(_explain(config, error)) from error


def valid_keys(config: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that can be set, nested ones with a dot."""
    keys = []
    for name, field in config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += valid_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def setting_lines(config: type[BaseModel]) -> list[str]:
    """Every key with its default and its meaning."""
    lines = []
    for key in valid_keys(config):
        field = _field(config, key)
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        lines.append(f"{key}={'' if default is None else default}\n    {field.description}")
    return lines


def _field(config: type[BaseModel], key: str) -> Any:
    *sections, name = key.split(".")
    section: Any = config
    for part in sections:
        section = section.model_fields[part].annotation
    return section.model_fields[name]


def _split(config: type[BaseModel], argument: str, aliases: Mapping[str, str]) -> tuple[str, str]:
    valid = valid_keys(config)
    key, equals, value = argument.partition("=")
    if not equals:
        example = f"{valid[0]}={_field(config, valid[0]).default}"
        raise UserError(f"{argument!r}: settings are given as KEY=VALUE, for example {example}")
    key = aliases.get(key, key)
    if key not in valid:
        near = ", ".join(_nearest(key, [*aliases, *valid]) or valid)
        raise UserError(f"unknown setting {key!r}; the nearest are: {near}")
    return key, value


def _nearest(key: str, names: list[str]) -> list[str]:
    """Up to three names that are alike, as a whole or without their section."""

    def likeness(name: str) -> float:
        pairs = ((key, name), (key.split(".")[-1], name.split(".")[-1]))
        return max(SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)

    return [name for name in sorted(names, key=likeness, reverse=True)[:3] if likeness(name) > 0.5]


def _assign(config: type[BaseModel], target: Given, key: str, value: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        target = target.setdefault(section, {})
    if name in target:
        raise UserError(f"{key} is given twice")
    many = get_origin(_field(config, key).annotation) is tuple
    target[name] = value.split(",") if many else value


def _merged(preset: Given, given: Given) -> Given:
    merged = dict(preset)
    for key, value in given.items():
        both = isinstance(value, dict) and isinstance(preset.get(key), dict)
        merged[key] = preset[key] | value if both else value
    return merged


def _explain(config: type[BaseModel], error: ValidationError) -> str:
    """One line a field: what was given and what is allowed."""
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"] if not isinstance(part, int)]
        given = f"{'.'.join(path)} is {problem['input']!r}: " if path else ""
        allowed = _field(config, ".".join(path)).description if path else None
        meaning = f" ({allowed})" if allowed else ""
        lines.append(f"{given}{problem['msg'].removeprefix('Value error, ')}{meaning}")
    return "; ".join(lines)
