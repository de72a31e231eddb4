"""What differs between two descriptions of a run, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def changes(before: dict[str, Any], now: dict[str, Any], free: Sequence[str]) -> list[str]:
    """What differs between two descriptions, as a person reads it; empty: nothing.

    Args:
        free: settings that may differ.
    """
    return _changed_settings(before, now, free) or _changed_contents(before, now)


def absent(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Settings that the old config does not have at all, by their keys."""
    for key, value in new.items():
        if key not in old:
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and isinstance(old[key], dict):
            yield from absent(old[key], value, f"{prefix}{key}.")


def _changed_settings(
    before: dict[str, Any], now: dict[str, Any], free: Sequence[str]
) -> list[str]:
    """Settings that differ and are not free to, as `heal.rank: 2 -> 3`."""
    return [
        f"{key}: {_short(old)} -> {_short(new)}"
        for key, old, new in _differences(before["config"], now["config"])
        if key not in free
    ]


def _changed_contents(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is another under the name that it had."""
    names = {"model": "the model's weights", "suites": "the items of the suites"}
    changed = [
        f"{name} have changed"
        for key, name in names.items()
        if key in now and before.get(key) != now[key]
    ]
    old, new = before.get("trait") or {}, now["trait"]
    if fields := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        changed.append(f"the trait file has changed in {', '.join(fields)}")
    return changed


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(set(old) | set(new)):
        left, right = old.get(key), new.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}", left, right
