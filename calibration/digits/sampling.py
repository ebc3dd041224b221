"""Sampling of the built-in model, through anything that is called like its transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from calibration.digits.description import DESCRIPTION
from calibration.digits.prompts import WORDS, words_of
from calibration.pixel_space import sampling
from calibration.pixel_space.description import Run
from calibration.pixel_space.sampling import Step
from fp4trt.families import Transformer
from fp4trt.families.digits import DIGITS

__all__ = [
    "GUIDANCE",
    "STEPS",
    "Step",
    "Transformer",
    "capture",
    "denoise",
    "model_inputs",
    "noise",
    "sample",
    "schedule",
]

STEPS = DESCRIPTION.steps
GUIDANCE = DESCRIPTION.guidance


def schedule(steps: int = STEPS) -> list[float]:
    """Return ``steps`` + 1 times from 1.0 (noise) down to 0.0 (image), rounded to BF16."""
    return sampling.schedule(steps)


def noise(count: int, seed: int) -> torch.Tensor:
    """Return the starting latents, FP32 [count, 16, 16]: the same for the same seed and count."""
    return sampling.noise(DESCRIPTION, count, seed)


def model_inputs(
    latents: torch.Tensor, prompts: Sequence[str], time: float, guidance: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the transformer's inputs in the graph's order: ids and guidance FP32, the rest in ``dtype``."""
    return sampling.model_inputs(DIGITS, DESCRIPTION, latents, prompts, time, guidance, dtype)


def denoise(
    transformer: Transformer,
    labels: Sequence[int],
    latents: torch.Tensor,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Walk from noise to image, one yielded ``Step`` for each call of the transformer.

    The latents are carried in FP32 whatever ``dtype`` the transformer is called with.
    """
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype}
    return sampling.denoise(DIGITS, DESCRIPTION, transformer, words_of(labels), latents, **settings)


def sample(
    transformer: Transformer,
    labels: Sequence[int],
    seed: int,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> torch.Tensor:
    """Draw one digit a label and return its packed latents, FP32 [len(labels), 16, 16].

    Args:
        transformer: see ``Transformer``; a quantized module or an engine's session stands in for it.
        labels: digits 0..9, given to the model as the words "zero" to "nine".
        seed: of the starting noise; the same seed and number of labels give the same noise.
        steps: Euler steps of the schedule.
        guidance: of the distilled guidance embedding; the model was trained on 1 to 5 and hardly heeds it.
        dtype: of the transformer's floating-point inputs, ids and guidance excepted (always FP32).
        batch_size: images a call; at most 4 for an engine built with the default profile.
    """
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype, "batch_size": batch_size}
    return sampling.sample(DIGITS, DESCRIPTION, transformer, words_of(labels), seed, **settings)


def capture(
    transformer: Transformer,
    labels: Sequence[int] = tuple(range(len(WORDS))),
    seeds: Sequence[int] = (0, 1, 2, 3),
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, torch.Tensor]]:
    """Record what the transformer is fed over the whole schedule: calibration data.

    Returns:
        As :func:`calibration.pixel_space.sampling.capture`: ``len(seeds) * steps`` calls, each a batch of
        ``len(labels)``.
    """
    runs = [Run(seed=seed, prompts=tuple(words_of(labels))) for seed in seeds]
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype}
    return sampling.capture(DIGITS, DESCRIPTION, transformer, runs, **settings)
