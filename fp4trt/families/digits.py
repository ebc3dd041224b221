"""The built-in model: FLUX.1's architecture at the size of scikit-learn's digits."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fp4trt.families.dim import Dim
from fp4trt.families.family import Config
from fp4trt.families.flux import FLUX

__all__ = ["DIGITS"]

_SIZES: Final = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
}
"""All of its config but how many blocks there are: other models of FLUX.1's class may share some of it."""


def _is_built_in(config: Config) -> bool:
    """Return whether a config of FLUX.1's class is the built-in model's, of any depth."""
    held = {key: config.get(key) for key in _SIZES}
    held["out_channels"] = held["out_channels"] or held["in_channels"]
    axes = held["axes_dims_rope"]
    held["axes_dims_rope"] = list(axes) if isinstance(axes, tuple) else axes
    return FLUX.matches(config) and held == _SIZES


DIGITS: Final = replace(
    FLUX,
    name="flux-digits",
    special=True,
    matches=_is_built_in,
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim("image_tokens", pixels_per_token=4, min_resolution=8, max_resolution=32, default_resolution=16),
        "T": Dim("text_tokens", min=1, max=32, default=8),
    },
)
