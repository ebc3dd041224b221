"""Images of a diffusers pipeline: one prompt a batch, every call of its transformer kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from calibration.inputs.captured import capturing
from calibration.inputs.pictures import conditions_of
from calibration.inputs.pipelines import PIPELINES
from calibration.inputs.prompts import Sampling, drawing, load_pipeline, pipeline_of
from fp4trt.errors import BadInputs
from fp4trt.families import Family
from fp4trt.json_file import load_json
from generation.comparison.drawing import Batch, Sampler, Transformer

__all__ = ["pipeline_sampler"]


def pipeline_sampler(folder: Path, family: Family, prompts: Sequence[str], images: int, sampling: Sampling) -> Sampler:
    """Return what draws with the pipeline around a transformer.

    Image i of a seed has prompt ``i % len(prompts)`` and noise of its own; images are rounded to 8 bits, as a picture
    file has them. The pipeline is loaded for each seed and let go, so that one transformer is in memory at a time.

    Args:
        folder: the transformer's; the pipeline is in the parent folder.
        family: its family.
        prompts: at least one.
        images: of a seed.
        sampling: steps and resolution; None leaves them to the pipeline. And the pictures that it reads, of which image
            i takes ``i % len(pictures)``.

    Raises:
        BadInputs: the parent folder is not a pipeline, or one of another model than FLUX.1.
    """
    root = pipeline_of(folder)
    config = load_json(folder / "config.json")
    asked = tuple(prompts[index % len(prompts)] for index in range(images))

    conditions = conditions_of(root, config, sampling.pictures)
    called = PIPELINES[conditions.pipeline]
    if not called.flux1:
        known = ", ".join(name for name, one in PIPELINES.items() if one.flux1)
        raise BadInputs(
            f"{root} is a {conditions.pipeline}; images are compared of one of: {known}: draw with yours in diffusers"
        )

    def draw(transformer: Transformer, seed: int) -> Iterator[Batch]:
        pipeline, module = load_pipeline(root, transformer), cast(nn.Module, transformer)
        for index, prompt in enumerate(asked):
            settings = sampling.as_arguments(called) | conditions.arguments(index, sampling.resolution)
            settings |= {"prompt": prompt, "generator": _generator(seed, index)}
            with drawing(root):
                batch = _picture(pipeline, module, family, config, settings)
            yield batch

    described: dict[str, Any] = {"sampler": "pipeline", "steps": sampling.steps, "resolution": sampling.resolution}
    if conditions.pictures:
        described |= {"pipeline": conditions.pipeline, "pictures": conditions.described()}
    return Sampler(asked, images, draw, described)


def _generator(seed: int, index: int) -> torch.Generator:
    """Return the noise's generator of one image: another for each seed and each image."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint32)[0]
    return torch.Generator().manual_seed(int(state))


def _picture(
    pipeline: Any,
    transformer: nn.Module,
    family: Family,
    config: dict[str, Any],
    settings: dict[str, Any],
) -> Batch:
    velocities: list[torch.Tensor] = []

    def listen(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> None:
        velocities.append(output[0][:, : _own_tokens(given)].detach().cpu())

    handle = transformer.register_forward_hook(listen, with_kwargs=True)
    try:
        with capturing(transformer, family, config) as calls:
            drawn = pipeline(output_type="pt", **settings).images
    finally:
        handle.remove()
    return Batch((drawn.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu(), calls, velocities)


def _own_tokens(given: dict[str, Any]) -> int | None:
    """Return how many tokens, the first ones, are of the picture that is drawn; None where all are.

    Kontext's pipeline appends the tokens of the picture to edit, marks them by a first position id of 1, and throws
    away what the transformer answers there.
    """
    ids = given.get("img_ids")
    return None if ids is None else int((ids[..., 0] == 0).sum())
