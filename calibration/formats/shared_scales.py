"""What it costs to give a merged group one global scale: measured, not assumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from calibration.formats import nvfp4
from calibration.formats.bfloat16 import bits_of
from fp4trt.safetensors_file import StoredTensor

__all__ = ["SharingCost", "measure_errors", "shared", "sharing_cost"]

_ROWS: Final = 8
"""Rows of each weight that are measured: together they give the error to a few in a thousand."""

Errors = Sequence[float]
"""Sum of the squares of some rows of a weight, squared error under its own amax, and under its group's."""


@dataclass(frozen=True)
class SharingCost:
    """Relative L2 errors of the first rows of all quantized weights together.

    Attributes:
        weight_own: with a global scale for each linear.
        weight_shared: with one for each group.
    """

    weight_own: float
    weight_shared: float


def shared(amax: Mapping[str, float], groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """Give the members of each group one amax: the largest of them.

    TensorRT merges linears that read the same input into one FP4 GEMM only where their global scales are equal.
    """
    return {path: max(amax[member] for member in group) for group in groups for path in group}


def measure_errors(stored: StoredTensor, own: float, common: float) -> Errors:
    """Quantize the first rows of a weight of the plain checkpoint with its own amax and with its group's."""
    rows = bits_of(stored, 0, min(_ROWS, stored.shape[0]) * stored.shape[1])
    weight = torch.from_numpy(rows).view(torch.bfloat16).reshape(-1, stored.shape[1]).float()
    alone = _squared_error(weight, own)
    return float(weight.square().sum()), alone, alone if own == common else _squared_error(weight, common)


def sharing_cost(errors: Iterable[Errors]) -> SharingCost:
    """Return the cost from the errors of all weights that share a scale."""
    power, own, common = (sum(each) for each in zip(*errors, strict=True))
    return SharingCost(math.sqrt(own / power), math.sqrt(common / power))


def _squared_error(weight: torch.Tensor, amax: float) -> float:
    rounded = nvfp4.fake_quantize(weight, nvfp4.global_scale(amax))
    return float((rounded - weight).square().sum())
