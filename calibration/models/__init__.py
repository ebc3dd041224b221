"""Model families: which linears to quantize, which share an input, what goes in and out. Data and functions only."""

from __future__ import annotations

from calibration.models.family import Family, Symbol, family_of

__all__ = ["Family", "Symbol", "family_of"]
