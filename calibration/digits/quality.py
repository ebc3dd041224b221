"""What quantization costs the built-in model: digits still recognised, image PSNR, velocity error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from calibration.digits.classifier import accuracy, load_classifier
from calibration.digits.latents import decode
from calibration.digits.progress import progress
from calibration.digits.sampling import STEPS, Transformer, denoise, noise, sample

__all__ = ["Quality", "balanced_labels", "compare", "psnr_db"]

# An MSE below this counts as this much: two equal images have 120 dB, and a mean over images stays finite.
_SMALLEST_MSE = 1e-12


@dataclass(frozen=True)
class Quality:
    """Two transformers compared over the same prompts, starting noise and schedule.

    Attributes:
        accuracy_bf16: fraction (0..1) of the reference's images that the classifier reads as their prompt.
        accuracy_nvfp4: the same of the quantized model's images.
        psnr_db: mean over the images of each quantized image's PSNR against the reference's, peak 1, in dB.
        velocity_error: relative L2 error of the velocity over all steps of the reference's own trajectories.
        images: how many of each.
    """

    accuracy_bf16: float
    accuracy_nvfp4: float
    psnr_db: float
    velocity_error: float
    images: int


def balanced_labels(count: int) -> list[int]:
    """Return 0, 1, ... 9, 0, 1, ...: ``count`` labels."""
    return [index % 10 for index in range(count)]


def psnr_db(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return each image's peak signal-to-noise ratio in dB, FP64 [B]; both [B, H, W] in [0, 1]."""
    mse = (images.double() - references.double()).square().mean((1, 2))
    return -10 * torch.log10(mse.clamp_min(_SMALLEST_MSE))


def compare(
    reference: Transformer,
    quantized: Transformer,
    seeds: Sequence[int] = (0,),
    images_per_seed: int = 500,
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
    classifier: nn.Module | None = None,
) -> Quality:
    """Draw the same digits with both transformers and measure how far apart they are.

    Args:
        reference: the BF16 weights, by default computed in FP32 (``load_transformer()``).
        quantized: anything that is called alike: a fake-quantized module, an engine's session.
        seeds: of the starting noise, one set of images each.
        images_per_seed: images of each seed, their labels balanced.
        steps: Euler steps of the schedule.
        dtype: of the floating-point inputs of both transformers.
        batch_size: images a call.
        classifier: the judge; the stored one by default.

    Raises:
        ValueError: no seed, or no image.
    """
    if not seeds or images_per_seed < 1:
        raise ValueError(f"{len(seeds)} seeds of {images_per_seed} images: expected at least one of each")
    labels = balanced_labels(images_per_seed)
    calls = len(seeds) * -(-images_per_seed // batch_size) * steps
    with progress(calls, "Following the reference") as advance:
        followed = [
            _follow(
                reference, quantized, labels, seed, steps=steps, dtype=dtype, batch_size=batch_size, advance=advance
            )
            for seed in seeds
        ]
    drawn = [sample(quantized, labels, seed, steps=steps, dtype=dtype, batch_size=batch_size) for seed in seeds]
    of_reference, of_quantized = torch.cat([one.images for one in followed]), decode(torch.cat(drawn))
    judge = load_classifier() if classifier is None else classifier
    expected = torch.tensor(labels * len(seeds))
    squared_error = sum(one.squared_error for one in followed)
    squared_norm = sum(one.squared_norm for one in followed)
    return Quality(
        accuracy_bf16=accuracy(judge, of_reference, expected),
        accuracy_nvfp4=accuracy(judge, of_quantized, expected),
        psnr_db=psnr_db(of_quantized, of_reference).mean().item(),
        velocity_error=(squared_error / squared_norm) ** 0.5,
        images=len(expected),
    )


@dataclass(frozen=True)
class _Followed:
    """The reference's images of one seed, and the sums over its trajectories for the velocity error."""

    images: torch.Tensor
    squared_error: float
    squared_norm: float


def _follow(
    reference: Transformer,
    quantized: Transformer,
    labels: Sequence[int],
    seed: int,
    *,
    steps: int,
    dtype: torch.dtype,
    batch_size: int,
    advance: Callable[[], None],
) -> _Followed:
    """Draw the reference's images, asking the quantized model for its velocity at every state on the way."""
    start = noise(len(labels), seed)
    images = []
    squared_error = squared_norm = 0.0
    for first in range(0, len(labels), batch_size):
        part = slice(first, first + batch_size)
        latents = start[part]
        for step in denoise(reference, labels[part], latents, steps=steps, dtype=dtype):
            with torch.inference_mode():
                answer = quantized(**step.inputs, return_dict=False)[0].double()
            squared_error += (answer - step.velocity).square().sum().item()
            squared_norm += step.velocity.double().square().sum().item()
            latents = step.latents
            advance()
        images.append(decode(latents))
    return _Followed(torch.cat(images), squared_error, squared_norm)
