"""The images that one model has drawn, on disk: a PNG for each prompt and seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol.prompts import Asked

from fp4trt.safetensors_file import naming
from generation.comparison.drawing import as_unit

AT_ONCE = 8
"""Images in memory together, 12 MB each at 1024 x 1024."""


@dataclass(frozen=True)
class Album:
    """A folder of images; a file has its name only once it is whole.

    Attributes:
        label: of the model.
        folder: where.
    """

    label: str
    folder: Path

    def picture(self, asked: Asked) -> Path:
        """Return the file of an image."""
        return self.folder / f"{asked.stem}.png"

    def latents(self, asked: Asked) -> Path:
        """Return the file of what an image is decoded from, where that is done at the end."""
        return self.folder / f"{asked.stem}.latents.safetensors"

    def missing(self, asked: Sequence[Asked]) -> list[Asked]:
        """Return those whose image is not there."""
        return [one for one in asked if not self.picture(one).is_file()]

    def parts(self, asked: Sequence[Asked]) -> Iterator[torch.Tensor]:
        """Read images, FP32 in [0, 1], [N, 3, H, W], a few at a time."""
        for first in range(0, len(asked), AT_ONCE):
            yield as_unit(torch.stack([pixels_of(self.picture(one)) for one in asked[first : first + AT_ONCE]]))


def pixels_of(path: Path) -> torch.Tensor:
    """Return a picture's pixels, uint8 [3, H, W]."""
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).movedim(-1, 0)


def saved(path: Path, save: Callable[[Path], Any]) -> None:
    """Call what writes a file, and give that its name once it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with naming(partial):
        save(partial)
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
    os.replace(partial, path)
