"""Model families: which linears to quantize, which share an input, what goes in and out. Data and functions only."""

from __future__ import annotations

from typing import Final

from fp4trt.errors import BadCheckpoint, UnknownFamily
from fp4trt.families.digits import DIGITS
from fp4trt.families.family import Config, Family, Symbol, Transformer
from fp4trt.families.flux import FLUX

__all__ = ["FAMILIES", "Family", "Symbol", "Transformer", "family_of"]

FAMILIES: Final = (DIGITS, FLUX)
"""In the order in which a config is tried on them: the narrower first."""


def family_of(config: Config) -> Family:
    """Return the family of a diffusers config.

    Raises:
        UnknownFamily: no family fits.
        BadCheckpoint: the config contradicts itself.
    """
    for family in FAMILIES:
        if family.matches(config):
            wrong = family.problem(config)
            if wrong is not None:
                raise BadCheckpoint(f"config.json: {wrong}; take the one that belongs to the weights")
            return family
    known = ", ".join(sorted({family.class_name for family in FAMILIES}))
    raise UnknownFamily(
        f"config.json describes a {config.get('_class_name', 'model without _class_name')}; "
        f"expected one of: {known}; give the folder of a diffusers transformer"
    )
