"""Round blocks of 16 columns one column after the other, under several scales: the inner loops of GPTQ and of descent.

Both choose values and scale of each row's block for the least of ``(q - t) H (q - t)^T``, and differ in what is around
it. Each is there twice, with the same bits: in torch, to be read and for GPUs, where each column becomes one kernel
(:func:`fused`); and compiled by Numba (``column_kernels.py``), which is many times faster on a CPU because a row's
block stays in the nearest cache for all scales.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from calibration.formats import nvfp4

__all__ = ["FUSED", "descend", "descend_in_torch", "feed_back", "feed_back_in_torch", "fused"]

_BETTER = 1 - 1e-6
"""Factor on a cost that another has to be under: less is within what FP32 cannot tell."""

Chosen = tuple[torch.Tensor, torch.Tensor]


def feed_back(
    block: torch.Tensor, carried: torch.Tensor, step: torch.Tensor, onto: torch.Tensor, weights: torch.Tensor
) -> Chosen:
    """Round every row under each of some scales, giving each column's error to those that follow; keep the cheapest.

    Args:
        block: FP32 [N, 16].
        carried: what the columns before the block add to each target, FP32 [N, 16].
        step: what one is worth under each scale, FP32 [C, N].
        onto: what the errors of a block's columns add to each column's target, FP32 [16, 16]; read below its diagonal.
        weights: of each column's distance from its target, FP32 [16].

    Returns:
        values, FP32 [N, 16]; which of the scales they are under, int64 [N].
    """
    if not block.is_cpu:
        return feed_back_in_torch(block, carried, step, onto, weights, fused)
    from calibration.methods.quality import column_kernels

    values, best = torch.empty(block.shape), torch.empty(len(block), dtype=torch.long)
    arrays = [value.contiguous().numpy() for value in (block, carried, step, onto, weights)]
    column_kernels.feed_back(*arrays, values.numpy(), best.numpy())
    return values, best


def feed_back_in_torch(
    block: torch.Tensor,
    carried: torch.Tensor,
    step: torch.Tensor,
    onto: torch.Tensor,
    weights: torch.Tensor,
    fuse: Callable[[Any], Any] = lambda function: function,
) -> Chosen:
    """Compute :func:`feed_back` in torch; ``fuse`` turns each of :data:`FUSED` into one kernel."""
    round_column, add_square = fuse(_round_column), fuse(_add_square)
    own, start = block.T, (block + carried).T
    onto, values = onto.tril(-1), step.new_empty(len(own), *step.shape)
    errors, cost = torch.zeros_like(values), torch.zeros_like(step)
    for column in range(len(own)):
        target, values[column], errors[column] = round_column(start[column], onto[column], errors, own[column], step)
        cost = add_square(cost, target, values[column], weights[column])
    return _cheapest(values, cost)


def descend(
    values: torch.Tensor,
    slope: torch.Tensor,
    step: torch.Tensor,
    moments: torch.Tensor,
    inverse: torch.Tensor,
    onto: torch.Tensor,
    sweeps: int,
) -> Chosen:
    """Choose every row's block anew, the other blocks given, where that lowers the cost.

    Under each scale the block is rounded with feedback for the values that would cost least, and each column then moved
    to where it costs least, given the others.

    Args:
        values: FP32 [N, 16].
        slope: half of the cost's gradient there, FP32 [N, 16].
        step: what one is worth under each scale, FP32 [C, N]. The last is the one that a row has; under it the columns
            are moved from where they are.
        moments, inverse: H of the block and its inverse, FP32 [16, 16].
        onto: as in :func:`feed_back`.
        sweeps: through the columns.

    Returns:
        values, FP32 [N, 16]; which of the scales they are under, int64 [N], C where a row stays as it is.
    """
    if not values.is_cpu:
        return descend_in_torch(values, slope, step, moments, inverse, onto, sweeps, fused)
    from calibration.methods.quality import column_kernels

    found, best = torch.empty(values.shape), torch.empty(len(values), dtype=torch.long)
    arrays = [value.contiguous().numpy() for value in (values, slope, step, moments, inverse, onto)]
    column_kernels.descend(*arrays, sweeps, _BETTER, found.numpy(), best.numpy())
    return found, best


def descend_in_torch(
    values: torch.Tensor,
    slope: torch.Tensor,
    step: torch.Tensor,
    moments: torch.Tensor,
    inverse: torch.Tensor,
    onto: torch.Tensor,
    sweeps: int,
    fuse: Callable[[Any], Any] = lambda function: function,
) -> Chosen:
    """Compute :func:`descend` in torch; ``fuse`` turns each of :data:`FUSED` into one kernel."""
    round_column, move_column, add_products, add_cost = map(fuse, (_round_column, _move_column, _dot, _add_cost))
    held, slopes, onto = values.T, slope.T.contiguous(), onto.tril(-1)
    away, now = torch.empty_like(slopes), torch.zeros_like(slopes[0])
    for column in range(len(held)):
        away[column] = add_products(torch.zeros_like(slopes[0]), inverse[column], slopes)
    wanted, found = held - away, step.new_empty(len(held), *step.shape)
    errors, curvature = torch.zeros_like(found), 1 / moments.diagonal()
    for column, own in enumerate(wanted):
        _, found[column], _ = round_column(own, onto[column], errors, own, step)
        found[column, -1] = held[column]
        errors[column] = own - found[column]
    for _ in range(sweeps):
        for column, own in enumerate(wanted):
            found[column], errors[column] = move_column(
                found[column], moments[column], errors, own, step, curvature[column]
            )
    cost = torch.zeros_like(step)
    for column, factors in enumerate(moments):
        cost = add_cost(cost, factors, errors, errors[column])
        now = now + away[column] * slopes[column]
    chosen, best = _cheapest(found, cost)
    better = cost.gather(0, best.unsqueeze(0)).squeeze(0) < now * _BETTER
    return torch.where(better.unsqueeze(-1), chosen, values), torch.where(better, best, len(step))


@functools.cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of :data:`FUSED` as one kernel, with the rounding of torch's own operators: no fused multiply-add."""
    exact: dict[str, str | int | bool | Callable[..., Any]] = {
        "emulate_precision_casts": True,
        "eager_numerics.division_rounding": True,
        "eager_numerics.disable_ftz": True,
    }
    return torch.compile(function, dynamic=True, fullgraph=True, options=exact)


