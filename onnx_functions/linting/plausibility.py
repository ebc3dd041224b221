"""Rules for scales that no real weight has: what can be seen of a misread layout without its 16-bit source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from fp4trt.cublas_tiles import unswizzled
from onnx_functions.graph.external_data import Span
from onnx_functions.graph.index import name_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject
from onnx_functions.linting.values import inner_bytes

__all__ = ["RULES", "explained", "threshold"]

_BAND: Final = 128
_BANDS: Final = 4
"""How many bands of 128 rows are looked at, from the first to the last: the tiles of cuBLAS stay inside them."""

_LEAST_GAIN: Final = 0.02
_CERTAINTY: Final = 3.0

_LARGEST_ACTIVATION: Final = 1e5
_LARGEST_WEIGHT: Final = 2.0**13

_Bytes = npt.NDArray[np.uint8]
_LOGARITHMS: Final = np.log2(
    np.maximum(
        np.abs(np.nan_to_num(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))), 2.0**-10
    )
)
"""The logarithm of each byte as an E4M3 number; zero counts as half of the least one."""


@rule(
    "block-scale-order",
    "warning",
    "if fp4trt inspect --against its 16-bit source says the same, export in row-major order",
)
def block_scale_order(subject: Subject) -> Iterator[Hit]:
    """Block scales in the tiles of cuBLAS, as ComfyUI has them, give noise that no one sees.

    Real weights have large and small rows and columns, which explain a part of their block scales; in a wrong order
    they explain less. Without the 16-bit source there is no more to see than that, and nothing of the order of the
    nibbles. Source: measured, docs/interchange.md.
    """
    found = []
    for chain in subject.weights:
        grid = _bands(subject, chain.block_scales)
        if grid is None:
            continue
        given, tiled = explained(grid), explained(_untiled(grid))
        if tiled - given > threshold(grid.shape):
            found.append((tiled - given, given, tiled, chain))
    if found:
        _, given, tiled, chain = max(found, key=lambda each: each[0])
        yield Hit(
            f"rows and columns explain {given:.0%} of the block scales as they lie, {tiled:.0%} once they are taken "
            f"out of 128x4 tiles; so it is for {len(found)} of {len(subject.weights)} weights",
            name_of(chain.values),
            chain.block_scales,
        )


@rule("weight-scale-reciprocal", "warning", "if the file's global scales are 2688/amax (LightX2V's), take amax/2688")
def weight_scale_reciprocal(subject: Subject) -> Iterator[Hit]:
    """A global scale under which the largest weight is above 8192 is more likely the reciprocal of one.

    The reciprocal gives such a number for all weights up to 800, and no model is known to have larger ones. Source: the
    formats.
    """
    for chain in subject.weights:
        scale = subject.scalar(chain.global_scale) if chain.scales is not None else None
        if scale is not None and math.isfinite(scale) and scale * 2688 > _LARGEST_WEIGHT:
            assert chain.scales is not None
            found = f"the global scale is {scale:.4g}, of weights up to {scale * 2688:.3g}"
            yield Hit(found, name_of(chain.scales), subject.constant(chain.global_scale))


@rule("input-scale-reciprocal", "warning", "if the file's input scales are 2688/amax, take amax/2688 (FP8: amax/448)")
def input_scale_reciprocal(subject: Subject) -> Iterator[Hit]:
    """A scale under which activations reach above 100,000 is more likely the reciprocal of one.

    The reciprocal gives such a number for all activations up to 72, and no model is known to have larger ones than
    100,000. Source: the formats.
    """
    quantizers = [(chain.quantizer, chain.scale, 2688) for chain in subject.activations]
    quantizers += [(node, node.input[1], 448) for node in subject.fp8_quantizers if len(node.input) > 1]
    for node, name, largest in quantizers:
        scale = subject.scalar(name)
        if scale is not None and math.isfinite(scale) and scale * largest > _LARGEST_ACTIVATION:
            found = f"the scale is {scale:.4g}, of activations up to {scale * largest:.3g}"
            yield Hit(found, name_of(node), subject.constant(name))


RULES = (block_scale_order, weight_scale_reciprocal, input_scale_reciprocal)


def explained(grid: _Bytes) -> float:
    """Return the share of the variance of log block scales [N, K/16] that a row and a column effect explain."""
    values = _LOGARITHMS[grid]
    values -= values.mean()
    total = float(np.einsum("ij,ij->", values, values))
    rows, columns = values.mean(1, dtype=np.float64), values.mean(0, dtype=np.float64)
    effects = float(rows @ rows) * grid.shape[1] + float(columns @ columns) * grid.shape[0]
    return effects / total if total > 0 else 0.0


def threshold(shape: tuple[int, ...]) -> float:
    """Return by how much another order has to explain more: three times what chance does in a grid of this shape.

    Effects of rows and columns explain d / n of n random numbers, where d is the count of effects, with a variance of
    2 d / n^2, and the difference of two orders twice that.
    """
    effects, count = sum(shape) - 2, math.prod(shape)
    return max(_LEAST_GAIN, _CERTAINTY * math.sqrt(4 * effects) / count)


def _bands(subject: Subject, name: str) -> _Bytes | None:
    """Return some bands of 128 rows of block scales, where tiles would not show in their shape; None elsewhere."""
    tensor = subject.constants.get(name)
    if tensor is None or tensor.data_type != TensorProto.FLOAT8E4M3FN or len(tensor.dims) != 2:
        return None
    rows, columns = tensor.dims
    if not rows or not columns or rows % _BAND or columns % 4:
        return None
    first = sorted({round(place) * _BAND for place in np.linspace(0, rows // _BAND - 1, _BANDS)})
    span = subject.spans.get(name)
    if isinstance(span, Span):
        size = _BAND * columns
        read = [np.fromfile(span.file, np.uint8, size, offset=span.offset + row * columns) for row in first]
        return np.concatenate(read).reshape(-1, columns) if all(len(each) == size for each in read) else None
    if span is not None:
        return None
    try:
        inner = inner_bytes(tensor).reshape(rows, columns)
    except ValueError:  # fewer elements than the shape needs: a rule of its own
        return None
    return np.concatenate([inner[row : row + _BAND] for row in first])


def _untiled(grid: _Bytes) -> _Bytes:
    return unswizzled(grid.reshape(-1), *grid.shape)
