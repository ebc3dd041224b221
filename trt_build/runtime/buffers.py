"""Memory on a card: buffers of a session that stay in place, and results that are given away."""

from __future__ import annotations

import contextlib

from fp4trt.errors import CannotRun
from trt_build.runtime.card import Card

__all__ = ["Allocation", "Buffers"]


class Allocation:
    """Memory that lives as long as this object, whoever holds it.

    It is given back to the driver, not kept for the next call: others may still compute with it, on streams that a
    session does not know and the driver waits for.
    """

    def __init__(self, card: Card, nbytes: int) -> None:
        self._card = card
        self.pointer = card.allocate(max(nbytes, 1))  # an address, though there may be nothing to hold

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, CannotRun):  # it was never allocated; or the driver ends first
            self._card.free(self.pointer)


class Buffers:
    """Memory by name that grows as calls need it."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._of: dict[str, tuple[int, Allocation]] = {}

    def of(self, name: str, nbytes: int) -> int:
        """Return the address of a buffer that holds so many bytes at least; it stays where it is as long as it does."""
        held, allocation = self._of.get(name, (0, None))
        if allocation is None or held < nbytes:
            self._of.pop(name, None)
            del allocation
            self._of[name] = (nbytes, Allocation(self._card, nbytes))
        return self._of[name][1].pointer

    def close(self) -> None:
        """Give all memory back."""
        self._of.clear()
