"""The loops of ``column_rounding.py`` as machine code: many rows side by side, a block's columns one after another.

What belongs to some rows lies in buffers [16, rows], so that one column of all of them is one vector.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from calibration.formats.compiled import compiled

__all__ = ["descend", "feed_back"]

_TOGETHER: Final = 128
"""Rows that are rounded side by side."""

_HUGE: Final = np.finfo(np.float32).max
_0, _HALF, _1, _2, _4, _6 = (np.float32(value) for value in (0, 0.5, 1, 2, 4, 6))
_WHOLE: Final = np.float32(3 << 22)
"""Added to a small number and taken away again, it leaves the nearest whole one, of two the even one."""

Array = npt.NDArray[np.float32]


@compiled
def _nearest(x: Any, unit: Any, divisor: Any) -> Any:
    """Return what :func:`calibration.formats.nvfp4.values_under` does, ``divisor`` being the unit, or huge for 0."""
    q = x / divisor
    q = -_6 if q < -_6 else q
    q = _6 if q > _6 else q
    a = abs(q)
    low, middle, high = min(a, _2), min(max(a - _2, _0), _2), min(max((a - _4) * _HALF, _0), _1)
    low, middle, high = ((low + low) + _WHOLE) - _WHOLE, (middle + _WHOLE) - _WHOLE, (high + _WHOLE) - _WHOLE
    value = (low * _HALF + middle) + (high + high)
    value = -value if q < _0 else value
    value = q if a == _0 else value
    return value * unit


@compiled
def _load(buffer: Array, rows: Array) -> None:
    for row in range(len(rows)):
        for column in range(len(buffer)):
            buffer[column, row] = rows[row, column]


@compiled
def _add_products(total: Array, factors: Array, left: Array, count: Any) -> None:
    """Add ``factors[i] * left[i]`` to every row's total, for ``i`` below ``count`` and in this order."""
    fours: Any = count - count % 4
    for i in range(0, fours, 4):
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        for row in range(_TOGETHER):
            some = (total[row] + f0 * left[i, row]) + f1 * left[i + 1, row]
            total[row] = (some + f2 * left[i + 2, row]) + f3 * left[i + 3, row]
    for i in range(fours, count):
        for row in range(_TOGETHER):
            total[row] += factors[i] * left[i, row]


@compiled
def _set_units(unit: Array, divisor: Array, step: Array) -> None:
    for row in range(len(step)):
        unit[row] = step[row]
        divisor[row] = _HUGE if step[row] == _0 else step[row]


@compiled
def _keep_cheaper(tried: Any, cost: Array, found: Array, least: Array, kept: Array, which: Any) -> None:
    for row in range(_TOGETHER):
        which[row] = tried if tried == 0 or cost[row] < least[row] else which[row]
    for column in range(len(found)):
        for row in range(_TOGETHER):
            kept[column, row] = found[column, row] if which[row] == tried else kept[column, row]
    for row in range(_TOGETHER):
        least[row] = cost[row] if which[row] == tried else least[row]


@compiled
def feed_back(block: Array, carried: Array, step: Array, onto: Array, weights: Array, values: Array, best: Any) -> None:
    """Compute :func:`calibration.methods.quality.column_rounding.feed_back` into the last two arguments."""
    size: Any = block.shape[1]
    buffers = np.zeros((5, size, _TOGETHER), np.float32)
    own, start, error, found, kept = buffers[0], buffers[1], buffers[2], buffers[3], buffers[4]
    unit, divisor, target = np.ones_like(own[0]), np.ones_like(own[0]), np.zeros_like(own[0])
    cost, least, which = np.zeros_like(own[0]), np.zeros_like(own[0]), np.zeros(_TOGETHER, np.int32)
    for begin in range(0, len(block), _TOGETHER):
        end = min(begin + _TOGETHER, len(block))
        _load(own, block[begin:end])
        _load(start, carried[begin:end])
        for column in range(size):
            for row in range(_TOGETHER):
                start[column, row] += own[column, row]
        for tried in range(len(step)):
            _set_units(unit, divisor, step[tried, begin:end])
            cost[:] = _0
            for column in range(size):
                target[:] = start[column]
                _add_products(target, onto[column], error, column)
                for row in range(_TOGETHER):
                    value = _nearest(target[row], unit[row], divisor[row])
                    distance = (target[row] - value) * weights[column]
                    cost[row] += distance * distance
                    error[column, row] = own[column, row] - value
                    found[column, row] = value
            _keep_cheaper(tried, cost, found, least, kept, which)
        for row in range(end - begin):
            best[begin + row] = which[row]
            values[begin + row] = kept[:, row]


