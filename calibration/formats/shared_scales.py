"""What it costs to give a merged group one global scale: measured, not assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from calibration.formats import nvfp4
from calibration.formats.bfloat16 import bits_of
from fp4trt.safetensors_file import StoredTensor

__all__ = ["SharingCost", "measure_cost", "shared"]

_ROWS: Final = 8
"""Of every weight: together they tell the error to a few in a thousand, and are read in no time."""


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


def measure_cost(
    stored: Mapping[str, StoredTensor], own: Mapping[str, float], common: Mapping[str, float]
) -> SharingCost:
    """Quantize the first rows of every weight with its own amax and with its group's.

    Args:
        stored: the plain checkpoint's tensors.
        own: module path to the amax of its weight.
        common: module path to that of its group.
    """
    power = 0.0
    errors = {"own": 0.0, "common": 0.0}
    for path in own:
        tensor = stored[f"{path}.weight"]
        rows = bits_of(tensor, 0, min(_ROWS, tensor.shape[0]) * tensor.shape[1])
        weight = torch.from_numpy(rows).view(torch.bfloat16).reshape(-1, tensor.shape[1]).float()
        power += float(weight.square().sum())
        alone = _squared_error(weight, own[path])
        errors["own"] += alone
        errors["common"] += alone if own[path] == common[path] else _squared_error(weight, common[path])
    return SharingCost(math.sqrt(errors["own"] / power), math.sqrt(errors["common"] / power))


def _squared_error(weight: torch.Tensor, amax: float) -> float:
    rounded = nvfp4.fake_quantize(weight, nvfp4.global_scale(amax))
    return float((rounded - weight).square().sum())
