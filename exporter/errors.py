"""What a user of this room can get wrong: one exception type per kind of mistake; messages are one line."""

from __future__ import annotations

from calibration.errors import OutputExists

__all__ = ["BadGraph", "OutputExists"]


class BadGraph(ValueError):
    """A graph does not have what this step needs."""

    exit_code = 2
