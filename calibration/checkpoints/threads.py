"""How many threads torch computes on: a small model is slower on several, and its sums come out otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch

from fp4trt.families import family_of

__all__ = ["SMALL", "suited_threads"]

SMALL: Final = 1024
"""Rows or columns of the largest linear of a model that runs on one thread."""


@contextlib.contextmanager
def suited_threads(config: dict[str, Any]) -> Iterator[None]:
    """Let torch compute on one thread where a model is small, whatever ``OMP_NUM_THREADS`` says.

    Args:
        config: of the model.
    """
    before = torch.get_num_threads()
    largest = max(max(shape) for shape in family_of(config).linears(config).values())
    if largest < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
