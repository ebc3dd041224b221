"""JSON that others may have written or damaged: read as an object, its members checked before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp4trt.errors import BadCheckpoint, UnknownArtifact
from fp4trt.file_kind import what_it_is, what_it_lacks

__all__ = ["lists_of_strings", "load_json", "object_of", "read_object", "strings", "strings_by_name"]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        UnknownArtifact: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())  # of bytes it takes UTF-8 with and without a mark, and UTF-16
    except FileNotFoundError:
        raise UnknownArtifact(f"{path} {what_it_lacks(path)}; expected it to describe {path.parent}") from None
    except (ValueError, RecursionError) as error:
        kind = what_it_is(path) or f"is not JSON ({error}); copy it again"
        raise UnknownArtifact(f"{path} {kind}") from None
    if not isinstance(value, dict):
        raise UnknownArtifact(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def load_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from disk.

    Raises:
        BadCheckpoint: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())  # of bytes it takes UTF-8 with and without a mark, and UTF-16
    except FileNotFoundError:
        lacks = what_it_lacks(path)
        raise BadCheckpoint(f"{path} {lacks}; expected a diffusers checkpoint in {path.parent}") from None
    except (ValueError, RecursionError) as error:
        kind = what_it_is(path) or f"is not JSON ({error}); copy it again"
        raise BadCheckpoint(f"{path} {kind}") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


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
