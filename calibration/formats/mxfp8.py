"""The number format MXFP8: E4M3 codes, a power of two as the scale of each block of 32.

Two implementations that agree bit for bit. The *reference* (numpy, one block at a time, exponent and code by search) is
there to be read; the *fast* one (torch, CPU or CUDA) is there to be run. Both compute in FP32::

    e = ceil(log2(amax of the block / 448))        clamped to -127..127; -127 for a block of zeros
    scale = E8M0(e) = e + 127                      one byte
    code = E4M3(clip(x / 2^e, -448, 448))          nearest, ties to even
    value = code * 2^e

There is no scale of the tensor, so nothing has to be calibrated. Source: OCP Microscaling Formats v1.0 for E8M0; the
exponent is rounded up as ModelOpt, ComfyUI and torchao's ``RCEIL`` do, so that no code saturates, where the
specification's own example rounds down.
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
    "BLOCK_SIZE",
    "E4M3_MAX",
    "dequantize",
    "fake_quantize",
    "packer",
    "quantize",
    "quantize_reference",
    "restored",
    "stored",
    "tensor_scale",
]

BLOCK_SIZE: Final = 32
E4M3_MAX: Final = 448.0
_BIAS: Final = 127
_LARGEST: Final = 254
"""Largest byte of a scale: 255 is E8M0's NaN."""

_MAGNITUDES: Final = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
"""Magnitude of codes 0..126; 127 is NaN, and bit 7 of a code its sign."""

_POWERS: Final = torch.from_numpy(np.ldexp(1.0, np.arange(-_BIAS, _LARGEST - _BIAS + 1)).astype(np.float32))
"""FP32 value of scales 0..254; those of 0 and 254 - b and b are inverse to each other, exactly."""


def tensor_scale(amax: torch.Tensor | float) -> torch.Tensor:
    """Return 1 in the shape of ``amax``: the format has no scale of a tensor."""
    return torch.ones_like(torch.as_tensor(amax, dtype=torch.float32))


def quantize_reference(
    x: npt.NDArray[np.float32],
    scale: float | np.float32 = 1.0,  # noqa: ARG001 - the format has none
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize to MXFP8, slowly and obviously.

    Args:
        x: FP32, shape [..., K], K a multiple of 32, finite.
        scale: of no effect.

    Returns:
        codes, the bytes of E4M3 values, shape [..., K]; block scales, E8M0 bytes, shape [..., K / 32].
    """
    blocks = np.asarray(x, np.float32).reshape(-1, BLOCK_SIZE)
    codes, scales = np.empty(blocks.shape, np.uint8), np.empty(len(blocks), np.uint8)
    for row, block in enumerate(blocks):
        quotient = np.abs(block).max() / np.float32(E4M3_MAX)
        scales[row] = next((byte for byte in range(_LARGEST) if quotient <= 2.0 ** (byte - _BIAS)), _LARGEST)
        for column, value in enumerate(block):
            codes[row, column] = _nearest_code(float(value) / 2.0 ** (int(scales[row]) - _BIAS))
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)


def _nearest_code(q: float) -> int:
    """Return the E4M3 code nearest to ``q``; of two equally near, the even one."""
    distances = np.abs(min(abs(q), E4M3_MAX) - _MAGNITUDES)
    candidates = np.flatnonzero(distances == distances.min())
    code = next((int(code) for code in candidates if code % 2 == 0), int(candidates[0]))
    return code | (0x80 if np.signbit(q) else 0)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to MXFP8; bit-identical to :func:`quantize_reference`.

    Args:
        x: BF16, FP16 or FP32, shape [..., K], K a multiple of 32, finite.

    Returns:
        codes, float8_e4m3fn, shape [..., K]; block scales, E8M0 as uint8, shape [..., K / 32].
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK_SIZE))
    mantissa, exponent = torch.frexp(blocks.abs().amax(dim=-1) / E4M3_MAX)
    # quotient = mantissa * 2^exponent with a mantissa of .5 to 1; only of exactly .5 it is a power of two below that.
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1)
    scales = torch.where(mantissa == 0, 0, (exponent + _BIAS).clamp(0, _LARGEST)).to(torch.uint8)
    inverse = _POWERS.to(x.device)[(_LARGEST - scales).int()]
    codes = (blocks * inverse.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return ``code * 2^(scale - 127)`` in FP32.

    Args:
        codes: float8_e4m3fn, shape [..., K].
        scales: E8M0 as uint8, shape [..., K / 32].
    """
    steps = _POWERS.to(codes.device)[scales.int()]
    return (codes.float().unflatten(-1, (-1, BLOCK_SIZE)) * steps.unsqueeze(-1)).flatten(-2)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 - the format has none
    """Quantize and dequantize, in ``x``'s dtype; a gradient goes straight through.

    Args:
        x: BF16, FP16 or FP32, shape [..., K], K a multiple of 32.
        scale: of no effect.
    """
    return straight_through(x, lambda value: dequantize(*quantize(value)).to(value.dtype))


def stored(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """Return what a checkpoint holds of a weight [N, K] rounded to nearest, by leaf; ``scale`` has no effect."""
    codes, scales = quantize(weight)
    return {"weight": codes, "weight_scale": scales}


def restored(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the FP32 weight [N, K] that :func:`stored` tensors stand for.

    Raises:
        ValueError: a block scale is NaN.
    """
    if (tensors["weight_scale"] > _LARGEST).any():
        raise ValueError("weight_scale holds 255, E8M0's NaN; expected scales of 0 to 254")
    return dequantize(tensors["weight"], tensors["weight_scale"])


def packer(scale: torch.Tensor, device: str) -> Pack:  # noqa: ARG001
    """Return what packs BF16 weights, on ``cpu`` or ``cuda``; bit-identical to :func:`stored`."""

    def pack(bits: npt.NDArray[np.uint16]) -> dict[str, npt.NDArray[np.uint8]]:
        weight = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16).to(device)
        codes, scales = quantize(weight)
        return {"weight": codes.view(torch.uint8).cpu().numpy(), "weight_scale": scales.cpu().numpy()}

    return pack
