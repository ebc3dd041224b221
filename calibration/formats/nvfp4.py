"""The number format NVFP4: E2M1 codes, an E4M3 scale per block of 16, one FP32 global scale per tensor.

Two implementations that agree bit for bit. The *reference* (numpy, one block at a time, nearest value by search) is
there to be read; the *fast* one (torch, CPU or CUDA) is there to be run. Both compute in FP32::

    g  = amax / (6 * 448)                          global scale
    s8 = E4M3(min(amax of the block / (6 * g), 448))
    d  = s8 * g                                    what one code step is worth
    code = E2M1(clip(x / d, -6, 6))                nearest, ties to even; a block whose d is 0 has codes +-0

so that codes are always taken with the block scale *after* its rounding. Source: NVIDIA's NVFP4 recipe as TensorRT's
TRT_FP4DynamicQuantize computes it; OCP Microscaling Formats v1.0 for E2M1, OCP FP8 v1.0 for E4M3.
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
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "block_scales",
    "codes_under",
    "dequantize",
    "dequantize_reference",
    "fake_quantize",
    "global_scale",
    "pack_codes",
    "packer",
    "quantize",
    "quantize_reference",
    "restored",
    "stored",
    "tensor_scale",
    "unpack_codes",
    "values_under",
]

BLOCK_SIZE: Final = 16
E2M1_MAX: Final = 6.0
E4M3_MAX: Final = 448.0
E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0..7; bit 3 of a code is its sign."""

_HUGE: Final = float(np.finfo(np.float32).max)
"""Stands in for a zero divisor: x / _HUGE rounds to a zero that keeps x's sign."""

_PART: Final = 1 << 17
"""Elements that are rounded at a time on a CPU, so that what is computed of them stays in the cache."""


def global_scale(amax: torch.Tensor | float, largest: float = E4M3_MAX) -> torch.Tensor:
    """Return the FP32 global scale ``amax / (6 * largest)``, shape of ``amax`` (0-d for a number).

    Args:
        amax: the largest magnitude.
        largest: the block scale that it gets; less than 448 leaves room to enlarge scales.
    """
    return torch.as_tensor(amax, dtype=torch.float32) / (E2M1_MAX * largest)


def tensor_scale(amax: torch.Tensor | float) -> torch.Tensor:
    """Return the FP32 global scale ``amax / (6 * 448)``, shape of ``amax`` (0-d for a number)."""
    return global_scale(amax)


