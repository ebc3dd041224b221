"""A picture of what quantization does to the built-in model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from calibration.digits.latents import decode
from calibration.digits.prompts import WORDS, words_of
from calibration.digits.sampling import STEPS, Transformer, sample
from generation.comparison.grid import draw_grid

__all__ = ["grid"]


def grid(
    reference: Transformer,
    models: Mapping[str, Transformer],
    path: Path,
    *,
    labels: Sequence[int] = tuple(range(len(WORDS))) * 2,
    seed: int = 0,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> None:
    """Draw the same digits with all transformers and write their picture, a PNG, to ``path``."""

    def draw(model: Transformer) -> torch.Tensor:
        return decode(sample(model, labels, seed, steps=steps, dtype=dtype, batch_size=batch_size))

    draw_grid(draw(reference), {name: draw(model) for name, model in models.items()}, words_of(labels), path)
