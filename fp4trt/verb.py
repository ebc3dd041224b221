"""What all verbs have in common: options by name, progress as a callback, a result object."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, ParamSpec, TypeVar

from fp4trt.progress import reporting

__all__ = ["FLAT", "PEOPLE", "Result", "verb"]

P = ParamSpec("P")
T = TypeVar("T")


def verb(function: Callable[P, T]) -> Callable[P, T]:
    """Return a verb that reports to its argument ``progress``, where it has one.

    Options given by position, as earlier versions took them, work for one more version with a warning.
    """
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    positional = sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())

    @functools.wraps(function)
    def call(*given: P.args, **options: P.kwargs) -> T:
        if len(given) > len(names):
            raise TypeError(f"{function.__name__}() takes {len(names)} arguments, but {len(given)} were given")
        if len(given) > positional:
            named = dict(zip(names[positional:], given[positional:], strict=False))
            if twice := [name for name in named if name in options]:
                raise TypeError(f"{function.__name__}() got multiple values for argument {twice[0]!r}")
            text = f"{function.__name__}: give {', '.join(named)} by name; by position works in this version only"
            warnings.warn(text, FutureWarning, stacklevel=2)
            options.update(named)
        with reporting(options.get("progress")):  # type: ignore[arg-type]
            return function(*given[:positional], **options)  # type: ignore[arg-type]

    return call


@dataclass(frozen=True, eq=False)
class Result(Mapping[str, Any]):
    """What a verb returns: attributes, which can be read as the items of a mapping too.

    The command line prints :meth:`as_dict` as JSON. An attribute whose field has the metadata ``flat``, a mapping,
    gives its own items there; one with ``people`` is for people and is left out.
    """

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        people = {field.name for field in fields(self) if field.metadata.get("people")}
        return {key: value for key, value in self._items().items() if key not in people}

    def _items(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            found |= value if field.metadata.get("flat") else {field.name: value}
        return found

    def __getitem__(self, key: str) -> Any:
        return self._items()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items())

    def __len__(self) -> int:
        return len(self._items())


FLAT: Final = {"flat": True}
PEOPLE: Final = {"people": True}
"""Metadata of a result's fields."""
