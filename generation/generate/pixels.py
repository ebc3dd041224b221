"""Draw with a model that needs no pipeline, as its ``sampling.json`` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image

from calibration.digits.description import DESCRIPTION
from calibration.inputs.pixel_space import describe
from calibration.pixel_space.description import Description
from calibration.pixel_space.latents import decode
from calibration.pixel_space.sampling import denoise, noise
from fp4trt.errors import BadInputs
from fp4trt.families.digits import DIGITS
from fp4trt.progress import PATIENCE_S, tracking
from generation.generate.request import Drawn, Request
from generation.pipelines import Model, PipelineTransformer

__all__ = ["description_of", "draw_pixels", "refuse_of_pipelines"]

_ONLY_PIPELINES: Final = {
    "size": "--resolution",
    "pictures": "--image",
    "mask": "--mask",
    "frames": "--frames",
    "negative_prompt": "--negative-prompt",
    "true_cfg_scale": "--true-cfg-scale",
}
"""Attribute of a request to the option that gives it."""


def description_of(model: Model) -> Description | None:
    """Return how a model without a pipeline is sampled; None of one that has a pipeline.

    A graph or an engine takes the ``sampling.json`` of the folder that it lies in.
    """
    if model.family is DIGITS and not model.runs_in_torch:
        return DESCRIPTION
    return describe(model.folder, model.family)


def refuse_of_pipelines(
    model: Model, described: Description, request: Request, of_pipelines: Mapping[str, str | Path | float | None]
) -> None:
    """Refuse what only a pipeline takes, and prompts that the model does not know.

    Args:
        model: which model.
        described: how it is sampled.
        request: what is asked for.
        of_pipelines: options beside the request's, and their values; None of one that was not given.

    Raises:
        BadInputs: naming the option or the word.
    """
    given = {option: getattr(request, name) for name, option in _ONLY_PIPELINES.items()} | dict(of_pipelines)
    for option, value in given.items():
        if value not in (None, ()):
            size = described.image.size
            raise BadInputs(
                f"{option} was given, but {model.path.name} is drawn without a pipeline, {size} x {size} pixels from "
                "words: leave it out"
            )
    described.known(list(request.prompts))


def draw_pixels(described: Description, transformer: PipelineTransformer, request: Request) -> Iterator[Drawn]:
    """Yield each picture when it is drawn, one at a time, so that none depends on how many there are."""
    steps, size = request.steps or described.steps, described.image.size
    guidance = described.guidance if request.guidance is None else request.guidance
    wanted = list(request.wanted())
    settings = {"steps": steps, "guidance": guidance, "dtype": torch.bfloat16}
    with tracking(len(wanted) * steps, "drawing", PATIENCE_S) as advance:
        for one in wanted:
            latents = noise(described, 1, one.seed)
            for step in denoise(
                transformer.model.family,
                described,
                transformer,
                [one.prompt],
                latents,
                **settings,  # type: ignore[arg-type]
            ):
                latents = step.latents
                advance()
            picture = _picture(decode(latents, size, size)[0])
            yield Drawn(one, (picture,), "picture", steps, guidance)


def _picture(image: torch.Tensor) -> Image.Image:
    """Return an image, FP32 [C, H, W] in [0, 1], in 8 bits."""
    values = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))
