"""Post-training quantization to NVFP4 through ModelOpt, on exactly the linears that a family names.

ModelOpt holds the quantizers and measures their maxima; the arithmetic is :mod:`calibration.nvfp4`, registered as a
ModelOpt backend because ModelOpt's own NVFP4 kernel refuses the CPU. On CUDA the same code runs.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from calibration import nvfp4
from calibration.errors import BadAmax
from calibration.modelopt_backend import NVFP4, mtq

__all__ = ["insert_quantizers", "measure_input_amax", "share_global_scales"]

Amax = dict[str, float]
"""Module path of a linear to the largest magnitude of its input."""


def _quantize(model: nn.Module, quantizers: Iterable[str], forward: Any) -> None:
    """Insert ModelOpt's quantizers in place, enabled by name and nowhere else, and calibrate them by maximum."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": name, "cfg": NVFP4, "enable": True} for name in quantizers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints how many it inserted
        # No forward loop is how maxima from a file are used; ModelOpt warns that it calibrates weights only.
        warnings.filterwarnings("ignore", message=".*forward_loop.*")
        mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, forward)


def measure_input_amax(module: nn.Module, paths: Sequence[str], run: Callable[[], None]) -> Amax:
    """Return the largest magnitude that enters each linear of a module while it runs; NaN for one never reached.

    Args:
        module: unquantized, a model or one of its blocks; left with disabled quantizers.
        paths: of the linears, within the module.
        run: runs the module on all calls.
    """

    def forward(_: nn.Module) -> None:
        with torch.no_grad():
            run()

    _quantize(module, [f"{path}.input_quantizer" for path in paths], forward)
    return {path: _amax(module.get_submodule(f"{path}.input_quantizer")) for path in paths}


def _amax(quantizer: Any) -> float:
    return math.nan if quantizer.amax is None else float(quantizer.amax)


def checked(amax: Mapping[str, Any], paths: Sequence[str]) -> Amax:
    """Return the maxima of these linears in their order.

    Raises:
        BadAmax: one is missing, or gives no finite global scale above 0 in FP32 (zero, negative, NaN, infinite, no
            number, too small or too large), naming the linear.
    """
    for path in paths:
        value = amax.get(path)
        if value is None:
            raise BadAmax(f"no amax for the input of {path}; calibrate with data that reach every quantized linear")
        if isinstance(value, bool) or not isinstance(value, int | float) or not _gives_scale(value):
            raise BadAmax(f"amax of the input of {path} is {value!r}; expected a number above 0: calibrate again")
    return {path: float(amax[path]) for path in paths}


def checked_weights(amax: Mapping[str, float]) -> Amax:
    """Return the maxima of these linears' weights.

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


def insert_quantizers(model: nn.Module, paths: Sequence[str], input_amax: Mapping[str, float]) -> None:
    """Quantize the model in place: weights by their own maxima, inputs by the given ones, a scale for each linear.

    Raises:
        BadAmax: a weight is all zeros, or not finite.
    """
    _quantize(model, [f"{path}.{kind}" for path in paths for kind in ("input_quantizer", "weight_quantizer")], None)
    for path in paths:
        linear: Any = model.get_submodule(path)
        linear.input_quantizer.amax = torch.tensor(input_amax[path])
        checked_weights({path: _amax(linear.weight_quantizer)})


def share_global_scales(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    """Give the members of each group one global scale for weights and one for activations: the group's largest.

    TensorRT merges linears that read the same input into one FP4 GEMM only where both are equal.
    """
    for group in groups:
        for kind in ("input_quantizer", "weight_quantizer"):
            quantizers: list[Any] = [model.get_submodule(f"{path}.{kind}") for path in group]
            largest = max(float(quantizer.amax) for quantizer in quantizers)
            for quantizer in quantizers:
                quantizer.amax = torch.tensor(largest)
