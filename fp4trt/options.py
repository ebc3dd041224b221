"""What a verb's options may be, held against them before any work as the command line holds its own.

The default of an option, which often is None, is always right.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Final, ParamSpec, TypeVar

from fp4trt.errors import BadOption

__all__ = [
    "LARGEST_SEED",
    "Allowed",
    "at_least",
    "each_at_least",
    "file_name",
    "file_names",
    "mapping",
    "names",
    "not_negative",
    "one_of",
    "seeds",
    "takes",
    "word",
]

P = ParamSpec("P")
T = TypeVar("T")

Allowed = Callable[[Any], str | None]
"""Given a value, returns what was expected in its place, or None where it is right."""

LARGEST_SEED: Final = (1 << 64) - 1
"""What torch takes."""


def takes(error: type[Exception] = BadOption, /, **allowed: Allowed) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that refuses, by name and in one line, a value that an option does not take.

    Args:
        error: what to raise.
        allowed: name of an option to what it takes.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*given: P.args, **options: P.kwargs) -> T:
            for name, value in signature.bind(*given, **options).arguments.items():
                if name not in allowed or value is signature.parameters[name].default:
                    continue
                if expected := allowed[name](value):
                    raise error(f"{name} is {value!r}; expected {expected}")
            return function(*given, **options)

        return call

    return decorate


def one_of(*choices: str) -> Allowed:
    """Allow any of some words."""
    return lambda value: None if isinstance(value, str) and value in choices else f"one of: {', '.join(choices)}"


def at_least(least: int) -> Allowed:
    """Allow a whole number that is not less."""
    return lambda value: None if _is_whole(value) and value >= least else f"a whole number, {least} at least"


def not_negative(value: Any) -> str | None:
    """Allow a number that is finite and not less than 0."""
    fit = isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
    return None if fit else "a number, 0 at least"


def word(example: str) -> Allowed:
    """Allow a text that is not empty."""
    return lambda value: None if isinstance(value, str) and value else f"a word such as {example!r}"


def each_at_least(least: int, example: Sequence[int]) -> Allowed:
    """Allow whole numbers that are not less, in a list."""
    one = at_least(least)
    expected = f"whole numbers, {least} at least, in a list, such as {list(example)}"
    return lambda value: None if _is_list(value) and not any(map(one, value)) else expected


def seeds(value: Any) -> str | None:
    """Allow whole numbers that torch takes as a seed, in a list."""
    fit = _is_list(value) and all(_is_whole(item) and 0 <= item <= LARGEST_SEED for item in value)
    return None if fit else "whole numbers from 0 to 2^64 - 1 in a list, such as [1000, 1001]"


def names(example: str) -> Allowed:
    """Allow a word, or words in a list."""

    def check(value: Any) -> str | None:
        fit = isinstance(value, str) or (_is_list(value) and all(isinstance(item, str) for item in value))
        return None if fit else f"{example!r}, or several such in a list"

    return check


def file_name(value: Any) -> str | None:
    """Allow the name of a file or folder."""
    return None if isinstance(value, str | os.PathLike) and value != "" else "the name of a file or folder"


def file_names(value: Any) -> str | None:
    """Allow the name of a file, or several in a list."""
    fit = not file_name(value) or (_is_list(value) and not any(map(file_name, value)))
    return None if fit else "the name of a file, or several in a list"


def mapping(example: Mapping[str, str]) -> Allowed:
    """Allow something by name."""
    return lambda value: None if isinstance(value, Mapping) else f"a mapping such as {dict(example)}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
