"""What it costs to give a merged group one global scale: measured, not assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from calibration import nvfp4, ptq
from calibration.dataset import Inputs

__all__ = ["SharingCost", "outputs", "share_and_measure"]

_CALLS: Final = 4
"""As many captured calls, spread over the schedule, are enough to see the difference."""


@dataclass(frozen=True)
class SharingCost:
    """Relative L2 errors against the unquantized model, with a scale for each linear and with one for each group.

    Attributes:
        weight_own: of all quantized weights together, each with its own global scale.
        weight_shared: with its group's.
        output_own: of the model's output on calibration inputs; None where only maxima were given.
        output_shared: with shared scales.
    """

    weight_own: float
    weight_shared: float
    output_own: float | None = None
    output_shared: float | None = None


def outputs(model: nn.Module, calls: Sequence[Inputs]) -> list[tuple[Inputs, torch.Tensor]]:
    """Return some of the calls, spread evenly, each with what the model answers (FP32)."""
    step = max(1, math.ceil(len(calls) / _CALLS))
    with torch.inference_mode():
        return [(call, model(**call, return_dict=False)[0].float()) for call in calls[::step]]


def share_and_measure(
    model: nn.Module, groups: Sequence[Sequence[str]], expected: Sequence[tuple[Inputs, torch.Tensor]]
) -> SharingCost:
    """Share the groups' global scales in place and return the errors before and after.

    Args:
        model: with calibrated ModelOpt quantizers.
        groups: module paths of linears that read the same input.
        expected: calls with the unquantized model's outputs; may be empty.
    """
    paths = [path for group in groups for path in group]
    before = _weight_error(model, paths), _output_error(model, expected)
    ptq.share_global_scales(model, groups)
    return SharingCost(before[0], _weight_error(model, paths), before[1], _output_error(model, expected))


def _weight_error(model: nn.Module, paths: Sequence[str]) -> float:
    error = power = 0.0
    for path in paths:
        linear: Any = model.get_submodule(path)
        weight = linear.weight.detach()
        rounded = nvfp4.fake_quantize(weight, nvfp4.global_scale(linear.weight_quantizer.amax.float()))
        error += float((rounded.float() - weight.float()).square().sum())
        power += float(weight.float().square().sum())
    return math.sqrt(error / power)


def _output_error(model: nn.Module, expected: Sequence[tuple[Inputs, torch.Tensor]]) -> float | None:
    if not expected:
        return None
    error = power = 0.0
    with torch.inference_mode():
        for call, output in expected:
            error += float((model(**call, return_dict=False)[0].float() - output).square().sum())
            power += float(output.square().sum())
    return math.sqrt(error / power)
