"""What uncached runs tell: how far apart the signals, and the velocities, of each two steps are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fp4trt.families import Family
from generation.comparison.drawing import Batch
from generation.step_caching.deciders import Signal, latents_name, relative_distance, time_name, time_of

__all__ = ["Distances", "distances_of", "walks_of"]

Array = npt.NDArray[np.float64]
Call = tuple[dict[str, Any], torch.Tensor]


@dataclass(frozen=True)
class Distances:
    """Relative L1 distances of each step to the one before, of images in all contexts.

    Attributes:
        signal: FP64 [steps - 1, images], of the decider's signal.
        output: FP64 [steps - 1, images], of the velocity.
    """

    signal: Array
    output: Array


def walks_of(batch: Batch, family: Family) -> list[list[Call]]:
    """Return the calls of a batch, with their velocities, as walks from noise: one for each call that a step makes."""
    latents, time = latents_name(family), time_name(family)
    walks: list[list[Call]] = []
    place = 0
    before: dict[str, Any] | None = None
    for call, velocity in zip(batch.calls, batch.velocities, strict=True):
        again = before is not None and time_of(before[time]) == time_of(call[time])
        again = again and before is not None and torch.equal(before[latents], call[latents])
        place = place + 1 if again else 0
        before = call
        if place == len(walks):
            walks.append([])
        walks[place].append((call, velocity))
    return walks


def distances_of(batches: Iterable[Batch], family: Family, signal: Signal) -> Distances:
    """Return the distances of all steps of uncached runs."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in batches:
        for walk in walks_of(batch, family):
            signals = [signal(call) for call, _ in walk]
            velocities = [velocity.float() for _, velocity in walk]
            outputs = _distances(velocities)
            found.append((_distances(signals).expand_as(outputs), outputs))
    signal_side, output_side = (torch.cat([pair[side] for pair in found], dim=1).double().numpy() for side in (0, 1))
    return Distances(signal_side, output_side)


def _distances(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the distance of each value to the one before, FP32 [steps - 1, B]."""
    return torch.stack([relative_distance(after, first) for first, after in itertools.pairwise(values)])
