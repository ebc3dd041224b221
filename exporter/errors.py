"""What a user of this room can get wrong: one exception type per kind of mistake; messages are one line."""

from __future__ import annotations

__all__ = ["BadGraph", "OutputExists"]


class OutputExists(ValueError):
    """The result would replace something that is already there."""

    exit_code = 2


class BadGraph(ValueError):
    """A graph does not have what this step needs."""

    exit_code = 2
