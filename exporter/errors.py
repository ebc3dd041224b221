"""What a user of this room can get wrong: one exception type per kind of mistake; messages are one line."""

from __future__ import annotations

from calibration.errors import OutputExists

__all__ = ["BadGraph", "NoPlaceholders", "OutputExists", "WrongPrecision"]


class BadGraph(ValueError):
    """A graph does not have what this step needs."""

    exit_code = 2


class WrongPrecision(ValueError):
    """A plain checkpoint was given where a quantized one is expected, or the other way round."""

    exit_code = 2


class NoPlaceholders(ValueError):
    """A graph of other origin marks no weight for FP4."""

    exit_code = 2
