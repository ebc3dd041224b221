"""Stored weights as BF16 numbers, or those that stay in FP32, a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from fp4trt.errors import BadCheckpoint
from fp4trt.safetensors_file import DTYPE_BYTES, StoredTensor

__all__ = [
    "as_bits",
    "as_fp32",
    "bits_of",
    "fp32_pieces_of",
    "largest_magnitude",
    "pieces_of",
    "refuse_other_types",
    "why_unusable",
]

_TORCH: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_MAGNITUDE: Final = 0x7FFF
_INFINITY: Final = 0x7F80
_LARGEST: Final = torch.finfo(torch.bfloat16).max


def refuse_other_types(name: str, stored: StoredTensor) -> None:
    """Refuse a tensor that is no floating-point number of 16 or 32 bit.

    Raises:
        BadCheckpoint: naming it.
    """
    if stored.dtype not in _TORCH:
        raise BadCheckpoint(
            f"{name} is stored as {stored.dtype}; expected one of: {', '.join(_TORCH)}: take such a checkpoint"
        )


def bits_of(stored: StoredTensor, begin: int = 0, end: int | None = None) -> npt.NDArray[np.uint16]:
    """Return elements ``begin`` to ``end`` of a tensor, flat, as the bits of BF16 numbers, rounded to nearest even."""
    size = DTYPE_BYTES[stored.dtype]
    return as_bits(stored.bytes(begin * size, stored.nbytes if end is None else end * size), stored.dtype)


def as_bits(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.uint16]:
    """Return the bytes of numbers of a safetensors dtype as the bits of BF16 numbers."""
    if dtype == "BF16":
        return data.view(np.uint16)
    return torch.from_numpy(data).view(_TORCH[dtype]).to(torch.bfloat16).view(torch.uint16).numpy()


def pieces_of(stored: StoredTensor) -> Iterator[npt.NDArray[np.uint16]]:
    """Yield all of a tensor as :func:`bits_of` gives it, in order; a piece holds until the next is asked for."""
    return (as_bits(data, stored.dtype) for data in stored.pieces())


def as_fp32(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Return the bytes of numbers of a safetensors dtype as FP32, which holds them exactly."""
    if dtype == "F32":
        return data.view(np.float32)
    return torch.from_numpy(data).view(_TORCH[dtype]).float().numpy()


def fp32_pieces_of(stored: StoredTensor) -> Iterator[npt.NDArray[np.float32]]:
    """Yield all of a tensor as :func:`as_fp32` gives it, in order; a piece holds until the next is asked for."""
    return (as_fp32(data, stored.dtype) for data in stored.pieces())


def largest_magnitude(bits: npt.NDArray[np.uint16]) -> float | None:
    """Return the largest magnitude of BF16 numbers, or None where one is NaN or infinite (see :func:`why_unusable`)."""
    # As signed integers the positive numbers lead, as unsigned ones the negative: two searches need no copy.
    largest = max(int(bits.view(np.int16).max(initial=0)), int(bits.max(initial=0)) & _MAGNITUDE)
    return None if largest >= _INFINITY else float(np.array(largest << 16, np.uint32).view(np.float32))


def why_unusable(stored: StoredTensor) -> str:
    """Return what is wrong with a tensor that BF16 cannot hold: NaN, infinite, or a finite number beyond its range."""
    largest = 0.0
    for piece in stored.pieces():
        values = torch.from_numpy(piece).view(_TORCH[stored.dtype]).float()
        if not values.isfinite().all():
            return "holds NaN or infinite values; expected finite weights"
        largest = max(largest, float(values.abs().max()))
    return f"holds {largest:.4g}, beyond BF16's range of {_LARGEST:.4g}; expected weights that BF16 can hold"
