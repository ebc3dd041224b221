"""Draw the same prompts and noise with a reference and others, and ask the others along the reference's own way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calibration.inputs.captured import Inputs
from fp4trt.families import Transformer

__all__ = ["Batch", "Drawn", "Sampler", "Transformer", "as_unit", "follow", "reference_images"]


@dataclass(frozen=True)
class Batch:
    """What one transformer made of some prompts.

    Attributes:
        images: FP32 in [0, 1] or uint8, [B, H, W] or [B, 3, H, W].
        calls: the inputs of each call of the transformer, in order.
        velocities: its answers, each [B, ...]; of the tokens of the picture that is drawn, where it reads others too.
    """

    images: torch.Tensor
    calls: list[Inputs]
    velocities: list[torch.Tensor]


@dataclass(frozen=True)
class Sampler:
    """How images are drawn, apart from the transformer.

    Attributes:
        prompts: one per image of a seed.
        batches: into how many batches a seed's images are split.
        draw: (transformer, seed) to those batches; the same seed gives the same noise to every transformer.
        described: the settings that decide about the images, as JSON.
    """

    prompts: tuple[str, ...]
    batches: int
    draw: Callable[[Transformer, int], Iterator[Batch]]
    described: Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """One transformer's images of one seed, and how far its velocities are from the reference's on the reference's way.

    Attributes:
        images: all images of the seed.
        squared_error: FP64 [images, calls], ``|v - v_reference|^2`` at each state that the reference passed through.
        squared_norm: FP64 [images, calls], ``|v_reference|^2``.
        times: [calls], what the transformer was told of the time: 1 is noise, 0 the image.
    """

    images: torch.Tensor
    squared_error: torch.Tensor
    squared_norm: torch.Tensor
    times: torch.Tensor


def follow(
    sampler: Sampler,
    transformer: Transformer,
    seed: int,
    reference: Iterable[Batch],
    advance: Callable[[], None] = lambda: None,
) -> Drawn:
    """Draw one seed's images, and ask for the velocity at every state of the reference's batches of that seed.

    Args:
        sampler: the one that drew the reference's batches.
        transformer: any that is called alike: a fake-quantized module, an engine's session.
        seed: of the noise.
        reference: what the reference drew, one batch in memory at a time.
        advance: is called after each of the ``2 * sampler.batches`` steps.
    """
    images, errors, norms, times = [], [], [], torch.empty(0)
    # First the images: a pipeline puts the transformer where it is to be computed, and there it stays.
    for batch in sampler.draw(transformer, seed):
        images.append(batch.images)
        advance()
    for batch in reference:
        sums = [_squares(transformer, call, wanted) for call, wanted in zip(batch.calls, batch.velocities, strict=True)]
        errors.append(torch.stack([error for error, _ in sums], dim=1))
        norms.append(torch.stack([norm for _, norm in sums], dim=1))
        times = torch.stack([call["timestep"].double().flatten()[0].cpu() for call in batch.calls])
        advance()
    return Drawn(torch.cat(images), torch.cat(errors), torch.cat(norms), times)


def _squares(transformer: Transformer, call: Inputs, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return |answer - wanted|^2 and |wanted|^2 of each image, FP64 [B]."""
    with torch.inference_mode():
        answer = transformer(**call, return_dict=False)[0][:, : wanted.shape[1]].to(wanted.device).double()
    error = (answer - wanted.double()).square().flatten(1).sum(1)
    return error, wanted.double().square().flatten(1).sum(1)


def reference_images(batches: Iterable[Batch]) -> torch.Tensor:
    """Return the images of a reference's batches together."""
    return torch.cat([batch.images for batch in batches])


def as_unit(images: torch.Tensor) -> torch.Tensor:
    """Return images as FP32 in [0, 1]: uint8 ones divided by 255."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
