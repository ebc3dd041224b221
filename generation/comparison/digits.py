"""What quantization costs the built-in model: digits still recognised, how near the images and the velocities are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from calibration.digits import DIRECTORY
from calibration.digits.description import DESCRIPTION
from calibration.digits.prompts import words_of
from calibration.digits.sampling import STEPS
from fp4trt.families.digits import DIGITS
from fp4trt.progress import PATIENCE_S, tracking
from generation.comparison import metrics
from generation.comparison.drawing import Drawn, Sampler, Transformer, follow, reference_images
from generation.comparison.measurement import Comparison, measure
from generation.comparison.metrics import Metric, Shown
from generation.comparison.pixel_space import classifier_metrics, pixel_sampler

__all__ = ["balanced_labels", "compare", "digits_metrics", "digits_sampler"]


def balanced_labels(count: int) -> list[int]:
    """Return 0, 1, ... 9, 0, 1, ...: ``count`` labels."""
    return [index % 10 for index in range(count)]


def digits_sampler(
    labels: Sequence[int], steps: int = STEPS, dtype: torch.dtype = torch.float32, batch_size: int = 100
) -> Sampler:
    """Return what draws one digit a label.

    Args:
        labels: digits 0..9, one for each image of a seed.
        steps: Euler steps of the schedule.
        dtype: of the transformer's floating-point inputs.
        batch_size: images a call; does not change the noise.
    """
    return pixel_sampler(DIGITS, DESCRIPTION, words_of(labels), steps, dtype, batch_size)


def digits_metrics() -> list[Metric]:
    """Return the metrics that the built-in classifier gives: the Frechet distance, and digits recognised."""
    return classifier_metrics(DESCRIPTION, DIRECTORY, DESCRIPTION.prompts)


def compare(
    reference: Transformer,
    models: Mapping[str, Transformer],
    seeds: Sequence[int] = (0,),
    images_per_seed: int = 500,
    *,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> Comparison:
    """Draw the same digits with a reference and with several others, in memory, and measure how far apart they are.

    Args:
        reference: the BF16 weights, by default computed in FP32 (``load_transformer()``).
        models: name to anything that is called alike: a fake-quantized module, an engine's session.
        seeds: of the starting noise, one set of images each.
        images_per_seed: images of each seed, their labels balanced.
        steps: Euler steps of the schedule.
        dtype: of the floating-point inputs of all transformers.
        batch_size: images a call.

    Raises:
        ValueError: no seed, or no image.
    """
    if not seeds or images_per_seed < 1:
        raise ValueError(f"{len(seeds)} seeds of {images_per_seed} images: expected at least one of each")
    sampler = digits_sampler(balanced_labels(images_per_seed), steps, dtype, batch_size)
    drawn = {name: dict[int, Drawn]() for name in models}
    images: dict[int, torch.Tensor] = {}
    with tracking(len(seeds) * sampler.batches * (1 + 2 * len(models)), "Drawing", PATIENCE_S) as advance:
        for seed in seeds:
            batches = []
            for batch in sampler.draw(reference, seed):
                batches.append(batch)
                advance()
            images[seed] = reference_images(batches)
            for name, model in models.items():
                drawn[name][seed] = follow(sampler, model, seed, batches, advance)
    shown = {name: _shown(sampler, of) for name, of in drawn.items()}
    chosen = [metrics.PSNR, metrics.VELOCITY, *digits_metrics()]
    return measure(chosen, Shown(tuple(seeds), sampler.prompts, lambda seed: [images[seed]]), shown, {})


def _shown(sampler: Sampler, drawn: Mapping[int, Drawn]) -> Shown:
    return Shown(tuple(drawn), sampler.prompts, lambda seed: [drawn[seed].images], drawn.__getitem__)
