"""One scale for the weights of linears that read one input, and what that costs: measured, not assumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from calibration.formats.arithmetic import Arithmetic, arithmetic_of
from calibration.formats.bfloat16 import bits_of
from fp4trt.number_formats import FORMATS
from fp4trt.safetensors_file import StoredTensor

__all__ = ["SHARING", "SharingCost", "measure_errors", "shared", "sharing_cost", "sharing_groups"]

SHARING: Final = "one weight scale a group, in NVFP4 and FP8"
"""Part of what a run that resumes is known by: earlier versions gave each weight in FP8 a scale of its own."""

_ROWS: Final = 8
"""Rows of each weight that are measured: together they give the error to a few in a thousand."""

Errors = Sequence[float]
"""Sum of the squares of some rows of a weight, squared error under its own amax, and under its group's."""


@dataclass(frozen=True)
class SharingCost:
    """Relative L2 errors of the first rows of all weights together that share a scale.

    Attributes:
        weight_own: with a scale for each linear.
        weight_shared: with one for each group.
    """

    weight_own: float
    weight_shared: float


def sharing_groups(groups: Iterable[Sequence[str]], formats: Mapping[str, str]) -> list[Sequence[str]]:
    """Return those of some groups of linears that read one input whose weights have one scale.

    Args:
        groups: module paths of the linears of each.
        formats: module path to format, alike in a group.
    """
    return [group for group in groups if FORMATS[formats[group[0]]].shares_weight_scale]


def shared(amax: Mapping[str, float], groups: Iterable[Sequence[str]]) -> dict[str, float]:
    """Give the members of each group one amax: the largest of them.

    TensorRT merges linears that read the same input into one FP4 GEMM only where their global scales are equal, and
    for SM89 more of them into one FP8 GEMM, which then needs no kernel behind it that applies several.
    """
    return {path: max(amax[member] for member in group) for group in groups for path in group}


def measure_errors(stored: StoredTensor, format: str, own: float, common: float) -> Errors:
    """Quantize the first rows of a weight of the plain checkpoint with its own amax and with its group's."""
    rows = bits_of(stored, 0, min(_ROWS, stored.shape[0]) * stored.shape[1])
    weight = torch.from_numpy(rows).view(torch.bfloat16).reshape(-1, stored.shape[1]).float()
    arithmetic = arithmetic_of(format)
    alone = _squared_error(weight, arithmetic, own)
    together = alone if own == common else _squared_error(weight, arithmetic, common)
    return float(weight.square().sum()), alone, together


def sharing_cost(errors: Iterable[Errors]) -> SharingCost:
    """Return the cost from the errors of all weights that share a scale."""
    power, own, common = (sum(each) for each in zip(*errors, strict=True))
    return SharingCost(math.sqrt(own / power), math.sqrt(common / power))


def _squared_error(weight: torch.Tensor, arithmetic: Arithmetic, amax: float) -> float:
    rounded = arithmetic.fake_quantize(weight, arithmetic.tensor_scale(amax))
    return float((rounded - weight).square().sum())
