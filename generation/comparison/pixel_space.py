"""Images of a model that needs no pipeline, and what judges them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from calibration.digits import DIRECTORY
from calibration.digits.description import DESCRIPTION
from calibration.pixel_space.description import Description
from calibration.pixel_space.latents import decode
from calibration.pixel_space.sampling import denoise, noise
from fp4trt.families import Family
from generation.comparison import metrics
from generation.comparison.digit_classifier import load_classifier, with_channels
from generation.comparison.drawing import Batch, Sampler, Transformer
from generation.comparison.metrics import Metric

__all__ = ["classifier_metrics", "pixel_sampler"]


def pixel_sampler(
    family: Family,
    described: Description,
    prompts: Sequence[str],
    steps: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> Sampler:
    """Return what draws one image a prompt.

    Args:
        family: of the transformer.
        described: how it is sampled.
        prompts: one for each image of a seed.
        steps: Euler steps of the schedule; None for the model's own.
        dtype: of the transformer's floating-point inputs.
        batch_size: images a call; does not change the noise.
    """
    steps, size = steps or described.steps, described.image.size

    def draw(transformer: Transformer, seed: int) -> Iterator[Batch]:
        start = noise(described, len(prompts), seed)
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            walked = list(denoise(family, described, transformer, prompts[part], start[part], steps=steps, dtype=dtype))
            images = decode(walked[-1].latents, size, size)
            images = images.squeeze(1) if described.image.channels == 1 else images
            yield Batch(images, [step.inputs for step in walked], [step.velocity for step in walked])

    settings = {"steps": steps, "dtype": str(dtype).removeprefix("torch."), "batch": batch_size}
    sampler = {"sampler": "digits"} if described is DESCRIPTION else {"sampler": "pixels"}
    return Sampler(tuple(prompts), -(-len(prompts) // batch_size), draw, sampler | settings)


def classifier_metrics(described: Description, folder: Path, prompts: Sequence[str]) -> list[Metric]:
    """Return the metrics that a model's classifier gives: the Frechet distance, and images recognised.

    Args:
        described: names the classifier; without one there are no such metrics.
        folder: that it is in.
        prompts: of the images. How many are recognised is left out where one of them has no label.
    """
    if described.classifier is None:
        return []
    built_in = described is DESCRIPTION
    judge = "the built-in classifier" if built_in else "the model's classifier"
    things, asked = ("digits", "the digit that") if built_in else ("images", "what")
    classifier = load_classifier((DIRECTORY if built_in else folder) / described.classifier.file)
    penultimate = nn.Sequential(*list(classifier)[:-1])

    def features(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return penultimate(with_channels(images))

    found = [metrics.frechet("frechet", "Frechet distance", features, f"the penultimate layer of {judge}")]
    labels = described.classifier.labels
    if all(prompt in labels for prompt in prompts):
        reads = f"{judge} reads as {asked} was asked for"
        found.append(metrics.recognised(classifier, labels.__getitem__, f"{things} recognised", reads))
    return found
