"""The built-in model: FLUX.1's architecture at the size of scikit-learn's digits."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fp4trt.families.dim import Dim
from fp4trt.families.flux import FLUX

__all__ = ["DIGITS"]

DIGITS: Final = replace(
    FLUX,
    name="flux-digits",
    special=True,
    # FLUX.1's own models read 64 channels or more; 16 is what 4 x 4 grey pixels make.
    matches=lambda config: FLUX.matches(config) and config.get("in_channels") == 16,
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim("image_tokens", pixels_per_token=4, min_resolution=8, max_resolution=32, default_resolution=16),
        "T": Dim("text_tokens", min=1, max=32, default=8),
    },
)
