"""Quantized checkpoints of every kind, mutations of single tensors, and a reading of them written apart from ours.

The reading knows the layout from its description alone: numpy and ml_dtypes, and nothing of this project but the names
of a FLUX config.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

WEIGHTS = "diffusion_pytorch_model.safetensors"

TYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FLOAT = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file: its type by the name there, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def values(self) -> np.ndarray:
        """What it holds, in its own type."""
        return np.frombuffer(self.data, TYPES[self.dtype]).reshape(self.shape)

    @property
    def floats(self) -> np.ndarray:
        """The same in FP32."""
        return self.values.astype(np.float32)


def made(dtype: str, values: np.ndarray) -> Tensor:
    """Return values as a tensor of some type."""
    return Tensor(dtype, values.shape, np.ascontiguousarray(values.astype(TYPES[dtype])).tobytes())


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    spans = {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in header.items()
    }
    return {name: Tensor(e["dtype"], tuple(e["shape"]), raw[slice(*spans[name])]) for name, e in header.items()}


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, in the order of a dictionary."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values()))


def plain_weights(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the FP32 tensors of the plain model that a quantized checkpoint stands for, activations apart.

    A linear's is the one matrix that does what its codes, its branch and its smoothing do together.
    """
    beside = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
    attention = ("q_scale", "k_scale", "v_scale", "output_scale", "_amax")
    plain = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in (*beside, *attention):
            continue
        value = _dequantized(tensors, path) if leaf == "weight" and len(tensor.shape) == 2 else tensor.floats
        if leaf == "weight" and f"{path}.svdquant_lora_a" in tensors:
            value = value + tensors[f"{path}.svdquant_lora_b"].floats @ tensors[f"{path}.svdquant_lora_a"].floats
        if leaf == "weight" and f"{path}.pre_quant_scale" in tensors:
            value = value * tensors[f"{path}.pre_quant_scale"].floats
        plain[name] = value
    return plain


def _dequantized(tensors: Mapping[str, Tensor], path: str) -> np.ndarray:
    weight = tensors[f"{path}.weight"]
    if weight.dtype == "U8":
        packed = weight.values
        codes = np.stack((packed & 15, packed >> 4), -1).reshape(packed.shape[0], -1)
        scales = tensors[f"{path}.weight_scale"].floats * tensors[f"{path}.weight_scale_2"].floats.reshape(())
        return E2M1[codes] * np.repeat(scales, 16, -1)
    scale = tensors[f"{path}.weight_scale"].floats.reshape(()) if weight.dtype == "F8_E4M3" else np.float32(1)
    return weight.floats * scale


def formats(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return how each linear is stored."""
    kinds = {"U8": "nvfp4", "F8_E4M3": "fp8", "BF16": "bf16", "F16": "fp16", "F32": "fp32"}
    matrices = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2}
    return {name.removesuffix(".weight"): kinds[tensor.dtype] for name, tensor in matrices.items()}


@dataclass(frozen=True)
class Mutation:
    """A change of one tensor: what was done, to which name, and all tensors afterwards."""

    kind: str
    name: str
    tensors: Mapping[str, Tensor]


def mutations(tensors: Mapping[str, Tensor]) -> Iterator[Mutation]:
    """Yield mutations of a checkpoint: of one tensor of each part of each kind of linear, in turn."""
    for turn, name in enumerate(_chosen(tensors)):
        others = {key: value for key, value in tensors.items() if key != name}
        tensor = tensors[name]
        yield Mutation("drop", name, others)
        renamed = (f"{name}_", name.replace(".", "_", 1), f"model.{name}")[turn % 3]
        yield Mutation("rename", name, {**others, renamed: tensor})
        dtypes = [dtype for dtype in TYPES if dtype != tensor.dtype]
        for dtype in dtypes[turn % 2 :: 2]:
            yield Mutation("retype", name, {**others, name: _retyped(tensor, dtype)})
        for shape in _shapes(tensor):
            yield Mutation("reshape", name, {**others, name: shape})
    kinds = formats(tensors)
    linears = [path for path, kind in kinds.items() if kind in ("nvfp4", "fp8")]
    plain = [path for path in kinds if path not in linears]
    for path in dict.fromkeys((*linears[:2], *plain[:2], *plain[-1:])):
        yield from _additions(tensors, path)
    for name in ("stray", "proj_out.weight_quantizer._amax", "transformer_blocks.0.attn.softmax_quantizer._amax"):
        yield Mutation("add", name, {**tensors, name: made("F32", np.ones(()))})


def _additions(tensors: Mapping[str, Tensor], path: str) -> Iterator[Mutation]:
    rows, columns = plain_weights({name: tensors[name] for name in tensors if name.startswith(f"{path}.")})[
        f"{path}.weight"
    ].shape
    parts = {
        "weight_scale": made("F8_E4M3", np.ones((rows, columns // 16))),
        "weight_scale_2": made("F32", np.float32(0.5).reshape(())),
        "input_scale": made("F32", np.float32(0.25).reshape(())),
        "pre_quant_scale": made("BF16", np.linspace(0.5, 2, columns)),
        "svdquant_lora_a": made("BF16", np.ones((2, columns)) / 16),
        "scale": made("F32", np.ones(())),
        "input_quantizer._amax": made("F32", np.ones(())),
        "weight_global_scale": made("F32", np.ones(())),
        "q_scale": made("F32", np.ones(())),
    }
    for leaf, tensor in parts.items():
        if f"{path}.{leaf}" not in tensors:
            yield Mutation("add", f"{path}.{leaf}", {**tensors, f"{path}.{leaf}": tensor})


def _chosen(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return one name of each part (leaf, type, in or outside the blocks, matrix or vector)."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        inside = "blocks." in name
        key = (name.rpartition(".")[2], tensor.dtype, inside and name.split(".")[0], len(tensor.shape))
        first.setdefault(key, name)
    return list(first.values())


def _retyped(tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor of the same values in another type; codes and bytes are taken as numbers."""
    with np.errstate(all="ignore"):
        return made(dtype, np.nan_to_num(tensor.values.astype(np.float64), nan=1.0))


def _shapes(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.shape == ():
        yield replace(tensor, shape=(1,))
        yield replace(tensor, shape=(2,), data=tensor.data * 2)
        yield replace(tensor, shape=(1, 1))
        return
    yield replace(tensor, shape=(*tensor.shape, 1))
    yield replace(tensor, shape=(1, *tensor.shape))
    yield Tensor(tensor.dtype, (tensor.shape[0] * 2, *tensor.shape[1:]), tensor.data * 2)
    if len(tensor.shape) == 2 and tensor.shape[0] != tensor.shape[1]:
        yield replace(tensor, shape=tensor.shape[::-1])
    if tensor.shape[0] > 1 and len(tensor.data) % tensor.shape[0] == 0:
        half = len(tensor.data) // tensor.shape[0] * (tensor.shape[0] - 1)
        yield Tensor(tensor.dtype, (tensor.shape[0] - 1, *tensor.shape[1:]), tensor.data[:half])