@compiled
def _round_block(wanted: Array, onto: Array, unit: Array, divisor: Array, found: Array, error: Array) -> None:
    target = np.empty_like(unit)
    for column in range(len(wanted)):
        target[:] = wanted[column]
        _add_products(target, onto[column], error, column)
        for row in range(_TOGETHER):
            found[column, row] = _nearest(target[row], unit[row], divisor[row])
            error[column, row] = wanted[column, row] - found[column, row]


@compiled
def _move_block(wanted: Array, moments: Array, unit: Array, divisor: Array, found: Array, error: Array) -> None:
    size: Any = len(wanted)
    total = np.empty_like(unit)
    for column in range(size):
        total[:] = _0
        _add_products(total, moments[column], error, size)
        curvature = _1 / moments[column, column]
        for row in range(_TOGETHER):
            aim = found[column, row] + total[row] * curvature
            found[column, row] = _nearest(aim, unit[row], divisor[row])
            error[column, row] = wanted[column, row] - found[column, row]


@compiled
def _cost(moments: Array, error: Array, cost: Array) -> None:
    size: Any = len(error)
    total = np.empty_like(cost)
    cost[:] = _0
    for column in range(size):
        total[:] = _0
        _add_products(total, moments[column], error, size)
        for row in range(_TOGETHER):
            cost[row] += error[column, row] * total[row]


@compiled
def _want(held: Array, entered: Array, inverse: Array, wanted: Array, now: Array) -> None:
    """Set what would cost least, and what the rows cost now beyond that."""
    size: Any = len(held)
    away = np.empty_like(now)
    now[:] = _0
    for column in range(size):
        away[:] = _0
        _add_products(away, inverse[column], entered, size)
        for row in range(_TOGETHER):
            wanted[column, row] = held[column, row] - away[row]
            now[row] += away[row] * entered[column, row]


@compiled
def descend(
    values: Array,
    slope: Array,
    step: Array,
    moments: Array,
    inverse: Array,
    onto: Array,
    sweeps: int,
    better: float,
    results: Array,
    best: Any,
) -> None:
    """Compute :func:`calibration.methods.quality.column_rounding.descend` into the last two arguments."""
    size: Any = values.shape[1]
    buffers = np.zeros((6, size, _TOGETHER), np.float32)
    held, entered, wanted, error, found, kept = (
        buffers[0],
        buffers[1],
        buffers[2],
        buffers[3],
        buffers[4],
        buffers[5],
    )
    unit, divisor, now = np.ones_like(held[0]), np.ones_like(held[0]), np.zeros_like(held[0])
    cost, least, which = np.zeros_like(held[0]), np.zeros_like(held[0]), np.zeros(_TOGETHER, np.int32)
    for begin in range(0, len(values), _TOGETHER):
        end = min(begin + _TOGETHER, len(values))
        _load(held, values[begin:end])
        _load(entered, slope[begin:end])
        _want(held, entered, inverse, wanted, now)
        for tried in range(len(step)):
            _set_units(unit, divisor, step[tried, begin:end])
            if tried < len(step) - 1:
                _round_block(wanted, onto, unit, divisor, found, error)
            else:
                found[:] = held
                error[:] = wanted - found
            for _ in range(sweeps):
                _move_block(wanted, moments, unit, divisor, found, error)
            _cost(moments, error, cost)
            _keep_cheaper(tried, cost, found, least, kept, which)
        for row in range(end - begin):
            stays = not least[row] < now[row] * np.float32(better)
            best[begin + row] = len(step) if stays else which[row]
            results[begin + row] = held[:, row] if stays else kept[:, row]
