"""The number format FP8, per tensor: E4M3 codes under one FP32 scale.

Two implementations that agree bit for bit. The *reference* (numpy, one value at a time, nearest value by search) is
there to be read; the *fast* one (torch, CPU or CUDA) is there to be run. Both compute in FP32::

    scale = amax / 448
    code = E4M3(clip(x / scale, -448, 448))        nearest, ties to even; a zero keeps its sign
    value = code * scale

Source: OCP FP8 v1.0 for E4M3 (no infinity; 448 is the largest number); ONNX's QuantizeLinear and DequantizeLinear,
which ONNX Runtime computes so, as ModelOpt's export of weights does. TensorRT multiplies by 1 / scale, and ModelOpt's
fake quantization by 448 / amax: that differs in the last place of a quotient, and so in the code of one at a tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from calibration.formats.arithmetic import Pack
from calibration.formats.straight_through import straight_through

__all__ = [
    "E4M3_MAX",
    "codes_by_bits",
    "dequantize",
    "fake_quantize",
    "packer",
    "quantize",
    "quantize_reference",
    "restored",
    "stored",
    "tensor_scale",
]

E4M3_MAX: Final = 448.0

_MAGNITUDES: Final = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
"""Magnitude of codes 0..126; 127 is NaN, and bit 7 of a code its sign."""


def tensor_scale(amax: torch.Tensor | float) -> torch.Tensor:
    """Return the FP32 scale ``amax / 448``, shape of ``amax`` (0-d for a number)."""
    return torch.as_tensor(amax, dtype=torch.float32) / E4M3_MAX


def quantize_reference(x: npt.NDArray[np.float32], scale: float | np.float32) -> npt.NDArray[np.uint8]:
    """Quantize to FP8, slowly and obviously.

    Args:
        x: FP32, any shape.
        scale: FP32, above 0.

    Returns:
        The bytes of E4M3 values, shape of ``x``.

    Raises:
        ValueError: ``x`` holds NaN or infinite values.
    """
    values = np.asarray(x, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("FP8 codes of NaN or infinite values were asked for; expected finite values")
    with np.errstate(over="ignore", under="ignore"):
        quotients = values / np.float32(scale)
    return np.array([_nearest_code(q) for q in quotients.reshape(-1)], np.uint8).reshape(values.shape)


def _nearest_code(q: np.float32) -> int:
    """Return the E4M3 code nearest to ``q``; of two equally near, the even one."""
    distances = np.abs(min(abs(float(q)), E4M3_MAX) - _MAGNITUDES)
    candidates = np.flatnonzero(distances == distances.min())
    code = next((int(code) for code in candidates if code % 2 == 0), int(candidates[0]))
    return code | (0x80 if np.signbit(q) else 0)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize to FP8; bit-identical to :func:`quantize_reference`.

    Args:
        x: BF16, FP16 or FP32, any shape.
        scale: FP32, 0-d, above 0.

    Returns:
        float8_e4m3fn, shape of ``x``.

    Raises:
        ValueError: ``x`` holds NaN or infinite values.
    """
    if not x.isfinite().all():
        raise ValueError("FP8 codes of NaN or infinite values were asked for; expected finite values")
    return _codes(x, scale)


def _codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``code * scale`` in FP32; ``codes`` float8_e4m3fn, any shape, ``scale`` FP32, 0-d."""
    return codes.float() * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize: ``dequantize(quantize(x, scale), scale)`` in ``x``'s dtype; NaN stays NaN.

    A gradient goes straight through.

    Args:
        x: BF16, FP16 or FP32, any shape.
        scale: FP32, 0-d, above 0.
    """
    return straight_through(x, lambda value: dequantize(_codes(value, scale), scale).to(value.dtype))


def codes_by_bits(scale: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return the code of every BF16 number by its bits: uint8 [65536], so that packing a weight is one look-up each.

    NaN and infinities have the code of NaN.
    """
    bits = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    numbers = torch.from_numpy(bits.view(np.float32))
    codes = _codes(numbers, scale).view(torch.uint8)
    return torch.where(numbers.isfinite(), codes, 0x7F).to(torch.uint8).numpy()


def stored(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a weight [N, K] rounded to nearest under a scale, by leaf.

    Raises:
        ValueError: the weight holds NaN or infinite values.
    """
    return {"weight": quantize(weight, scale), "weight_scale": scale}


def restored(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the FP32 weight [N, K] that :func:`stored` tensors stand for."""
    return dequantize(tensors["weight"], tensors["weight_scale"])


def packer(scale: torch.Tensor, device: str) -> Pack:  # noqa: ARG001 - a table look-up is as fast as the disk
    """Return what packs BF16 weights under a scale; bit-identical to :func:`stored`."""
    codes = codes_by_bits(scale)
    return lambda bits: {"weight": codes[bits]}
