"""JSON that others may have written or damaged: read as an object, its members checked before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp4trt.errors import BadCheckpoint
from fp4trt.file_kind import is_file, what_it_is, what_it_lacks

__all__ = ["kind_of", "lists_of_strings", "load_json", "object_of", "strings", "strings_by_name"]


def load_json(path: Path, expected: str = "", error: type[Exception] = BadCheckpoint) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        path: the file.
        expected: what it should be, for the message; by default a part of a diffusers checkpoint.
        error: what to raise where it is missing or holds something else.

    Raises:
        BadCheckpoint: or `error`.
    """
    try:
        value = json.loads(path.read_bytes())  # of bytes it takes UTF-8 with and without a mark, and UTF-16
    except OSError:
        if is_file(path):  # which cannot be read
            raise
        wanted = expected or f"a diffusers checkpoint in {path.parent}"
        raise error(f"{path} {what_it_lacks(path)}; expected {wanted}") from None
    except (ValueError, RecursionError) as fault:
        remedy = f"expected {expected}" if expected else "copy it again"
        raise error(f"{path} {what_it_is(path) or f'is not JSON ({fault}); {remedy}'}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds {kind_of(value)}; expected {expected or 'an object'}")
    return value


def kind_of(value: Any) -> str:
    """Return what JSON and YAML call a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def object_of(value: Any, what: str) -> dict[str, Any]:
    """Return a JSON object as it is; a TypeError that names `what` for anything else."""
    if not isinstance(value, dict):
        raise TypeError(f"{what} is {_kind(value)}, expected an object")
    return value


def strings(value: Any, what: str) -> tuple[str, ...]:
    """Return a JSON list of strings; a TypeError that names `what` for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{what} is {_kind(value)}, expected a list of strings")
    return tuple(value)


def lists_of_strings(value: Any, what: str) -> tuple[tuple[str, ...], ...]:
    """Return a JSON list of lists of strings; a TypeError that names `what` for anything else."""
    if not isinstance(value, list):
        raise TypeError(f"{what} is {_kind(value)}, expected a list of lists of strings")
    return tuple(strings(item, f"a member of {what}") for item in value)


def strings_by_name(value: Any, what: str) -> dict[str, str]:
    """Return a JSON object whose members are strings; a TypeError that names `what` for anything else."""
    for name, item in object_of(value, what).items():
        if not isinstance(item, str):
            raise TypeError(f"{name!r} in {what} is {_kind(item)}, expected a string")
    return dict(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list of other things", str: "a string", type(None): "null"}
    return names.get(type(value), repr(value))
