"""What tells that a step changes little, before the model has run: a signal that is compared from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from fp4trt.families import Family
from generation.step_caching.settings import Decider

__all__ = ["Signal", "latents_name", "relative_distance", "signal_of", "time_name", "time_of", "time_signal"]

Signal = Callable[[Mapping[str, Any]], torch.Tensor]
"""Given the inputs of a call, returns what is compared, FP32 [B, ...]; of the time alone [1, ...]."""

_WIDTH: Final = 256
_PERIOD: Final = 10_000
_TRAIN_STEPS: Final = 1000


def signal_of(decider: Decider, family: Family) -> Signal:
    """Return the signal of a decider that needs no weights.

    ``time`` is the sinusoidal embedding of the timestep, as FLUX's (Ho et al. 2020, with 256 values), and ``latents``
    the noisy picture.

    Args:
        decider: ``time`` or ``latents``.
        family: of the model.
    """
    if decider == "time":
        name = time_name(family)
        return lambda inputs: time_signal(time_of(inputs[name]) / family.noise_at)
    assert decider == "latents", decider
    latents = latents_name(family)
    return lambda inputs: inputs[latents].float()


def time_signal(time: float) -> torch.Tensor:
    """Return the sinusoidal embedding of a time from 1 (noise) to 0 (picture), FP32 [1, 256]."""
    half = _WIDTH // 2
    angles = [time * _TRAIN_STEPS * math.exp(-math.log(_PERIOD) * index / half) for index in range(half)]
    return torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]], dtype=torch.float32)


def relative_distance(signal: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the relative L1 distance of each image's signal to that of the step before, FP32 [B]."""
    change = (signal - before).abs().flatten(1).mean(1)
    return change / before.abs().flatten(1).mean(1).clamp_min(torch.finfo(torch.float32).tiny)


def latents_name(family: Family) -> str:
    """Return the input that is the noisy picture: the first one."""
    return next(name for name, each in family.inputs.items() if each.role == "normal")


def time_name(family: Family) -> str:
    """Return the input that is the timestep."""
    return next(name for name, each in family.inputs.items() if each.role == "time")


def time_of(timestep: torch.Tensor) -> float:
    """Return the time of a call: the largest of its tokens', of which those of a given picture are at 0."""
    return float(timestep.max())
