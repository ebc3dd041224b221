"""A picture of what quantization does: BF16 digits, FP4 digits from the same noise, and their difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from calibration.digits.latents import IMAGE_SIZE, decode
from calibration.digits.prompts import WORDS, words_of
from calibration.digits.sampling import STEPS, Transformer, sample

__all__ = ["draw_grid", "grid"]

_SCALE = 4
_GAP = 4
_LEFT = 120
_TOP = 28


def grid(
    reference: Transformer,
    quantized: Transformer,
    path: Path,
    *,
    labels: Sequence[int] = tuple(range(len(WORDS))) * 2,
    seed: int = 0,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> None:
    """Draw the same digits with both transformers and write their picture, a PNG, to ``path``."""
    first, second = (
        decode(sample(model, labels, seed, steps=steps, dtype=dtype, batch_size=batch_size))
        for model in (reference, quantized)
    )
    draw_grid(first, second, labels, path)


def draw_grid(
    reference: torch.Tensor, quantized: torch.Tensor, labels: Sequence[int], path: Path, amplify: int = 8
) -> None:
    """Write one PNG: a column a prompt; rows BF16, NVFP4 and their absolute difference times ``amplify``.

    Args:
        reference: images [N, 16, 16] in [0, 1].
        quantized: the same, from the same noise and prompts.
        labels: the N digits asked for, written above the columns.
        path: of the PNG, replaced in one step; its directory must exist.
        amplify: factor on the difference, which is clamped at white.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell = IMAGE_SIZE * _SCALE
    difference = ((quantized - reference).abs() * amplify).clamp(0, 1)
    rows = (("BF16", reference), ("NVFP4", quantized), (f"difference x{amplify}", difference))
    size = (_LEFT + len(labels) * (cell + _GAP), _TOP + len(rows) * (cell + _GAP))
    canvas = Image.new("L", size, color=255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for column, word in enumerate(words_of(labels)):
        center = _LEFT + column * (cell + _GAP) + cell // 2
        draw.text((center, _TOP // 2), word, fill=0, font=font, anchor="mm")
    for row, (caption, images) in enumerate(rows):
        top = _TOP + row * (cell + _GAP)
        draw.text((_GAP, top + cell // 2), caption, fill=0, font=font, anchor="lm")
        pixels = (images * 255).round().to(torch.uint8).numpy()
        for column, picture in enumerate(pixels):
            enlarged = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (_LEFT + column * (cell + _GAP), top))
    partial = path.with_name(path.name + ".partial")
    canvas.save(partial, format="PNG")
    partial.replace(path)
