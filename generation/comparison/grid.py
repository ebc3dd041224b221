"""A picture of what quantization does: the reference's images, each checkpoint's of the same noise, the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from fp4trt.safetensors_file import naming

__all__ = ["draw_grid"]

_CELL: Final = (64, 256)
"""An image is enlarged by a whole factor to at least the first, or reduced to the second, in pixels of a side."""

_GAP: Final = 4
_TOP: Final = 28
_LEFT: Final = 120
_LETTER: Final = 8


def draw_grid(
    reference: torch.Tensor,
    others: Mapping[str, torch.Tensor],
    prompts: Sequence[str],
    path: Path,
    amplify: int = 8,
) -> None:
    """Write one PNG: a column a prompt; rows BF16, then for each other its images and their amplified difference.

    Args:
        reference: images in [0, 1], [N, H, W] or [N, 3, H, W].
        others: name to images of the same noise and prompts.
        prompts: the N prompts, written above the columns as far as they fit.
        path: of the PNG, replaced in one step; its directory must exist.
        amplify: factor on the absolute difference, which is clamped at white.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [("BF16", reference)]
    for name, images in others.items():
        of = "" if len(others) == 1 else f"{name}: "
        rows += [(name, images), (f"{of}difference x{amplify}", ((images - reference).abs() * amplify).clamp(0, 1))]
    height, width = (_side(side, max(reference.shape[-2:])) for side in reference.shape[-2:])
    left = max(_LEFT, max(len(caption) for caption, _ in rows) * _LETTER)
    size = (left + len(prompts) * (width + _GAP), _TOP + len(rows) * (height + _GAP))
    canvas = Image.new("RGB" if reference.ndim == 4 else "L", size, color="white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for column, prompt in enumerate(prompts):
        center = left + column * (width + _GAP) + width // 2
        draw.text((center, _TOP // 2), prompt[: width // _LETTER], fill="black", font=font, anchor="mm")
    enlarge = Image.Resampling.NEAREST if width >= reference.shape[-1] else Image.Resampling.LANCZOS
    for row, (caption, images) in enumerate(rows):
        top = _TOP + row * (height + _GAP)
        draw.text((_GAP, top + height // 2), caption, fill="black", font=font, anchor="lm")
        pixels = (images * 255).round().to(torch.uint8)
        for column, picture in enumerate(pixels.movedim(1, -1) if pixels.ndim == 4 else pixels):
            resized = Image.fromarray(picture.numpy()).resize((width, height), enlarge)
            canvas.paste(resized, (left + column * (width + _GAP), top))
    partial = path.with_name(path.name + ".partial")
    with naming(partial):
        canvas.save(partial, format="PNG")
    partial.replace(path)


def _side(pixels: int, longest: int) -> int:
    """Return how long a side is drawn, the longest of the image between the limits."""
    smallest, largest = _CELL
    if longest > largest:
        return max(1, pixels * largest // longest)
    return pixels * max(1, -(-smallest // longest))
