"""Weights that were cast to FP8, with a scale beside them or without, as BF16.

ComfyUI writes such files: ``X.weight`` in E4M3 or E5M2, ``X.weight_scale`` (before: ``X.scale_weight``), one number or
one a row, that multiplies. A value is the product in FP32, rounded to BF16 once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadCheckpoint
from fp4trt.made_tensors import MadeTensor, as_bf16_bits
from fp4trt.safetensors_file import StoredTensor

__all__ = ["FP8", "dequantized", "is_beside"]

FP8: Final[Mapping[str, Any]] = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
"""Dtypes that are dequantized."""

_SCALES: Final = ("weight_scale", "scale_weight")
_BESIDE: Final = (*_SCALES, "input_scale", "scale_input", "comfy_quant")
_MARK: Final = "scaled_fp8"


def is_beside(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether a tensor belongs to a weight in FP8, or marks a file of such weights."""
    path, _, leaf = name.rpartition(".")
    weight = tensors.get(f"{path}.weight")
    return name == _MARK or (leaf in _BESIDE and weight is not None and weight.dtype in FP8)


def dequantized(name: str, tensors: Mapping[str, StoredTensor]) -> MadeTensor:
    """Return a weight in FP8 as BF16, made as it is read.

    Raises:
        BadCheckpoint: its scale is neither one number nor one a row.
    """
    stored = tensors[name]
    path = name.removesuffix(".weight")
    where = f"{stored.file}: {path}"
    scales = [_floats(where, tensors[f"{path}.{leaf}"]) for leaf in _SCALES if f"{path}.{leaf}" in tensors]
    if not scales and (other := _scaled(tensors)) is not None:
        raise BadCheckpoint(f"{where}.weight has no scale, as {other} has one; copy the file again, or take another")
    if len(scales) > 1 and not np.array_equal(scales[0], scales[1]):
        raise BadCheckpoint(f"{where} has two scales ({' and '.join(_SCALES)}) that differ; take another file")
    values = scales[0] if scales else np.ones(1, np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise BadCheckpoint(
            f"{where} has a scale of {float(values.min()):g}; expected numbers above 0: take another file"
        )
    if values.size not in (1, stored.shape[0]):
        raise BadCheckpoint(
            f"{stored.file}: {path} has {values.size} scales for {stored.shape[0]} rows; expected one, or one a row: "
            "take the BF16 file"
        )
    numbers = np.arange(256, dtype=np.uint8).view(FP8[stored.dtype]).astype(np.float32)
    with np.errstate(all="ignore"):
        tables = as_bf16_bits(values.reshape(-1, 1) * numbers)
    columns = stored.nbytes // max(1, stored.shape[0])
    return MadeTensor.of(stored, "BF16", stored.shape, functools.partial(_rows, stored, tables, columns))


def _scaled(tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return a weight in FP8 that has a scale beside it, None where all of them were cast without any."""
    for name in tensors:
        path, _, leaf = name.rpartition(".")
        weight = tensors.get(f"{path}.weight")
        if leaf in _SCALES and weight is not None and weight.dtype in FP8:
            return f"{path}.weight"
    return None


def _rows(
    stored: StoredTensor, tables: npt.NDArray[np.uint16], columns: int, first: int, last: int
) -> npt.NDArray[np.uint8]:
    codes = stored.bytes(first * columns, last * columns).reshape(last - first, columns)
    if len(tables) == 1:
        bits = tables[0][codes]
    else:
        bits = np.take_along_axis(tables[first:last], codes.astype(np.intp), axis=1)
    return bits.reshape(-1).view(np.uint8)


def _floats(path: str, stored: StoredTensor) -> npt.NDArray[np.float32]:
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    if stored.dtype not in kinds:
        raise BadCheckpoint(f"{path} has a scale in {stored.dtype}; expected one of: {', '.join(kinds)}")
    return np.asarray(stored.bytes().view(kinds[stored.dtype]).astype(np.float32))
