"""Rectified-flow sampling with Euler steps, through anything that is called like the family's transformer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.pixel_space.description import Description, Run
from calibration.pixel_space.prompts import embed_prompts
from fp4trt.families import Family, Transformer
from fp4trt.progress import PATIENCE_S, tracking

__all__ = [
    "Step",
    "capture",
    "denoise",
    "in_types",
    "model_inputs",
    "noise",
    "sample",
    "schedule",
    "with_positions",
]


@dataclass(frozen=True)
class Step:
    """One call of the transformer: its inputs, the velocity it answered, the FP32 latents after the step."""

    inputs: dict[str, torch.Tensor]
    velocity: torch.Tensor
    latents: torch.Tensor


def schedule(steps: int) -> list[float]:
    """Return ``steps`` + 1 times from 1.0 (noise) down to 0.0 (image).

    They are rounded to BF16, the type of the graph's ``timestep`` input: every runtime sees the same times.
    """
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: expected at least 1")
    times: list[float] = torch.linspace(1, 0, steps + 1).bfloat16().tolist()
    return times


def noise(described: Description, count: int, seed: int) -> torch.Tensor:
    """Return the starting latents, FP32 [count, tokens, channels]: the same for the same seed and count."""
    shape = (count, described.image.tokens, described.image.token_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_positions(family: Family, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the transformer's inputs in the graph's order: of ``values`` those that the family has, and positions.

    Args:
        family: of the transformer.
        values: all inputs but the positions, among them latents [B, L, C] and text tokens [B, T, D].
    """
    sizes = (values[name].shape[1] for name in ("hidden_states", "encoder_hidden_states"))
    positions = family.positions(family.sizes(1, *sizes))
    return {
        name: torch.from_numpy(positions[name]) if each.role == "positions" else values[name]
        for name, each in family.inputs.items()
    }


def model_inputs(
    family: Family,
    described: Description,
    latents: torch.Tensor,
    prompts: Sequence[str],
    time: float,
    guidance: float,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return the transformer's inputs in the graph's order: positions and guidance FP32, the rest in ``dtype``."""
    tokens, pooled = embed_prompts(prompts, described.text.words, described.text.width)
    values = {
        "hidden_states": latents,
        "encoder_hidden_states": tokens,
        "pooled_projections": pooled,
        "timestep": torch.full((len(latents),), time),
        "guidance": torch.full((len(latents),), guidance),
    }
    return in_types(family, with_positions(family, values), dtype)


def in_types(family: Family, inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a transformer's inputs, those that the graph takes in BF16 in ``dtype``, the others in FP32."""
    types = {"bf16": dtype, "fp32": torch.float32}
    return {name: value.to(types[family.inputs[name].dtype]) for name, value in inputs.items()}


def denoise(
    family: Family,
    described: Description,
    transformer: Transformer,
    prompts: Sequence[str],
    latents: torch.Tensor,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Walk from noise to image, one yielded ``Step`` for each call of the transformer.

    The latents are carried in FP32 whatever ``dtype`` the transformer is called with.

    Args:
        family: of the transformer.
        described: how it is sampled.
        transformer: see ``Transformer``; a quantized module or an engine's session stands in for it.
        prompts: one for each image.
        latents: to start from, FP32 [B, tokens, channels].
        steps: Euler steps of the schedule; None for the model's own.
        guidance: of the distilled guidance embedding; None for the model's own.
        dtype: of the transformer's floating-point inputs, positions and guidance excepted.
    """
    strength = described.guidance if guidance is None else guidance
    for time, following in itertools.pairwise(schedule(described.steps if steps is None else steps)):
        inputs = model_inputs(family, described, latents, prompts, time, strength, dtype)
        with torch.inference_mode():
            velocity = transformer(**inputs, return_dict=False)[0].float()
        latents = latents + (following - time) * velocity
        yield Step(inputs, velocity, latents)


def sample(
    family: Family,
    described: Description,
    transformer: Transformer,
    prompts: Sequence[str],
    seed: int,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 100,
) -> torch.Tensor:
    """Draw one image a prompt and return its packed latents, FP32 [len(prompts), tokens, channels].

    Args:
        family, described, transformer, prompts, steps, guidance, dtype: as for :func:`denoise`.
        seed: of the starting noise; the same seed and number of prompts give the same noise.
        batch_size: images a call; at most 4 for an engine built with the default profile.
    """
    start = noise(described, len(prompts), seed)
    chunks = range(0, len(prompts), batch_size)
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype}
    results = []
    with tracking(len(chunks) * (steps or described.steps), "Sampling", PATIENCE_S) as advance:
        for first in chunks:
            part = slice(first, first + batch_size)
            latents = start[part]
            for step in denoise(family, described, transformer, prompts[part], latents, **settings):
                latents = step.latents
                advance()
            results.append(latents)
    return torch.cat(results)


def capture(
    family: Family,
    described: Description,
    transformer: Transformer,
    runs: Sequence[Run],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, torch.Tensor]]:
    """Record what the transformer is fed over the whole schedule: calibration data.

    Returns:
        One dict a call, ``len(runs) * steps`` of them, each a batch of a run's prompts: in the graph's order and types,
        BF16 with positions and guidance FP32. The whole schedule is in it, because one end alone calibrates badly.
    """
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype}
    recorded = []
    with tracking(len(runs) * (steps or described.steps), "Capturing", PATIENCE_S) as advance:
        for run in runs:
            start = noise(described, len(run.prompts), run.seed)
            for step in denoise(family, described, transformer, run.prompts, start, **settings):
                recorded.append(in_types(family, step.inputs, torch.bfloat16))
                advance()
    return recorded
