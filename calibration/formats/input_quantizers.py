"""Amax for post-training quantization: ModelOpt measures that of the inputs, on exactly the linears named."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from calibration.formats import nvfp4
from fp4trt.errors import BadAmax
from fp4trt.file_kind import shortened
from fp4trt.number_formats import NVFP4

__all__ = ["Amax", "checked", "checked_weights", "measure_input_amax"]

Amax = dict[str, float]
"""Module path of a linear to the largest magnitude of its input; ``A.q`` of an attention's operand to its own."""


_FP32: Final = torch.finfo(torch.float32)
_SMALLEST: Final = _FP32.tiny * nvfp4.E2M1_MAX * nvfp4.E4M3_MAX
_LARGEST: Final = _FP32.max
"""Between them a maximum is an FP32 number, and its global scale a normal one, which hardware does not take for 0."""


def measure_input_amax(module: nn.Module, paths: Sequence[str], run: Callable[[], None]) -> Amax:
    """Return the largest magnitude that enters each linear of a module while it runs; NaN for one never reached.

    Args:
        module: unquantized, a model or one of its blocks; left with disabled quantizers.
        paths: of the linears, within the module.
        run: runs the module on all calls.
    """
    from calibration.formats.modelopt_backend import mtq

    def forward(_: nn.Module) -> None:
        with torch.no_grad():
            run()

    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": f"{path}.input_quantizer", "cfg": NVFP4.modelopt["quantizer"], "enable": True}
        for path in paths
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many it inserted
        mtq.quantize(module, {"quant_cfg": entries, "algorithm": "max"}, forward)
    found: dict[str, Any] = {path: module.get_submodule(f"{path}.input_quantizer").amax for path in paths}
    return {path: math.nan if amax is None else float(amax) for path, amax in found.items()}


def checked(amax: Mapping[str, Any], paths: Sequence[str]) -> Amax:
    """Return the amax values of these linears in their order.

    Raises:
        BadAmax: one is missing, or gives no normal global scale in FP32 (zero, negative, NaN, infinite, no number, too
            small or too large), naming the linear.
    """
    for path in paths:
        value = amax.get(path)
        if value is None:
            raise BadAmax(f"no amax for the input of {path}; calibrate with data that reach every quantized linear")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise BadAmax(f"amax of the input of {path} is {value!r}; expected a number above 0: calibrate again")
        if not _SMALLEST <= value <= _LARGEST:
            raise BadAmax(
                f"amax of the input of {path} is {shortened(repr(value))}, which is beyond FP32's range or gives a "
                f"scale that is no normal FP32 number; expected {_SMALLEST:.3g} to {_LARGEST:.3g}: calibrate again"
            )
    return {path: float(amax[path]) for path in paths}


def checked_weights(amax: Mapping[str, float]) -> Amax:
    """Return the amax values of these linears' weights.

    Raises:
        BadAmax: a weight is all zeros, or so small or large that no FP32 global scale fits it, naming the linear.
    """
    for path, value in amax.items():
        if not _gives_scale(value):
            raise BadAmax(f"amax of the weight of {path} is {value}; expected finite weights that are not all zero")
    return dict(amax)


def _gives_scale(amax: float) -> bool:
    scale = float(nvfp4.global_scale(amax)) if math.isfinite(amax) else math.nan
    return 0 < scale < math.inf
