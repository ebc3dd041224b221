"""The images of a comparison as its page shows them: small enough to send, with exact figures beside them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from PIL import Image, features

from fp4trt.html_pictures import Other, Pictured, data_uri
from generation.comparison.metrics import psnr_db

__all__ = ["TINY", "pictured"]

TINY: Final = 128
"""Pixels of a side up to which images are kept as they are."""

_SIDE: Final = 768
_PIXELS: Final = 16 << 20
"""Pixels of all images of a page together: some megabytes."""

_QUALITY: Final = 82


def pictured(reference: torch.Tensor, others: Mapping[str, torch.Tensor], prompts: Sequence[str]) -> list[Pictured]:
    """Return images as data URIs: PNG of the pixels themselves where they are tiny, else reduced, in WebP.

    Args:
        reference: in [0, 1], [N, H, W] or [N, 3, H, W].
        others: name to images of the same noise and prompts.
        prompts: of the N images.
    """
    height, width = reference.shape[-2:]
    fitting = math.isqrt(_PIXELS // max(1, len(prompts) * (1 + len(others))))
    limit = TINY if max(height, width) <= TINY else min(_SIDE, fitting)
    decibels = {name: psnr_db(images, reference).tolist() for name, images in others.items()}
    return [
        Pictured(
            prompt,
            (width, height),
            _encoded(reference[place], limit),
            [
                Other(
                    _encoded(images[place], limit),
                    _difference(images[place], reference[place], limit),
                    f"PSNR {decibels[name][place]:.1f} dB",
                )
                for name, images in others.items()
            ],
        )
        for place, prompt in enumerate(prompts)
    ]


def _difference(image: torch.Tensor, reference: torch.Tensor, limit: int) -> str:
    """Return the root of the absolute difference, which is averaged where the image is reduced."""
    apart = (image - reference).abs()
    longest = max(apart.shape[-2:])
    if longest > limit:
        step = -(-2 * longest // limit)  # at half of the images' size: noise is what costs most
        planes = apart.reshape(1, -1, *apart.shape[-2:])
        apart = torch.nn.functional.avg_pool2d(planes, step, ceil_mode=True)[0].reshape(
            *apart.shape[:-2], -(-apart.shape[-2] // step), -(-apart.shape[-1] // step)
        )
    return _encoded(apart.sqrt(), limit)


def _encoded(image: torch.Tensor, limit: int) -> str:
    """Return an image in [0, 1], [H, W] or [3, H, W], as a data URI with no side longer than the limit."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray((pixels.movedim(0, -1) if pixels.ndim == 3 else pixels).contiguous().numpy())
    file = io.BytesIO()
    if limit <= TINY:
        picture.save(file, format="PNG", optimize=True)
        return data_uri("png", file.getvalue())
    picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    picture.save(file, format=kind.upper(), quality=_QUALITY)
    return data_uri(kind, file.getvalue())
