"""What stored tensors hold, in one pass over their files and in bounded memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

from onnx_functions.graph.external_data import BadSpan, Span

__all__ = ["Values", "inner_bytes", "read_values"]

_CHUNK: Final = 8 << 20
_GLANCE: Final = 1 << 16
"""Bytes of codes that are read first: nearly always they hold one that is not zero, and that is all to know."""
_Bytes = npt.NDArray[np.uint8]

_SIXTEEN_BIT_EXPONENT: Final[Mapping[int, int]] = {TensorProto.BFLOAT16: 0x7F80, TensorProto.FLOAT16: 0x7C00}
_CODES: Final = (TensorProto.FLOAT4E2M1,)
_READ: Final = (*_SIXTEEN_BIT_EXPONENT, *_CODES, TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN)


@dataclass(frozen=True)
class Values:
    """What a tensor holds: how many NaN, infinite and negative elements, and whether all are zero.

    Only FP8 and FP32 elements are counted as negative. Of FP4 codes `all_zero` alone is known, and `scalar` of a
    tensor of one FP32, BF16 or FP16 element.
    """

    nan: int = 0
    infinite: int = 0
    negative: int = 0
    all_zero: bool = True
    scalar: float | None = None

    def __add__(self, other: Values) -> Values:
        return Values(
            self.nan + other.nan,
            self.infinite + other.infinite,
            self.negative + other.negative,
            self.all_zero and other.all_zero,
            self.scalar if self.scalar is not None else other.scalar,
        )


def read_values(tensors: Mapping[str, TensorProto], spans: Mapping[str, Span | BadSpan | None]) -> dict[str, Values]:
    """Return what the tensors of floating-point types hold, by name.

    Tensors that share their bytes are read once; one that overlaps another in part is not read, nor one that
    cannot be. 8 MiB are held at a time; of codes no more is read than up to the first that is not zero.
    """
    found: dict[str, Values] = {}
    outside: list[tuple[Span, str]] = []
    for name, tensor in tensors.items():
        span = spans.get(name)
        if tensor.data_type not in _READ:
            continue
        if isinstance(span, Span):
            outside.append((span, name))
        elif span is None:
            with contextlib.suppress(ValueError):  # fewer elements than the shape needs
                found[name] = _look_at(inner_bytes(tensor), tensor)
    found.update(_read_files(sorted(outside, key=lambda entry: (entry[0].file, entry[0].offset)), tensors))
    return found


def _read_files(places: list[tuple[Span, str]], tensors: Mapping[str, TensorProto]) -> Iterator[tuple[str, Values]]:
    buffer = np.empty(_CHUNK, np.uint8)
    file: BinaryIO | None = None
    opened, last, values, end = Path(), Span(Path(), -1, -1), Values(), 0
    try:
        for span, name in places:
            if span.file != opened or file is None:
                if file is not None:
                    file.close()
                file, opened, end = span.file.open("rb", buffering=0), span.file, 0
            if span != last:
                if span.offset < end:
                    continue  # partial overlap: a rule of its own
                values = _read(file, span, tensors[name], buffer)
                last, end = span, span.offset + span.length
            yield name, values
    finally:
        if file is not None:
            file.close()


def _read(file: BinaryIO, span: Span, tensor: TensorProto, buffer: _Bytes) -> Values:
    file.seek(span.offset)
    total, left = Values(), span.length
    chunk = _GLANCE if tensor.data_type in _CODES else _CHUNK
    while left > 0 and not (tensor.data_type in _CODES and not total.all_zero):
        piece, chunk = buffer[: min(left, chunk)], _CHUNK
        view, held = piece.data, 0
        while held < len(piece):
            count = file.readinto(view[held:])  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{span.file} ended while it was read")
            held += count
        total += _look_at(piece, tensor)
        left -= held
    return total


def inner_bytes(tensor: TensorProto) -> _Bytes:
    """Return the bytes of a tensor that lies in the model itself.

    Raises:
        ValueError: it holds fewer elements than its shape needs.
    """
    if tensor.raw_data:
        return np.frombuffer(tensor.raw_data, np.uint8)
    if tensor.data_type in _CODES or tensor.data_type == TensorProto.FLOAT8E4M3FN:
        return np.array(list(tensor.int32_data), np.int64).astype(np.uint8)  # a byte each, whatever is written there
    return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)


def _look_at(raw: _Bytes, tensor: TensorProto) -> Values:
    """Return what some whole elements of a tensor hold."""
    kind = tensor.data_type
    if kind in _CODES:
        return Values(all_zero=not raw.any())
    if kind == TensorProto.FLOAT8E4M3FN:
        top = int(raw.max(initial=0))
        if top < 0x7F:  # neither a sign nor a NaN: one pass, as over nearly every block scale
            return Values(all_zero=top == 0)
        magnitudes = raw & 0x7F
        nan = magnitudes == 0x7F  # the type has no infinity
        negative = (raw > 0x80) & ~nan
        return Values(int(nan.sum()), 0, int(negative.sum()), not magnitudes.any())
    one = math.prod(tensor.dims) == 1
    if kind == TensorProto.FLOAT:
        return _floats(raw.view(np.float32), one)
    return _sixteen_bit(raw.view(np.uint16), kind, one)


def _floats(numbers: npt.NDArray[np.float32], one: bool) -> Values:
    nan = int(np.isnan(numbers).sum())
    infinite = int(np.isinf(numbers).sum())
    negative = int((numbers < 0).sum())
    return Values(nan, infinite, negative, not numbers.any(), float(numbers[0]) if one else None)


def _sixteen_bit(words: npt.NDArray[np.uint16], kind: int, one: bool) -> Values:
    exponent = _SIXTEEN_BIT_EXPONENT[kind]
    magnitudes = words & 0x7FFF
    top = int(magnitudes.max(initial=0))
    special: Any = magnitudes[magnitudes >= exponent] if top >= exponent else magnitudes[:0]
    nan = int((special > exponent).sum())
    scalar = None
    if one:
        scalar = float((words.astype(np.uint32) << 16).view(np.float32)[0])
        scalar = float(words.view(np.float16)[0]) if kind == TensorProto.FLOAT16 else scalar
    return Values(nan, len(special) - nan, 0, top == 0, scalar)
