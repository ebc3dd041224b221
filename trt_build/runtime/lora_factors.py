"""Factors of a LoRA for the slots of a graph or an engine, as ``fp4trt lora`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadLora
from fp4trt.safetensors_file import StoredTensor, tensors_in_file
from onnx_functions.graph.lora_slots import is_factor_input
from trt_build.runtime.dlpack import DTYPES
from trt_build.signature import Port

__all__ = ["Factors", "factors_for", "split_slots"]

Factors = dict[str, npt.NDArray[Any]]
"""Factor to its values, in its port's type."""

_FLOATS: Final = {"BF16": "BFLOAT16", "F16": "FLOAT16", "F32": "FLOAT", "F64": "DOUBLE"}


def split_slots(ports: Mapping[str, Port]) -> tuple[dict[str, Port], dict[str, Port]]:
    """Return the inputs of a call, and those that are factors of slots."""
    slots = {name: port for name, port in ports.items() if is_factor_input(name)}
    return {name: port for name, port in ports.items() if name not in slots}, slots


def factors_for(slots: Mapping[str, Port], lora: Path | None) -> Factors:
    """Return the factors that a file holds; without one, of rank 0, with which nothing is added.

    Raises:
        BadLora: they are not those of the slots.
        BadCheckpoint: the file is missing or damaged.
    """
    if lora is None:
        return {
            name: np.zeros([dim if isinstance(dim, int) else 0 for dim in port.dims], DTYPES[port.dtype])
            for name, port in slots.items()
        }
    stored = tensors_in_file(lora)
    for name in sorted(slots.keys() ^ stored.keys()):
        there = "has no slot for" if name in stored else "needs"
        raise BadLora(f"{lora} is not made for this graph, which {there} {name}: make it with fp4trt lora --checkpoint")
    return {name: _values(lora, port, stored[name]) for name, port in slots.items()}


def _values(lora: Path, port: Port, stored: StoredTensor) -> npt.NDArray[Any]:
    found, dims = stored.shape, list(port.dims)
    if len(found) != len(dims) or any(isinstance(b, int) and a != b for a, b in zip(found, dims, strict=True)):
        raise BadLora(
            f"{lora}: {port.name} is {list(found)}, and the graph's {dims}: make it of the graph's checkpoint"
        )
    if stored.dtype not in _FLOATS:
        known = ", ".join(_FLOATS)
        raise BadLora(f"{lora}: {port.name} is {stored.dtype}; expected one of: {known}: make it with fp4trt lora")
    values = stored.bytes().view(DTYPES[_FLOATS[stored.dtype]]).reshape(found)
    return values.astype(DTYPES[port.dtype])
