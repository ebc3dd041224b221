"""Outputs of the graph and of the reference as pictures, where their numbers lie on a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fp4trt.families.family import Config, Family
from onnx_functions.validation.structure_gates import Run, output_key
from onnx_functions.validation.verdict import FloatArray, OutputPicture, relative_l2

__all__ = ["pictures_of"]

_SIDE: Final = 256
"""Pixels of a side that channels may fill; a larger grid has one pixel a token."""

_RGB: Final = 3


def pictures_of(family: Family, config: Config, run: Run, outputs: Sequence[FloatArray]) -> list[OutputPicture]:
    """Return the first of the batch, and of a video its first frame, of every output that is a picture's.

    Tokens [B, L, C] are a picture's where their positions are a grid: row and column, behind a frame where three
    numbers of a position vary and all others are constant. [B, C, H, W] and [B, C, F, H, W] are pictures and videos.

    Args:
        family: of the model.
        config: of the model.
        run: of the reference.
        outputs: of the graph on the same inputs, in the order of the family's.
    """
    pictures = []
    for place, ((name, symbolic), graph) in enumerate(zip(family.outputs.items(), outputs, strict=False)):
        reference = run.values[output_key("", place)]
        positions = _positions(family, config, run.inputs, symbolic)
        if graph.shape != reference.shape or (drawn := _grid(reference, positions)) is None:
            continue
        other = _grid(graph, positions)
        assert other is not None
        title = run.shape if len(family.outputs) == 1 else f"{name}, {run.shape}"
        pictures.append(_picture(title, drawn, other, relative_l2(graph, reference)))
    return pictures


def _positions(
    family: Family, config: Config, inputs: Mapping[str, FloatArray], symbolic: Sequence[str | int | None]
) -> FloatArray | None:
    """Return the positions of an output's tokens, [L, axes]; None where no input gives them."""
    tokens = symbolic[1] if len(symbolic) == 3 else None
    for name, sizes in family.input_shapes(config).items():
        if family.inputs[name].role != "positions" or not isinstance(tokens, str) or tokens not in sizes:
            continue
        value = inputs[name]
        if sizes.index(tokens) == 0 and value.ndim == 2:
            return value
        if sizes.index(tokens) == 2 and value.ndim == 4:  # [B, axes, L, from and to]
            return value[0, :, :, 0].T
    return None


def _grid(values: FloatArray, positions: FloatArray | None) -> FloatArray | None:
    """Return an output's first picture as [H, W, C]; None where it is none."""
    if values.ndim == 5:
        return np.moveaxis(values[0, :, 0], 0, -1)
    if values.ndim == 4:
        return np.moveaxis(values[0], 0, -1)
    if values.ndim != 3 or positions is None or len(positions) != values.shape[1]:
        return None
    counting = [axis for axis in positions.T if (axis != axis[0]).any()]
    if len(counting) not in (2, 3):
        return None
    first = counting[0] == counting[0][0] if len(counting) == 3 else np.ones(len(positions), bool)  # of several frames
    rows, columns = (np.unique(axis[first], return_inverse=True)[1].reshape(-1) for axis in counting[-2:])
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    if not np.array_equal(rows * width + columns, np.arange(height * width)):
        return None
    return values[0, first].reshape(height, width, -1)


def _picture(caption: str, reference: FloatArray, graph: FloatArray, error: float) -> OutputPicture:
    """Return two outputs [H, W, C] on one scale: 0 is gray, and black and white are the reference's largest value."""
    channels = reference.shape[2]
    one, other = _tiled(reference), _tiled(graph)
    drawn = channels if one.ndim == 3 else one.size // (reference.shape[0] * reference.shape[1])
    most = float(np.abs(one[np.isfinite(one)]).max(initial=0)) or 1.0
    one, other = (0.5 + values / (2 * most) for values in (one, other))
    apart = np.nan_to_num(np.abs(other - one), nan=1, posinf=1)
    some = f"{drawn} of {channels} channels, " if drawn < channels else ""
    return OutputPicture(
        caption, f"{some}relative L2 error {error:.3g}", _bytes(one), _bytes(other), _bytes(np.sqrt(apart))
    )


def _tiled(values: FloatArray) -> FloatArray:
    """Return three channels as they are, and others as a square of pixels in place of each token: 0 where none is."""
    height, width, channels = values.shape
    if channels == _RGB:
        return values
    side = max(1, min(math.ceil(math.sqrt(channels)), _SIDE // max(height, width)))
    tiles = np.zeros((height, width, side * side), np.float32)
    tiles[..., :channels] = values[..., : side * side]
    squares = tiles.reshape(height, width, side, side)
    return squares.transpose(0, 2, 1, 3).reshape(height * side, width * side)


def _bytes(values: FloatArray) -> npt.NDArray[np.uint8]:
    """Return values in [0, 1] as bytes; what is no number is 1."""
    return np.rint(np.nan_to_num(values, nan=1, posinf=1, neginf=0).clip(0, 1) * 255).astype(np.uint8)
