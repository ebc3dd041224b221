"""How well each reading of a quantized linear fits the 16-bit weight that it was made of.

The measure is the relative L2 error of the dequantized weight, in the linear's own input space: codes, block scales and
global scale, plus a low-rank branch, times the smoothing of each column. It is taken of a few tiles, and against what
the codes stand for, which is the weight less the branch. Rounding to NVFP4 leaves about a tenth; a wrong reading a
third and more (docs/interchange.md has the table). Some methods, fp4trt's own `nvfp4-quality` too, move a factor of
each input channel into the weights, or out of a modulation's rows: a reading then fits up to one factor a column, or a
row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from fp4trt.safetensors_file import StoredTensor
from onnx_functions.layouts.names import Stretch
from onnx_functions.layouts.readings import (
    LOW_FIRST,
    NONE,
    ROW_MAJOR,
    Floats,
    Reading,
    Tile,
    floats_of,
    readings_of,
)
from onnx_functions.layouts.sources import QuantizedLinear

__all__ = ["CLEAR", "OURS", "OURS_FP8", "OURS_MXFP8", "Fit", "fits_of", "tiles_of"]

CLEAR: Final = 0.12
"""Largest relative error of what rounding to nearest leaves: a reading that close is right."""
_LIMITS: Final = {"nothing": 0.25, "columns": 0.35, "rows": 0.35}
"""Up to here one is right that is closer than every other by a quarter: methods that choose codes for the output leave
that much. The best wrong reading of the built-in model's linears is off by .22, and others are as near to it."""
_MARGIN: Final = 1.25

OURS: Final = Reading("E2M1", "rows", ROW_MAJOR, LOW_FIRST)
OURS_FP8: Final = Reading("E4M3", "rows", NONE, NONE)
OURS_MXFP8: Final = Reading("E4M3", "rows", ROW_MAJOR, NONE)
"""The readings under which fp4trt takes its own checkpoints."""

_OUR_SCALES: Final = {OURS: "multiplier", OURS_FP8: "multiplier", OURS_MXFP8: "none"}
"""And their global scale."""

_TILE: Final = (256, 512)
_FOLDED: Final = 32.0
"""Largest factor, up or down, that is believed to have been moved between a norm and a linear."""
_UNEVEN: Final = 0.85
"""The part of the error under one factor for all that factors of each column or row may leave at most: else the
global scale is wrong, and they only follow the noise."""

_OTHER_SCALE: Final = 1.1
"""A factor that is nearer to 1 explains no error of a quarter."""

Moved = Literal["nothing", "columns", "rows"]


@dataclass(frozen=True)
class Fit:
    """How one reading fits.

    Attributes:
        reading: all but the global scale.
        global_scale: `multiplier`, `multiplier for each row`, `reciprocal`, or `none` where the linear has none.
        error: relative L2 error.
        moved: what factors the error is up to.
        fits: whether the reading is proven.
    """

    reading: Reading
    global_scale: str
    error: float
    moved: Moved = "nothing"
    fits: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether fp4trt reads a linear so."""
        return _OUR_SCALES.get(self.reading) == self.global_scale


@dataclass
class _Sums:
    """Sums over tiles for one reading: of squares of what it gives and of the target, and of their products."""

    given: float = 0.0
    both: float = 0.0
    wanted: float = 0.0
    by_columns: float = 0.0
    by_rows: float = 0.0
    columns: list[Any] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    def add(self, given: Floats, wanted: Floats) -> None:
        self.given += _dot(given, given)
        self.both += _dot(given, wanted)
        self.wanted += _dot(wanted, wanted)
        for axis, factors in ((0, self.columns), (1, self.rows)):
            squares, products = (given * given).sum(axis), (given * wanted).sum(axis)
            with np.errstate(invalid="ignore", divide="ignore"):
                factor = np.where(squares > 0, products / squares, 0)
            factors.append(factor[squares > 0])
            gain = float((factor * products).sum(dtype=np.float64))
            if axis == 0:
                self.by_columns += gain
            else:
                self.by_rows += gain

    def error(self, scale: float) -> float:
        """Return the relative error under one factor for all."""
        if not self.wanted:  # a weight of zeros
            return math.inf if scale * self.given else 0.0
        square = self.wanted - 2 * scale * self.both + scale * scale * self.given
        return math.sqrt(max(square, 0.0) / self.wanted) if math.isfinite(square) else math.inf

    def error_up_to(self, moved: Moved, scale: float, uneven: float) -> float:
        """Return the relative error under the best factor of each column or row; infinite for unlikely factors."""
        if not scale or not math.isfinite(scale):
            return math.inf
        factors = np.concatenate(self.columns if moved == "columns" else self.rows) / scale
        factors = np.abs(factors[factors != 0])
        if not self.wanted or not len(factors) or not 1 / _FOLDED <= float(np.median(factors)) <= _FOLDED:
            return math.inf
        left = self.wanted - (self.by_columns if moved == "columns" else self.by_rows)
        error = math.sqrt(max(left, 0.0) / self.wanted)
        return error if error <= uneven * self.error(self.factor) else math.inf

    @property
    def factor(self) -> float:
        """The factor for all that leaves the least error."""
        return self.both / self.given if self.given else 0.0


def _dot(a: Floats, b: Floats) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64, casting="unsafe"))


def tiles_of(stretch: Stretch, columns: int, block: int = 16) -> Iterator[Tile]:
    """Yield one or two tiles of some rows of a weight: at their begin, and across their last rows and columns."""
    rows, wide = min(_TILE[0], stretch.count), min(_TILE[1], columns - columns % block)
    last = Tile(stretch.row + stretch.count - rows, rows, (columns - wide) // block * block, wide)
    yield Tile(stretch.row, rows, 0, wide)
    if (last.row, last.column) != (stretch.row, 0):
        yield last


def fits_of(
    linear: QuantizedLinear, stretches: Sequence[Stretch], source: Mapping[str, StoredTensor], moves: bool = False
) -> tuple[list[Fit], float]:
    """Return how each reading fits, and the factor by which the best direction among them is too small.

    Args:
        linear: quantized.
        stretches: the rows of the 16-bit checkpoint that it was made of, in its own order.
        source: the tensors of that checkpoint.
        moves: whether it is known that factors were moved into the weight, be they equal ones.

    Returns:
        Fits under one global scale, and where none is close, the one up to a factor of each column or row; best first,
        fp4trt's own reading before another that is as close. The factor is 1 where one of them fits.
    """
    columns = source[stretches[0].tensor].shape[1]
    shape = sum(stretch.count for stretch in stretches), columns
    sums: dict[Reading, _Sums] = {}
    for stretch in stretches:
        for tile in tiles_of(stretch, columns, linear.stored.block):
            wanted = _wanted(linear, stretch, source, tile)
            for reading, given in readings_of(linear.stored, shape, tile):
                sums.setdefault(reading, _Sums()).add(_scaled(linear, given, tile), wanted)
    kinds = _global_scales(linear)
    fits = _judged([Fit(reading, kind, each.error(g)) for reading, each in sums.items() for kind, g in kinds.items()])
    if not fits or fits[0].fits:
        return fits, 1.0
    moved = list(_moved(sums, kinds, 1.0 if moves else _UNEVEN))
    return [*moved, *fits], 1.0 if moved else _factor(sums, kinds)


def _judged(fits: Sequence[Fit]) -> list[Fit]:
    """Return the fits by their error, fp4trt's own reading first of equals, and whether the first is proven."""
    ordered = sorted(fits, key=lambda fit: (_rounded(fit.error), not fit.is_ours))
    if not ordered:
        return []
    best, *others = ordered
    next_best = min((fit.error for fit in others if fit.reading != best.reading), default=math.inf)
    clearly = best.error <= _LIMITS[best.moved] and next_best >= _MARGIN * best.error
    return [replace(best, fits=best.error <= CLEAR or clearly), *others]


