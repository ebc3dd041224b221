"""What is to be drawn, and what was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calibration.inputs.settings import Sampling
from fp4trt.errors import BadInputs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

__all__ = ["Drawn", "Request", "Wanted", "size_of"]


@dataclass(frozen=True)
class Wanted:
    """One picture, or one video, that is to be drawn.

    Attributes:
        prompt: what of.
        seed: of its noise: of ``torch.Generator("cpu").manual_seed(seed)``.
    """

    prompt: str
    seed: int


@dataclass(frozen=True)
class Request:
    """What a user asks for; None leaves a setting to the model.

    Attributes:
        prompts: at least one.
        seed: of the first picture of each prompt; the next has the next seed.
        count: pictures of each prompt.
        steps: of the schedule.
        guidance: scale of the guidance that the model has.
        true_cfg_scale: scale of the guidance by a negative prompt, of models that have another guidance too.
        negative_prompt: what not to draw.
        size: width and height in pixels.
        pictures: to edit, to refer to, or to be led by.
        mask: of the picture, white where to fill.
        frames: of a video.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    pictures: tuple[Path, ...] = ()
    mask: Path | None = None
    frames: int | None = None

    def wanted(self) -> Iterator[Wanted]:
        """Yield what is to be drawn, in order."""
        for prompt in self.prompts:
            for index in range(self.count):
                yield Wanted(prompt, self.seed + index)

    def sampling(self, side: int | None) -> Sampling:
        """Return the settings that pipelines are asked about before they are loaded.

        Args:
            side: pixels of one side.
        """
        return Sampling(self.steps, side, self.pictures[0] if self.pictures else None, self.frames, self.guidance)


@dataclass(frozen=True)
class Drawn:
    """What was drawn of a :class:`Wanted`.

    Attributes:
        wanted: that.
        pictures: one; all layers; or the frames of a video.
        kind: which of these.
        steps: that the model was sampled in.
        guidance: that it was sampled with; None where it has none.
        sound: FP32 [channels, samples] in [-1, 1], and samples a second; None without.
    """

    wanted: Wanted
    pictures: tuple[Image.Image, ...]
    kind: Literal["picture", "layers", "video"]
    steps: int
    guidance: float | None
    sound: tuple[npt.NDArray[np.float32], int] | None = None


def size_of(resolution: str | int) -> tuple[int, int]:
    """Return width and height of ``1024`` or ``1024x768``.

    Raises:
        BadInputs: it is neither.
    """
    sides = str(resolution).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 1 for side in sides):
        raise BadInputs(f"--resolution {resolution} is not a size in pixels; expected one such as 1024 or 1024x768")
    return int(sides[0]), int(sides[-1])
