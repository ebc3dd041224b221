"""How an adapter is made: by the arguments of the diffusers class, which ``from_config`` looks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constructed_as"]

T = TypeVar("T", bound=type[Any])


def constructed_as(base: type[Any]) -> Callable[[T], T]:
    """Return a decorator that gives a class's constructor the signature of another's."""

    def decorate(cls: T) -> T:
        constructor: Any = cls.__init__
        constructor.__wrapped__ = base.__init__
        return cls

    return decorate
