"""Former place of :mod:`fp4trt.families`; works for one more version."""

from __future__ import annotations

import warnings

from fp4trt.families import FAMILIES, Family, Symbol, family_of

__all__ = ["FAMILIES", "Family", "Symbol", "family_of"]

warnings.warn("calibration.models is fp4trt.families now; import it from there", FutureWarning, stacklevel=2)
