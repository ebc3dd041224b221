"""Batches that an engine's profiles do not take in one call, as several calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from calibration.inputs.captured import Inputs
from generation.pipelines.model import Profile

__all__ = ["joined", "largest_batch", "split"]

Shapes = Mapping[str, Sequence[str | int]]
"""Input to its symbolic shape; ``B`` is the batch."""


def largest_batch(profiles: Sequence[Profile], shapes: Shapes, call: Inputs) -> int | None:
    """Return how many pictures a profile takes of a call's sizes; None where none says, or none takes these sizes."""
    found = [most for profile in profiles if (most := _of_profile(profile, shapes, call)) is not None]
    return max(found, default=None)


def _of_profile(profile: Profile, shapes: Shapes, call: Inputs) -> int | None:
    batches = []
    for name, symbols in shapes.items():
        if name not in profile:
            return None
        least, _, most = profile[name]
        for symbol, low, high, size in zip(symbols, least, most, call[name].shape, strict=True):
            if symbol == "B":
                batches.append(int(high))
            elif not low <= size <= high:
                return None
    return min(batches, default=None)


def split(call: Inputs, shapes: Shapes, most: int | None) -> Iterator[Inputs]:
    """Yield a call as calls of at most so many pictures; inputs without a batch are in each."""
    batched = [name for name, symbols in shapes.items() if symbols[:1] == ("B",)]
    count = max((len(call[name]) for name in batched), default=1)
    if most is None or count <= most:
        yield call
        return
    for first in range(0, count, most):
        part = slice(first, first + most)
        yield {name: value[part] if name in batched else value for name, value in call.items()}


def joined(outputs: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Return the outputs of a split call as those of one."""
    return outputs[0] if len(outputs) == 1 else tuple(torch.cat(each) for each in zip(*outputs, strict=True))
