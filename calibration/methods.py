"""From a recipe's method to the function that quantizes a block."""

from __future__ import annotations

from calibration.preparation import Method
from calibration.recipe import PTQ
from calibration.recipe import Method as Options

__all__ = ["needs_activations", "of_block"]


def needs_activations(options: Options) -> bool:
    """Whether a method runs the model on captured inputs, or does with the maxima of the linears' inputs."""
    return not isinstance(options, PTQ)


def of_block(options: Options) -> Method:
    """Return what quantizes a block by a method that needs activations."""
    raise AssertionError(f"no function of a block for {options.name}")
