"""Several processes at one command, as ``accelerate launch`` or torchrun starts them; one alone needs none of this."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["count", "is_main", "largest", "own_folder", "rank", "share", "wait"]

_PATIENCE = timedelta(hours=12)
"""How long one process waits for another, which may be writing a large model."""

T = TypeVar("T")


def count() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which one this is."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the one that writes results."""
    return rank() == 0


def share(calls: Sequence[T]) -> Sequence[T]:
    """Return this process's part of some work; all of it where there is less than one piece for each."""
    return (
        calls
        if count() == 1 or len(calls) < count()
        else [calls[index] for index in range(rank(), len(calls), count())]
    )


def own_folder(folder: Path) -> Path:
    """Return this process's own folder for unfinished work."""
    return folder if is_main() else folder.with_name(f"{folder.name}.{rank()}")


def largest(amax: Mapping[str, float], device: str) -> dict[str, float]:
    """Return for each name the largest value that any process has; each has to have the same names."""
    if count() == 1:
        return dict(amax)
    state = _state(device)
    values = torch.tensor(list(amax.values()), dtype=torch.float64, device=state.device)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return dict(zip(amax, values.tolist(), strict=True))


def wait(device: str) -> None:
    """Wait until every process is here."""
    if count() > 1:
        _state(device).wait_for_everyone()


def _state(device: str) -> Any:
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu", timeout=_PATIENCE)
