"""Round blocks of 16 columns one column after the other, under several scales: the inner loops of GPTQ and of descent.

Each loop is there twice, and both give the same bits: in torch, to be read and for GPUs, and for Numba, which is
many times faster on a CPU because a row's block stays in the nearest cache from its first column to its last.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from calibration.formats import nvfp4
from calibration.formats.compiled import compiled

__all__ = ["descend", "descend_reference", "feed_back", "feed_back_reference"]

_TOGETHER: Final = 128
"""Rows that are rounded side by side: as many numbers lie in a vector as the processor has room for."""

_HUGE: Final = np.finfo(np.float32).max
_0, _HALF, _1, _2, _4, _6 = (np.float32(value) for value in (0, 0.5, 1, 2, 4, 6))
_WHOLE: Final = np.float32(3 << 22)
"""Added to a small number and taken away again, it leaves the nearest whole one, of two the even one."""

Array = npt.NDArray[np.float32]


def feed_back(block: torch.Tensor, step: torch.Tensor, feedback: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row under each of some scales, giving each column's error to those that follow.

    Args:
        block: FP32 [N, 16].
        step: what one is worth under each scale, FP32 [C, N].
        feedback: upper triangle, FP32 [16, 16].

    Returns:
        values, FP32 [C, N, 16]; errors [C, N, 16] in the units of ``feedback``, whose squares add up to the cost.
    """
    if not block.is_cpu:
        return feed_back_reference(block, step, feedback)
    shape = (*step.shape, block.shape[-1])
    values, errors = torch.empty(shape), torch.empty(shape)
    arrays = [value.contiguous().numpy() for value in (block, step, feedback)]
    compiled(_feed_back)(*arrays, values.numpy(), errors.numpy())
    return values, errors


def feed_back_reference(
    block: torch.Tensor, step: torch.Tensor, feedback: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Be :func:`feed_back`, in torch."""
    left = block.expand(len(step), *block.shape).clone()
    values, errors = torch.empty_like(left), torch.empty_like(left)
    for column in range(block.shape[1]):
        values[..., column] = nvfp4.values_under(left[..., column], step)
        errors[..., column] = (left[..., column] - values[..., column]) / feedback[column, column]
        left[..., column + 1 :] -= errors[..., column : column + 1] * feedback[column, column + 1 :]
    return values, errors


def descend(
    rounded: torch.Tensor, gradient: torch.Tensor, step: torch.Tensor, moments: torch.Tensor, sweeps: int
) -> None:
    """Move each column to where it costs least, given the others, and follow the gradient.

    Args:
        rounded: values under each scale, FP32 [C, N, 16]; changed in place.
        gradient: half of the cost's, FP32 [C, N, 16]; changed in place.
        step: what one is worth under each scale, FP32 [C, N].
        moments: FP32 [16, 16].
        sweeps: through the columns.
    """
    if not rounded.is_cpu:
        descend_reference(rounded, gradient, step, moments, sweeps)
        return
    assert rounded.is_contiguous()
    assert gradient.is_contiguous()
    arrays = [value.contiguous().numpy() for value in (step, moments)]
    compiled(_descend)(rounded.numpy(), gradient.numpy(), *arrays, sweeps)


def descend_reference(
    rounded: torch.Tensor, gradient: torch.Tensor, step: torch.Tensor, moments: torch.Tensor, sweeps: int
) -> None:
    """Be :func:`descend`, in torch."""
    for _ in range(sweeps):
        for column in range(rounded.shape[-1]):
            moved = nvfp4.values_under(rounded[..., column] - gradient[..., column] / moments[column, column], step)
            gradient += (moved - rounded[..., column]).unsqueeze(-1) * moments[column]
            rounded[..., column] = moved


def _feed_back(block: Array, step: Array, feedback: Array, values: Array, errors: Array) -> None:
    size: Any = block.shape[1]
    buffers = np.zeros((3, size, _TOGETHER), np.float32)
    left, found, lost = buffers[0], buffers[1], buffers[2]
    unit, divisor = np.ones_like(left[0]), np.ones_like(left[0])
    for tried in range(len(step)):
        for start in range(0, len(block), _TOGETHER):
            together = min(_TOGETHER, len(block) - start)
            for row in range(together):
                unit[row] = step[tried, start + row]
                divisor[row] = _HUGE if unit[row] == _0 else unit[row]
                for column in range(size):
                    left[column, row] = block[start + row, column]
            for column in range(size):
                for row in range(_TOGETHER):
                    q = left[column, row] / divisor[row]
                    q = -_6 if q < -_6 else q
                    q = _6 if q > _6 else q
                    a = abs(q)
                    low, middle, high = min(a, _2), min(max(a - _2, _0), _2), min(max((a - _4) * _HALF, _0), _1)
                    low, middle, high = (
                        ((low + low) + _WHOLE) - _WHOLE,
                        (middle + _WHOLE) - _WHOLE,
                        (high + _WHOLE) - _WHOLE,
                    )
                    value = (low * _HALF + middle) + (high + high)
                    value = -value if q < _0 else value
                    value = q if a == _0 else value
                    found[column, row] = value * unit[row]
                    lost[column, row] = (left[column, row] - found[column, row]) / feedback[column, column]
                for other in range(column + 1, size):
                    factor = feedback[column, other]
                    for row in range(_TOGETHER):
                        left[other, row] -= lost[column, row] * factor
            for row in range(together):
                for column in range(size):
                    values[tried, start + row, column] = found[column, row]
                    errors[tried, start + row, column] = lost[column, row]


def _descend(rounded: Array, gradient: Array, step: Array, moments: Array, sweeps: int) -> None:
    size: Any = rounded.shape[2]
    buffers = np.zeros((2, size, _TOGETHER), np.float32)
    found, slope = buffers[0], buffers[1]
    moved, unit, divisor = np.empty_like(found[0]), np.ones_like(found[0]), np.ones_like(found[0])
    for tried in range(len(step)):
        for start in range(0, rounded.shape[1], _TOGETHER):
            together = min(_TOGETHER, rounded.shape[1] - start)
            for row in range(together):
                unit[row] = step[tried, start + row]
                divisor[row] = _HUGE if unit[row] == _0 else unit[row]
                for column in range(size):
                    found[column, row] = rounded[tried, start + row, column]
                    slope[column, row] = gradient[tried, start + row, column]
            for _ in range(sweeps):
                for column in range(size):
                    for row in range(_TOGETHER):
                        wanted = found[column, row] - slope[column, row] / moments[column, column]
                        q = wanted / divisor[row]
                        q = -_6 if q < -_6 else q
                        q = _6 if q > _6 else q
                        a = abs(q)
                        low, middle, high = min(a, _2), min(max(a - _2, _0), _2), min(max((a - _4) * _HALF, _0), _1)
                        low, middle, high = (
                            ((low + low) + _WHOLE) - _WHOLE,
                            (middle + _WHOLE) - _WHOLE,
                            (high + _WHOLE) - _WHOLE,
                        )
                        value = (low * _HALF + middle) + (high + high)
                        value = -value if q < _0 else value
                        value = q if a == _0 else value
                        value = value * unit[row]
                        moved[row] = value - found[column, row]
                        found[column, row] = value
                    for other in range(size):
                        factor = moments[column, other]
                        for row in range(_TOGETHER):
                            slope[other, row] += moved[row] * factor
            for row in range(together):
                for column in range(size):
                    rounded[tried, start + row, column] = found[column, row]
                    gradient[tried, start + row, column] = slope[column, row]
