"""What a user of this room can get wrong: one exception type per kind of mistake.

Every message is one line that says what was found, what was expected and what to do; the command line prints it and
exits with ``exit_code``.
"""

from __future__ import annotations

from fp4trt.errors import BadCheckpoint, UnknownFamily

__all__ = [
    "BadAmax",
    "BadCheckpoint",
    "BadInputs",
    "BadRecipe",
    "NoEffect",
    "NotReproduced",
    "OutputExists",
    "TooLittleSpace",
    "UnknownFamily",
    "UnsupportedLinear",
    "Untrusted",
]


class BadAmax(ValueError):
    """A calibration maximum is missing, zero, NaN or infinite."""

    exit_code = 2


class BadInputs(ValueError):
    """A file of captured transformer inputs or prompts cannot be used."""

    exit_code = 2


class BadRecipe(ValueError):
    """A recipe is unknown, damaged, or not for this model."""

    exit_code = 2


class NoEffect(ValueError):
    """A method was to change a model's weights, and has not."""

    exit_code = 2


class NotReproduced(ValueError):
    """A result does not compute what the model computes that it was made from: a check that failed."""

    exit_code = 1


class UnsupportedLinear(ValueError):
    """A linear that the recipe names cannot be stored in the format."""

    exit_code = 2


class OutputExists(ValueError):
    """The result would replace something that is already there."""

    exit_code = 2


class TooLittleSpace(ValueError):
    """The result does not fit on its disk."""

    exit_code = 2


class Untrusted(ValueError):
    """A pickle was given without the user's word that it may be run."""

    exit_code = 2
