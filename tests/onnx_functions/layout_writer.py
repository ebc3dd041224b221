"""Checkpoints in the layouts of several producers, from 16-bit weights: a tiny writer of each.

Held once by hand against comfy-kitchen 0.2.40 (`quantize_nvfp4`, `to_blocked`, `pack_uint4`), torchao 0.18
(`NVFP4Tensor`) and compressed-tensors 0.20 (`pack_fp4_to_uint8`): the same bytes, save for codes at a tie.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["LAYOUTS", "codes_of", "mxfp8", "pack", "swizzled", "write", "write_layout", "write_source"]

Tensors = dict[str, tuple[str, np.ndarray]]

_STEPS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


def codes_of(weight: np.ndarray, largest: float = 448.0) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Quantize to NVFP4: codes [N, K] of 0..15, the bytes of block scales [N, K/16], the global scale."""
    scale = np.float32(max(weight.max(), -weight.min()) / (6 * largest))
    codes = np.empty(weight.shape, np.uint8)
    scales = np.empty((len(weight), weight.shape[1] // 16), np.uint8)
    for row in range(0, len(weight), 512):  # some rows at a time: what lies between is larger than the weight
        blocks = np.asarray(weight[row : row + 512], np.float32).reshape(-1, scales.shape[1], 16)
        exact = np.minimum(np.abs(blocks).max(-1) / (6 * scale), 448).astype(ml_dtypes.float8_e4m3fn)
        step = np.maximum(exact.astype(np.float32) * scale, 1e-30)[:, :, None]
        found = np.searchsorted(_STEPS, np.abs(blocks) / step).astype(np.uint8) | (np.signbit(blocks) * np.uint8(8))
        codes[row : row + 512], scales[row : row + 512] = found.reshape(len(blocks), -1), exact.view(np.uint8)
    return codes, scales, scale


def pack(codes: np.ndarray, high_first: bool = False) -> np.ndarray:
    """Pack two codes a byte."""
    first, second = codes[:, 0::2], codes[:, 1::2]
    return first << 4 | second if high_first else first | second << 4


def swizzled(scales: np.ndarray) -> np.ndarray:
    """Return block scales [N, K/16] in the 128x4 tiles of cuBLAS, padded; as ModelOpt's `swizzle_nvfp4_scales`."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    padded = np.zeros((rows, columns), np.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    blocks = padded.reshape(rows // 128, 128, columns // 4, 4).transpose(0, 2, 1, 3)
    return blocks.reshape(-1, 4, 32, 4).transpose(0, 2, 1, 3).reshape(rows, columns)


def _nvfp4(
    order: Callable[[np.ndarray], np.ndarray] = lambda x: x, high_first: bool = False, leaf: str = "weight_scale_2"
):
    def linear(path: str, weight: np.ndarray) -> Tensors:
        codes, scales, scale = codes_of(weight)
        factor = np.float32(1) / scale if leaf == "weight_global_scale" else scale
        return {
            f"{path}.weight": ("U8", pack(codes, high_first)),
            f"{path}.weight_scale": ("F8_E4M3", order(scales)),
            f"{path}.{leaf}": ("F32", np.array(factor)),
            f"{path}.input_scale": ("F32", np.array(np.float32(4 / 2688))),
        }

    return linear


def _transposed(path: str, weight: np.ndarray) -> Tensors:
    return _nvfp4()(path, np.ascontiguousarray(weight.T))


def _by_columns(path: str, weight: np.ndarray) -> Tensors:
    found = _nvfp4()(path, weight)
    for leaf in ("weight", "weight_scale"):
        kind, value = found[f"{path}.{leaf}"]
        found[f"{path}.{leaf}"] = kind, np.ascontiguousarray(value.T)
    return found


def _four_over_six(path: str, weight: np.ndarray) -> Tensors:
    codes, scales, scale = codes_of(weight, 256.0)
    found = _nvfp4()(path, weight)
    found[f"{path}.weight"], found[f"{path}.weight_scale"] = ("U8", pack(codes)), ("F8_E4M3", scales)
    return found | {f"{path}.weight_scale_2": ("F32", np.array(scale))}


def _fp8(leaf: str, number: str = "E4M3", reciprocal: bool = False):
    kind, largest = {"E4M3": (ml_dtypes.float8_e4m3fn, 448.0), "E5M2": (ml_dtypes.float8_e5m2, 57344.0)}[number]

    def linear(path: str, weight: np.ndarray) -> Tensors:
        scale = np.float32(np.abs(weight).max() / largest)
        return {
            f"{path}.weight": (f"F8_{number}", (weight / scale).astype(kind).view(np.uint8)),
            f"{path}.{leaf}": ("F32", np.array(np.float32(1) / scale if reciprocal else scale)),
        }

    return linear


def mxfp8(path: str, weight: np.ndarray, order: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Tensors:
    """Write a weight whose columns are a multiple of 32 in MXFP8, its block scales in some order."""
    blocks = weight.reshape(len(weight), -1, 32)
    exponents = np.ceil(np.log2(np.abs(blocks).max(-1) / 448)).astype(np.int32)
    codes = (blocks / np.exp2(exponents)[:, :, None]).astype(ml_dtypes.float8_e4m3fn).reshape(weight.shape)
    return {
        f"{path}.weight": ("F8_E4M3", codes.view(np.uint8)),
        f"{path}.weight_scale": ("U8", order((exponents + 127).astype(np.uint8))),
    }


LAYOUTS: dict[str, Callable[[str, np.ndarray], Tensors]] = {
    "unified": _nvfp4(),
    "four over six": _four_over_six,
    "swizzled": _nvfp4(swizzled),
    "nibbles swapped": _nvfp4(high_first=True),
    "ComfyUI": _nvfp4(swizzled, high_first=True),
    "reciprocal": _nvfp4(leaf="weight_global_scale"),
    "transposed": _transposed,
    "by columns": _by_columns,
    "fp8": _fp8("weight_scale"),
    "scaled fp8": _fp8("scale_weight"),
    "scaled fp8 in E5M2": _fp8("scale_weight", "E5M2"),
    "fp8 with a reciprocal scale": _fp8("weight_scale", reciprocal=True),
}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file of tensors given as (dtype name, array of their bytes or values)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return path


def write_source(path: Path, weights: Mapping[str, np.ndarray]) -> Path:
    """Write the 16-bit weights [N, K] of linears."""
    return write(
        path,
        {f"{name}.weight": ("BF16", w.astype(ml_dtypes.bfloat16).view(np.uint16)) for name, w in weights.items()},
    )


def write_layout(path: Path, layout: str, weights: Mapping[str, np.ndarray], **more: Tensors) -> Path:
    """Write linears in one of the layouts, with more tensors beside."""
    tensors: Tensors = {}
    for name, weight in weights.items():
        rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
        tensors |= LAYOUTS[layout](name, rounded)
    for each in more.values():
        tensors |= each
    return write(path, tensors)
