"""Make the inputs of linears behind an adaptive norm easier to quantize, without changing what the model computes.

Behind AdaLayerNormZero a linear reads ``norm(x) * (1 + scale) + shift``, and another linear computes scale and shift of
every channel. So both a constant and a factor of each channel can move from there into the weights, at no cost when the
model runs:

1. :func:`fold_shift`: a channel that is never near zero wastes codes on its mean. The mean goes out of the shift's
   bias, and what the consumers made of it into their biases.
2. :func:`fold_factors`: a channel that is large where its weights are small, or the other way round, is scaled down,
   and its weights up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import nn

from calibration.by_block.input_statistics import Channels
from calibration.formats import nvfp4
from fp4trt.families.family import Modulated

__all__ = ["EXPONENTS", "best_factors", "fold_block", "fold_factors", "fold_shift"]

EXPONENTS: Final = (0.0, 0.15, 0.3, 0.45, 0.6)
"""How far a channel's magnitude may move to its weights; 0 leaves it."""

_SMALLEST: Final = 1 / 16
"""Smallest factor, the largest being 1: ``1 + scale`` is rounded to 16 bit near 1, not near what is left of it."""


def fold_block(
    block: nn.Module, places: Sequence[Modulated], channels: Mapping[str, Channels], shift: bool, factors: bool
) -> dict[str, float]:
    """Fold all that can be folded in a block; return the exponent of the factors by each place's first consumer.

    Args:
        block: changed in place.
        places: its linears behind adaptive norms.
        channels: of their inputs, by the first consumer's path in the block.
        shift: take means out.
        factors: scale channels.
    """
    exponents = {}
    for place in places:
        name = place.consumers[0]
        exponents[name], seen = 0.0, channels[name]
        if shift:
            fold_shift(block, place, seen.mean)
            seen = seen.shifted()
        if factors:
            best, exponents[name] = best_factors(block, place, seen)
            fold_factors(block, place, best)
    return exponents


def fold_shift(block: nn.Module, place: Modulated, mean: torch.Tensor) -> None:
    """Take the mean of every channel out of the input of a block's linears.

    Args:
        block: changed in place; computed in FP32, stored in its own type.
        place: which linears.
        mean: of their input, FP32 [K].
    """
    shift = _rows(_linear(block, place.modulation).bias, place, place.shift)
    taken = shift.float() - (shift.float() - mean).to(shift.dtype).float()  # what is left of it once it is stored
    shift.copy_(shift.float() - taken)
    for path in place.consumers:
        linear = _linear(block, path)
        linear.bias.copy_(linear.bias.float() + linear.weight.float() @ taken)


def fold_factors(block: nn.Module, place: Modulated, factors: torch.Tensor) -> None:
    """Scale every channel of the input of a block's linears, and undo it in their weights.

    Args:
        block: changed in place; computed in FP32, stored in its own type.
        place: which linears.
        factors: above 0, FP32 [K].
    """
    modulation = _linear(block, place.modulation)
    for chunk, offset in ((place.shift, 0.0), (place.scale, 1.0)):
        weight, bias = (_rows(value, place, chunk) for value in (modulation.weight, modulation.bias))
        weight.copy_(weight.float() * factors.unsqueeze(-1))
        bias.copy_((bias.float() + offset) * factors - offset)
    for path in place.consumers:
        weight = _linear(block, path).weight
        weight.copy_(weight.float() / factors)


def best_factors(block: nn.Module, place: Modulated, channels: Channels) -> tuple[torch.Tensor, float]:
    """Return the factors under which plain rounding costs the linears least, and their exponent.

    Args:
        block: with the linears.
        place: which of them.
        channels: of their input.
    """
    weight = torch.cat([_linear(block, path).weight for path in place.consumers]).float()
    rows = torch.cat(channels.rows)
    wanted = rows @ weight.T
    ratio = weight.square().mean(dim=0).sqrt() / channels.rms.clamp_min(torch.finfo(torch.float32).tiny)
    found = []
    for exponent in EXPONENTS:
        factors = ratio.pow(exponent)
        factors = (factors / factors.max()).clamp_min(_SMALLEST)
        rounded = _rounded(rows * factors, (channels.amax * factors).max()) @ _rounded(weight / factors).T
        found.append((float((rounded - wanted).square().sum()), exponent, factors))
    _, exponent, factors = min(found, key=lambda item: item[0])
    return factors, exponent


def _rounded(x: torch.Tensor, amax: torch.Tensor | None = None) -> torch.Tensor:
    return nvfp4.fake_quantize(x, nvfp4.global_scale(x.abs().max() if amax is None else amax))


def _rows(value: torch.Tensor, place: Modulated, chunk: int) -> torch.Tensor:
    """Return the part of a modulation's weight or bias that computes one of its chunks."""
    parts: Sequence[torch.Tensor] = value.detach().chunk(place.chunks)
    return parts[chunk]


def _linear(block: nn.Module, path: str) -> nn.Linear:
    linear = block.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear
