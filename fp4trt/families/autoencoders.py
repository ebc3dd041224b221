"""Decoders of autoencoders, in BF16: of AutoencoderKL (FLUX.1, SD3, Chroma, Z-Image) and AutoencoderKLFlux2."""

from __future__ import annotations

import json
from functools import cache
from pkgutil import resolve_name
from typing import Any, Final

from fp4trt.families.config import problem_of_sizes
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Input

__all__ = ["COMPONENTS"]

_PIXELS: Final = 8
"""Pixels of a side for each latent, where there are four levels."""


def _problem(config: Config) -> str | None:
    if (wrong := problem_of_sizes(config, ("in_channels", "out_channels", "latent_channels"))) is not None:
        return wrong
    levels = config.get("block_out_channels")
    if not isinstance(levels, list | tuple) or 2 ** (len(levels) - 1) != _PIXELS:
        return f"block_out_channels is {levels!r}, expected the channels of 4 levels"
    return None


@cache
def _shapes(adapter: str, config: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = resolve_name(adapter).tensors_of(json.loads(config))
    return found


def _side(kind: Any) -> Dim:
    return Dim(kind, pixels_per_token=_PIXELS, min_resolution=256, max_resolution=2048, default_resolution=1024)


def _decoder(name: str, class_name: str, adapter: str) -> Family:
    place = f"calibration.adapters.autoencoder:{adapter}"
    return Family(
        name=name,
        class_name=class_name,
        matches=lambda config: config.get("_class_name") == class_name,
        problem=_problem,
        stacks=(),
        dims={
            "B": Dim("batch", min=1, max=4, default=1),
            "H": _side("image_rows"),
            "W": _side("image_columns"),
        },
        inputs={"latents": Input(("B", "latent_channels", "H", "W"))},
        outputs={"image": ("B", None, f"{_PIXELS}*H", f"{_PIXELS}*W")},
        positions=lambda _: {},
        state=lambda config: dict(_shapes(place, json.dumps(dict(config), sort_keys=True))),
        adapter=place,
        unused=("encoder", "quant_conv", "bn"),
    )


COMPONENTS: Final = (
    _decoder("autoencoder-kl-decoder", "AutoencoderKL", "KLDecoder"),
    _decoder("autoencoder-kl-flux2-decoder", "AutoencoderKLFlux2", "KLFlux2Decoder"),
)