def _rounded(error: float) -> float:
    return round(error, 6) if math.isfinite(error) else math.inf


_FAR: Final = 1e18
"""What stands for a code or a scale that is no number: no reading with one fits."""


def _scaled(linear: QuantizedLinear, given: Floats, tile: Tile) -> Floats:
    """Return a tile with what is known beside its codes, save for a single global scale."""
    if linear.smoothing is not None:
        given = given * linear.smoothing[tile.column : tile.column + tile.columns]
    if linear.scales.size > 1:
        given = given * linear.scales[tile.row : tile.row + tile.rows, None]
    return np.nan_to_num(given, nan=_FAR, posinf=_FAR, neginf=-_FAR)


def _wanted(linear: QuantizedLinear, stretch: Stretch, source: Mapping[str, StoredTensor], tile: Tile) -> Floats:
    """Return what the codes of a tile stand for: the 16-bit weight, less the low-rank branch."""
    first = stretch.source_row + tile.row - stretch.row
    weight = floats_of(source[stretch.tensor], first, tile.rows, tile.column, tile.columns)
    branch = linear.beside(tile)
    if branch is None:
        return weight
    if linear.smoothing is not None:
        branch = branch * linear.smoothing[tile.column : tile.column + tile.columns]
    return np.asarray(weight - branch)


def _global_scales(linear: QuantizedLinear) -> dict[str, float]:
    if not linear.scale:
        return {"none": 1.0}
    if linear.scales.size > 1:
        return {"multiplier for each row": 1.0}  # multiplied already
    scale = float(linear.scales[0])
    return {"multiplier": scale} | ({"reciprocal": 1 / scale} if scale and math.isfinite(1 / scale) else {})


def _moved(sums: Mapping[Reading, _Sums], kinds: Mapping[str, float], uneven: float) -> Iterator[Fit]:
    """Yield the reading that fits up to a factor of each column, or row, far better than every other one."""
    alone: tuple[Moved, ...] = ("columns", "rows")
    best = [
        _judged(
            [
                Fit(reading, kind, each.error_up_to(moved, scale, uneven), moved)
                for reading, each in sums.items()
                for kind, scale in kinds.items()
            ]
        )[0]
        for moved in alone
    ]
    yield from sorted((fit for fit in best if fit.fits), key=lambda fit: fit.error)


def _factor(sums: Mapping[Reading, _Sums], kinds: Mapping[str, float]) -> float:
    """Return by what the global scale would have to be multiplied for the best reading to fit, 1 where none would."""
    scale = next(iter(kinds.values()))
    best = min(sums.values(), key=lambda each: each.error(each.factor))
    if not scale or best.factor <= 0 or best.error(best.factor) > _LIMITS["nothing"]:
        return 1.0
    factor = best.factor / scale
    return 1.0 if 1 / _OTHER_SCALE < factor < _OTHER_SCALE else factor