def quantize_reference(
    x: npt.NDArray[np.float32], scale: float | np.float32
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize to NVFP4, slowly and obviously.

    Args:
        x: FP32, shape [..., K], K a multiple of 16, finite.
        scale: the FP32 global scale, above 0.

    Returns:
        codes, uint8 0..15, shape [..., K]; block scales, the bytes of E4M3 values, shape [..., K / 16].
    """
    g = np.float32(scale)
    blocks = np.asarray(x, np.float32).reshape(-1, BLOCK_SIZE)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(len(blocks), np.uint8)
    with np.errstate(over="ignore", under="ignore"):
        for row, block in enumerate(blocks):
            wanted = min(np.abs(block).max() / (np.float32(E2M1_MAX) * g), np.float32(E4M3_MAX))
            s8 = np.asarray(wanted, np.float32).astype(ml_dtypes.float8_e4m3fn)
            d = np.float32(s8) * g
            scales[row] = s8.view(np.uint8)
            for column, value in enumerate(block):
                codes[row, column] = _nearest_code(value / (d if d != 0 else np.float32(_HUGE)))
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)


def _nearest_code(q: np.float32) -> int:
    """Return the E2M1 code nearest to ``q``; of two equally near, the even one."""
    magnitude = min(abs(float(q)), E2M1_MAX)
    distances = [abs(magnitude - value) for value in E2M1_VALUES]
    nearest = min(distances)
    candidates = [code for code, distance in enumerate(distances) if distance == nearest]
    code = next((code for code in candidates if code % 2 == 0), candidates[0])
    return code | (8 if np.signbit(q) else 0)


def dequantize_reference(
    codes: npt.NDArray[np.uint8], block_scales: npt.NDArray[np.uint8], scale: float | np.float32
) -> npt.NDArray[np.float32]:
    """Return ``code * (block scale * global scale)`` in FP32, shape [..., K].

    Args:
        codes: uint8 0..15, shape [..., K].
        block_scales: the bytes of E4M3 values, shape [..., K / 16].
        scale: the FP32 global scale.
    """
    table = np.array([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], np.float32)
    d = block_scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)
    return np.asarray(table[codes] * np.repeat(d, BLOCK_SIZE, axis=-1), np.float32)


def block_scales(amax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 scale of blocks with these largest magnitudes (FP32, any shape) under an FP32 global scale."""
    return (amax / (E2M1_MAX * scale)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


def _block_scales(blocks: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 scale of every block; ``blocks`` FP32 [..., K / 16, 16], result [..., K / 16, 1]."""
    return block_scales(blocks.abs().amax(dim=-1, keepdim=True), g)


def _scaled(blocks: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Return ``blocks / d`` clipped to +-6, with a zero ``d`` giving zeros that keep their sign."""
    return (blocks / torch.where(d == 0, _HUGE, d)).clamp(-E2M1_MAX, E2M1_MAX)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    return x.float().unflatten(-1, (x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE))


def quantize(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to NVFP4; bit-identical to :func:`quantize_reference`.

    Args:
        x: BF16, FP16 or FP32, shape [..., K], K a multiple of 16, finite.
        scale: the FP32 global scale, 0-d, above 0.

    Returns:
        codes, uint8 0..15, shape [..., K]; block scales, float8_e4m3fn, shape [..., K / 16].
    """
    blocks = _blocks(x)
    s8 = _block_scales(blocks, scale)
    return codes_under(blocks, s8.float() * scale).flatten(-2), s8.squeeze(-1)


def codes_under(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Return the codes, uint8 0..15, of FP32 values where one step is worth ``d`` (block scale times global scale)."""
    q = _scaled(x, d)
    a = q.abs()
    # Three ramps, one per step size: under 2 (codes 0..4), 2..4 (two more), 4..6 (one more). Each difference is exact.
    code = (2 * a.clamp(max=2)).round() + (a - 2).clamp(0, 2).round() + ((a - 4) / 2).clamp(0, 1).round()
    return code.to(torch.uint8) | (torch.signbit(q).to(torch.uint8) << 3)


def dequantize(codes: torch.Tensor, block_scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``code * (block scale * global scale)`` in FP32; bit-identical to :func:`dequantize_reference`.

    Args:
        codes: uint8 0..15, shape [..., K].
        block_scales: float8_e4m3fn, shape [..., K / 16].
        scale: the FP32 global scale, 0-d.
    """
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=codes.device)
    d = block_scales.float() * scale
    # index_select and a broadcast product: a third of the time that indexing and repeat_interleave take.
    values = table.index_select(0, codes.reshape(-1).int()).reshape(*d.shape, BLOCK_SIZE)
    return (values * d.unsqueeze(-1)).flatten(-2)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize: ``dequantize(*quantize(x, scale), scale)`` in ``x``'s dtype, without the codes.

    A gradient goes straight through.

    Args:
        x: BF16, FP16 or FP32, shape [..., K], K a multiple of 16.
        scale: the FP32 global scale, 0-d, above 0.
    """
    return straight_through(x, lambda value: _rounded(value, scale))


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if not x.is_cpu or x.numel() <= _PART:
        return _rounded_part(x, scale)
    rows, rounded = x.reshape(-1, x.shape[-1]), torch.empty(x.shape, dtype=x.dtype)
    count = max(1, _PART // x.shape[-1])
    for part, into in zip(rows.split(count), rounded.view(rows.shape).split(count), strict=True):
        into.copy_(_rounded_part(part, scale))
    return rounded


def _rounded_part(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(x)
    return values_under(blocks, _block_scales(blocks, scale).float() * scale).flatten(-2).to(x.dtype)


def values_under(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Return what :func:`codes_under` stands for, dequantized: FP32, of ``x``'s shape."""
    q = _scaled(x, d)
    a = q.abs()
    value = (2 * a.clamp(max=2)).round() / 2 + (a - 2).clamp(0, 2).round() + 2 * ((a - 4) / 2).clamp(0, 1).round()
    return torch.copysign(value, q) * d


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack two codes per byte, the first in the low nibble (ONNX FLOAT4E2M1 and ModelOpt alike): [..., K / 2] uint8."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_codes`: [..., K / 2] uint8 to [..., K] uint8 0..15."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def stored(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a weight [N, K] rounded to nearest under a global scale, by leaf."""
    codes, block_scales = quantize(weight, scale)
    return {"weight": pack_codes(codes), "weight_scale": block_scales, "weight_scale_2": scale}


def restored(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the FP32 weight [N, K] that :func:`stored` tensors stand for.

    Raises:
        ValueError: a block scale is NaN or negative.
    """
    scales = tensors["weight_scale"]
    if not (scales.float() >= 0).all():
        raise ValueError("weight_scale holds NaN or negative block scales; expected what NVFP4 has, zero at least")
    return dequantize(unpack_codes(tensors["weight"]), scales, tensors["weight_scale_2"])


def packer(scale: torch.Tensor, device: str) -> Pack:
    """Return what packs BF16 weights under a global scale, on ``cpu`` or ``cuda``; bit-identical to :func:`stored`."""
    from calibration.formats.nvfp4_packer import DevicePacker, Packer

    pack = Packer(scale.item()).pack if device == "cpu" else DevicePacker(scale.item(), device).pack
    return lambda bits: dict(zip(("weight", "weight_scale"), pack(bits), strict=True))
