"""The quantized linears of any producer's checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fp4trt.safetensors_file import StoredTensor
from onnx_functions.layouts.readings import FP8_CODES, Floats, StoredLinear, Tile, floats_of

__all__ = ["QuantizedLinear", "quantized_linears"]

_CODES: Final = ("weight", "weight_packed")
_BLOCK_SCALES: Final = ("weight_scale",)
_GLOBAL_SCALES: Final = ("weight_scale_2", "weight_global_scale")
_FP8_SCALES: Final = ("weight_scale", "scale_weight")
_BESIDE: Final = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
_POWERS_OF_TWO: Final = ("U8", "F8_E8M0")
"""Dtypes of the block scales of MXFP8."""
FLOATS: Final = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear with all that its weight is made of.

    Attributes:
        stored: its codes and block scales.
        scale: the tensor that is its global scale (in FP8: its scale), "" without one.
        scales: its values: one, or one a row.
        smoothing: `pre_quant_scale` [K], None without.
        branch: `svdquant_lora_a` [rank, K] and `svdquant_lora_b` [N, rank], None without.
    """

    stored: StoredLinear
    scale: str
    scales: Floats
    smoothing: Floats | None
    branch: tuple[StoredTensor, StoredTensor] | None

    def beside(self, tile: Tile) -> Floats | None:
        """Return what the low-rank branch adds to a tile of the smoothed weight; None without one."""
        if self.branch is None:
            return None
        a, b = self.branch
        rank = a.shape[0]
        return np.asarray(floats_of(b, tile.row, tile.rows, 0, rank) @ floats_of(a, 0, rank, tile.column, tile.columns))


def quantized_linears(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, QuantizedLinear], dict[str, str]]:
    """Return the linears in NVFP4, FP8 and MXFP8 by path, and why those that look like some cannot be read at all."""
    found: dict[str, QuantizedLinear] = {}
    unread: dict[str, str] = {}
    for path, codes in _coded(tensors):
        fp4 = codes.dtype not in FP8_CODES
        scales = _first(tensors, path, _BLOCK_SCALES)
        if not fp4 and scales and tensors[scales].dtype not in _POWERS_OF_TWO:
            scales = ""
        names = _GLOBAL_SCALES if fp4 else () if scales else _FP8_SCALES
        scale = _first(tensors, path, names)
        if fp4 and (not scales or tensors[scales].dtype not in ("F8_E4M3", "U8")):
            unread[path] = f"{tensors[scales].dtype} block scales" if scales else "no block scales"
            continue
        values = _values(tensors[scale]) if scale else np.ones(1, np.float32)
        if values is None or values.size not in (1, codes.shape[0]):
            held = tensors[scale]
            unread[path] = f"{scale} is {held.dtype}{list(held.shape)}"
            continue
        beside = {leaf: tensors[f"{path}.{leaf}"] for leaf in _BESIDE if f"{path}.{leaf}" in tensors}
        if fault := _fault(beside, codes.shape[0], codes.shape[1] * (2 if fp4 else 1)):
            unread[path] = fault
            continue
        smoothing = beside.get(_BESIDE[0])
        found[path] = QuantizedLinear(
            StoredLinear(path, codes, tensors[scales] if scales else None),
            scale,
            values,
            _values(smoothing) if smoothing is not None else None,
            (beside[_BESIDE[1]], beside[_BESIDE[2]]) if _BESIDE[1] in beside else None,
        )
    return found, unread


def _fault(beside: Mapping[str, StoredTensor], rows: int, columns: int) -> str | None:
    """Return what is wrong with the smoothing or the branch of a linear [rows, columns]."""
    shapes = {leaf: stored.shape for leaf, stored in beside.items()}
    rank = shapes.get(_BESIDE[1], (0,))[0]
    wanted = dict(zip(_BESIDE, ((columns,), (rank, columns), (rows, rank)), strict=True))
    for leaf, shape in shapes.items():
        if shape != wanted[leaf] or beside[leaf].dtype not in FLOATS:
            return f"{leaf} is {beside[leaf].dtype}{list(shape)}, expected {list(wanted[leaf])}"
    return "half of a low-rank branch" if (_BESIDE[1] in beside) != (_BESIDE[2] in beside) else None


def _coded(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the matrices that hold codes of NVFP4, two a byte, or of FP8 and MXFP8."""
    for name, stored in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in _CODES and len(stored.shape) == 2 and stored.dtype in ("U8", "I8", *FP8_CODES):
            yield path, stored


def _first(tensors: Mapping[str, StoredTensor], path: str, leaves: tuple[str, ...]) -> str:
    return next((f"{path}.{leaf}" for leaf in leaves if f"{path}.{leaf}" in tensors), "")


def _values(stored: StoredTensor) -> Floats | None:
    """Return all of a small tensor, flat; None where it is of no floating-point type."""
    if stored.dtype not in FLOATS or stored.nbytes > 1 << 24:
        return None
    count = math.prod(stored.shape)
    return floats_of(replace(stored, shape=(1, count)), 0, 1, 0, count).reshape(-1)
