"""The maxima of post-training quantization: ModelOpt measures them, on exactly the linears and attentions named."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from calibration import nvfp4
from calibration.errors import BadAmax

__all__ = ["Amax", "attention_operands", "checked", "checked_attentions", "checked_weights", "measure_input_amax"]

Amax = dict[str, float]
"""Module path of a linear, or operand of an attention, to its largest magnitude: of the linear's input."""


def attention_operands(attentions: Iterable[str]) -> tuple[str, ...]:
    """Return ``A.q``, ``A.k`` and ``A.v`` of each attention A, as maxima name the operands of its two products."""
    return tuple(f"{path}.{operand}" for path in attentions for operand in ("q", "k", "v"))


def measure_input_amax(
    module: nn.Module, paths: Sequence[str], run: Callable[[], None], attentions: Sequence[str] = ()
) -> Amax:
    """Return the largest magnitude that enters each linear of a module while it runs; NaN for one never reached.

    And that of the operands of each attention's products, query and key with their positions.

    Args:
        module: unquantized, a model or one of its blocks; left with disabled quantizers.
        paths: of the linears, within the module.
        run: runs the module on all calls.
        attentions: of diffusers' attentions, within the module.
    """
    from calibration.modelopt_backend import FP8, NVFP4, mtq

    def forward(_: nn.Module) -> None:
        with torch.no_grad():
            run()

    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    quantizers = {path: f"{path}.input_quantizer" for path in paths}
    operands = {operand: f"{operand}_bmm_quantizer" for operand in attention_operands(attentions)}
    entries += [{"quantizer_name": name, "cfg": NVFP4, "enable": True} for name in quantizers.values()]
    entries += [{"quantizer_name": name, "cfg": FP8, "enable": True} for name in operands.values()]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many it inserted
        mtq.quantize(module, {"quant_cfg": entries, "algorithm": "max"}, forward)
    found: dict[str, Any] = {key: module.get_submodule(name).amax for key, name in (quantizers | operands).items()}
    return {path: math.nan if amax is None else float(amax) for path, amax in found.items()}


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


def checked_attentions(amax: Mapping[str, Any], attentions: Sequence[str]) -> Amax:
    """Return the maxima of these attentions' operands in their order.

    Raises:
        BadAmax: one is missing, or gives no scale, naming the operand.
    """
    operands = attention_operands(attentions)
    for operand in operands:
        if operand not in amax:
            raise BadAmax(
                f"no amax for {operand}, an operand of attention; expected maxima with {', '.join(operands[:3])} for "
                "attention in FP8: run fp4trt calibrate again, or choose a recipe with attention: bf16"
            )
    return checked(amax, operands)


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
