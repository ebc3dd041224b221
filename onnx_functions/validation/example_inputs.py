"""Values for inputs of which nothing but type and size is known, and others that should change the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from fp4trt.errors import BadGraph
from onnx_functions.graph.external_data import type_name

__all__ = ["RANGES", "Array", "Range", "example_inputs", "other_values", "require_tensors"]

Array = npt.NDArray[Any]

_TYPES: Final[Mapping[int, Any]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.INT16: np.int16,
    TensorProto.INT8: np.int8,
    TensorProto.UINT64: np.uint64,
    TensorProto.UINT32: np.uint32,
    TensorProto.UINT16: np.uint16,
    TensorProto.UINT8: np.uint8,
    TensorProto.BOOL: np.bool_,
}
_FLOATS: Final = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn)


def require_tensors(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are no initializers, all of which are tensors of a type and rank that can be made up.

    Raises:
        BadGraph: naming the one that is not, or there is none.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if not inputs:
        raise BadGraph("the graph has no input: it computes a constant; export it again with its inputs")
    for value in inputs:
        tensor = value.type.tensor_type
        if tensor.elem_type not in _TYPES:
            kind = type_name(tensor.elem_type) if value.type.HasField("tensor_type") else "no tensor"
            raise BadGraph(f"the input {value.name} is {kind}; expected numbers or truth values: export it again")
        if not tensor.HasField("shape"):
            raise BadGraph(f"the input {value.name} has no shape; export the graph again with its shape")
    return inputs


@dataclass(frozen=True)
class Range:
    """Where the values of inputs are drawn from.

    Attributes:
        told: for people.
        floats: the least and the most of a uniform distribution; None for the standard normal one.
        integers: the most of an integer; the least is 0.
    """

    told: str
    floats: tuple[float, float] | None = None
    integers: int = 1


RANGES: Final = (
    Range("standard normal values"),
    Range("standard normal values and indices of 0", None, 0),
    Range("values between 0 and 1", (0.0625, 0.9375)),
    Range("values between 0 and 1 and indices of 0", (0.0625, 0.9375), 0),
    Range("small positive values", (0.0078125, 0.0625)),
    Range("values between 1 and 2", (1.0625, 2.0)),
)
"""Values to try a graph at, for a model may take a part of all numbers alone: a time, a variance, an index."""


def example_inputs(
    inputs: Sequence[onnx.ValueInfoProto],
    sizes: Mapping[str, Sequence[int]],
    seed: int = 0,
    drawn: Range = RANGES[0],
) -> dict[str, Array]:
    """Return values for every input, in its own type: by default normal ones, and 0 and 1 for integers and truth.

    The first of each row of integers is 1, so that no mask hides all of a row, and 0 and 1 are indices of nearly all
    tables.
    """
    rng = np.random.default_rng(seed)
    return {value.name: _values(rng, value, tuple(sizes[value.name]), drawn) for value in inputs}


def _values(rng: np.random.Generator, value: onnx.ValueInfoProto, size: tuple[int, ...], drawn: Range) -> Array:
    kind = _TYPES[value.type.tensor_type.elem_type]
    if kind in _FLOATS:
        return _floats(rng, size, drawn).astype(kind)
    numbers = np.asarray(rng.integers(0, 2, size))
    if drawn.integers == 0 and kind != np.bool_:
        numbers = np.zeros_like(numbers)
        return numbers.astype(kind)
    return _first_of_row(numbers).astype(kind)


def _floats(rng: np.random.Generator, size: tuple[int, ...], drawn: Range) -> Array:
    if drawn.floats is None:
        return np.asarray(rng.standard_normal(size), np.float32)
    return np.asarray(rng.uniform(*drawn.floats, size), np.float32)


def _first_of_row(drawn: Array) -> Array:
    copy = np.array(drawn)
    copy[(..., slice(1)) if copy.ndim else ...] = 1
    return copy


def other_values(values: Array, drawn: Range = RANGES[0]) -> Iterator[Array]:
    """Yield values unlike those of an input, the likeliest to change what is computed of it first."""
    rng = np.random.default_rng(1)
    kind: Any = values.dtype
    if kind in _FLOATS:
        for floats in _other_floats(rng, values.astype(np.float32), drawn):
            yield np.asarray(floats, np.float32).astype(kind)
        return
    turned = np.asarray(1 - values.astype(np.int64))  # numpy makes scalars of what has no axis
    yield (_first_of_row(turned) if values.size > 1 else turned).astype(kind)
    yield turned.astype(kind)
    if kind != np.bool_:
        yield np.asarray(values.astype(np.int64) + 1).astype(kind)
        yield np.asarray(rng.integers(2, 5, values.shape)).astype(kind)
    if np.issubdtype(kind, np.signedinteger):
        yield np.full(values.shape, -1, kind)  # padding


def _other_floats(rng: np.random.Generator, values: Array, drawn: Range) -> Iterator[Array]:
    if drawn.floats is not None:
        yield _floats(rng, values.shape, drawn)
    yield values * 0.5 + rng.uniform(0.5, 1.5, values.shape)
    yield 4 * rng.standard_normal(values.shape)
    # A mask may be stored in floats, of which only zero, or the sign, tells.
    kept = _first_of_row(np.zeros_like(values)) if values.size > 1 else np.zeros_like(values)
    yield values * kept
    yield np.zeros_like(values)
    yield -np.abs(values)
    yield np.abs(values)
    yield 1000 * rng.standard_normal(values.shape)