def _round_column(
    start: torch.Tensor, factors: torch.Tensor, errors: torch.Tensor, own: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a column's target, the value nearest to it under each scale, and what is then missing."""
    target = _dot(start.expand_as(step), factors, errors)
    value = nvfp4.values_under(target, step)
    return target, value, own - value


def _move_column(
    held: torch.Tensor,
    factors: torch.Tensor,
    errors: torch.Tensor,
    own: torch.Tensor,
    step: torch.Tensor,
    curvature: torch.Tensor,
) -> Chosen:
    """Return where a column costs least, given the others, and what is then missing."""
    total = _dot(torch.zeros_like(held), factors, errors)
    value = nvfp4.values_under(held + total * curvature, step)
    return value, own - value


def _add_square(cost: torch.Tensor, target: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    distance = (target - value) * weight
    return cost + distance * distance


def _add_cost(cost: torch.Tensor, factors: torch.Tensor, errors: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    return cost + error * _dot(torch.zeros_like(cost), factors, errors)


def _dot(start: torch.Tensor, factors: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Add the product of each factor and each value to what is there, in order."""
    for factor, value in zip(factors.unbind(), values.unbind(), strict=True):
        start = start + factor * value
    return start


FUSED = (_round_column, _move_column, _dot, _add_square, _add_cost)
"""What a block's rounding is made of: elementwise, so that each can be one kernel."""


def _cheapest(values: torch.Tensor, cost: torch.Tensor) -> Chosen:
    """Return of [16, C, N] what costs least in each row, the first of equals, and which it is: [N, 16], [N]."""
    best = cost.argmin(dim=0)
    index = best.expand(len(values), 1, -1)
    return values.gather(1, index).squeeze(1).T, best
