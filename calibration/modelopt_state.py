"""A model that somebody quantized with ModelOpt already: restore its state in place of calibrating here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from calibration.errors import BadAmax, BadCheckpoint, Untrusted
from calibration.modelopt_backend import mto

__all__ = ["maxima", "restore"]


def restore(model: nn.Module, formats: Mapping[str, str], state: str | Path, trust: bool) -> nn.Module:
    """Return ``model`` with the weights and quantizers that ``modelopt.torch.opt.save`` wrote.

    Args:
        model: the unquantized model, of the same config.
        formats: module path to ``nvfp4`` or ``fp8`` of the linears that must be quantized, and no others.
        state: the file.
        trust: the user's word that the file is his own; it is a pickle, and reading it can run code.

    Raises:
        Untrusted: without ``trust``.
        BadCheckpoint: the file is no such state, or quantizes other linears, or in another format.
        BadAmax: a quantizer was never calibrated.
    """
    if not trust:
        raise Untrusted(f"{state} is a pickle, which can run code when read; add --trust if you made it yourself")
    if not Path(state).is_file():
        raise BadCheckpoint(f"{state} does not exist; expected a file that modelopt.torch.opt.save wrote")
    try:
        model = mto.restore(model, str(state))
    except Exception as error:  # whatever unpickling a stranger's file may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadCheckpoint(f"{state} is not a ModelOpt state of this model ({reason})") from None
    _check_selection(model, formats, state)
    return model


def maxima(model: nn.Module, paths: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return module path to amax of the inputs, and of the weights, of a restored model."""

    def of(kind: str) -> dict[str, float]:
        return {path: float(model.get_submodule(f"{path}.{kind}_quantizer").amax) for path in paths}  # type: ignore[arg-type]

    return of("input"), of("weight")


def _check_selection(model: nn.Module, formats: Mapping[str, str], state: str | Path) -> None:
    kinds = ("input_quantizer", "weight_quantizer")
    wanted = {f"{path}.{kind}": form for path, form in formats.items() for kind in kinds}
    enabled = {name: module for name, module in model.named_modules() if _is_enabled(name, module)}
    for name in sorted(wanted.keys() ^ enabled.keys()):
        what = "is not quantized" if name in wanted else "is quantized, which the recipe does not want"
        raise BadCheckpoint(
            f"{state}: {name} {what}; quantize exactly the family's linears (fp4trt inspect lists them)"
        )
    for name, module in enabled.items():
        quantizer: Any = module
        bits, block = ((4, 3), None) if wanted[name] == "fp8" else ((2, 1), 16)
        if quantizer.num_bits != bits or (quantizer.block_sizes or {}).get(-1) != block:
            expected = "FP8 with one scale a tensor" if wanted[name] == "fp8" else "NVFP4 in blocks of 16"
            raise BadCheckpoint(f"{state}: {name} has num_bits {quantizer.num_bits}; expected {expected}")
        amax = quantizer.amax
        if amax is None or amax.numel() != 1 or not math.isfinite(float(amax)) or float(amax) <= 0:
            raise BadAmax(f"{state}: {name} has amax {amax}; expected one finite number above 0: calibrate first")


def _is_enabled(name: str, module: nn.Module) -> bool:
    return name.endswith("_quantizer") and bool(getattr(module, "is_enabled", False))
