"""Rectified-flow sampling with Euler steps, through anything that is called like a FLUX transformer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from calibration.digits import latents as packing
from calibration.digits.prompts import WORDS, embed_prompts, words_of
from fp4trt.families import Transformer
from fp4trt.progress import PATIENCE_S, tracking

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

STEPS = 10
GUIDANCE = 3.5
_FLOAT32_INPUTS = ("img_ids", "txt_ids", "guidance")


@dataclass(frozen=True)
class Step:
    """One call of the transformer: its inputs, the velocity it answered, the FP32 latents after the step."""

    inputs: dict[str, torch.Tensor]
    velocity: torch.Tensor
    latents: torch.Tensor


def schedule(steps: int = STEPS) -> list[float]:
    """Return ``steps`` + 1 times from 1.0 (noise) down to 0.0 (image).

    They are rounded to BF16, the type of the graph's ``timestep`` input: every runtime sees the same times.
    """
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: expected at least 1")
    times: list[float] = torch.linspace(1, 0, steps + 1).bfloat16().tolist()
    return times


def noise(count: int, seed: int) -> torch.Tensor:
    """Return the starting latents, FP32 [count, 16, 16]: the same for the same seed and count."""
    return torch.randn(count, packing.TOKENS, packing.CHANNELS, generator=torch.Generator().manual_seed(seed))


def model_inputs(
    latents: torch.Tensor, prompts: Sequence[str], time: float, guidance: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the transformer's inputs in the graph's order: ids and guidance FP32, the rest in ``dtype``."""
    tokens, pooled = embed_prompts(prompts)
    batch = len(latents)
    return {
        "hidden_states": latents.to(dtype),
        "encoder_hidden_states": tokens.to(dtype),
        "pooled_projections": pooled.to(dtype),
        "timestep": torch.full((batch,), time, dtype=dtype),
        "img_ids": packing.image_ids(),
        "txt_ids": packing.text_ids(tokens.shape[1]),
        "guidance": torch.full((batch,), guidance),
    }


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
    prompts = words_of(labels)
    times = schedule(steps)
    for time, following in itertools.pairwise(times):
        inputs = model_inputs(latents, prompts, time, guidance, dtype)
        with torch.inference_mode():
            velocity = transformer(**inputs, return_dict=False)[0].float()
        latents = latents + (following - time) * velocity
        yield Step(inputs, velocity, latents)


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
    start = noise(len(labels), seed)
    chunks = range(0, len(labels), batch_size)
    results = []
    with tracking(len(chunks) * steps, "Sampling", PATIENCE_S) as advance:
        for first in chunks:
            part = slice(first, first + batch_size)
            latents = start[part]
            for step in denoise(transformer, labels[part], latents, steps=steps, guidance=guidance, dtype=dtype):
                latents = step.latents
                advance()
            results.append(latents)
    return torch.cat(results)


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
        One dict a call, ``len(seeds) * steps`` of them, each a batch of ``len(labels)``: in the graph's order
        and types, BF16 with ids and guidance FP32. The whole schedule is in it, because one end alone
        calibrates badly.
    """
    recorded = []
    with tracking(len(seeds) * steps, "Capturing", PATIENCE_S) as advance:
        for seed in seeds:
            start = noise(len(labels), seed)
            for step in denoise(transformer, labels, start, steps=steps, guidance=guidance, dtype=dtype):
                recorded.append(
                    {k: v.float() if k in _FLOAT32_INPUTS else v.bfloat16() for k, v in step.inputs.items()}
                )
                advance()
    return recorded
