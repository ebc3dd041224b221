"""How many cores there are to compute on."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["cores"]


def cores() -> int:
    """Return how many cores this process may use."""
    ask: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # neither Windows nor macOS has it
    return len(ask(0)) if ask else os.cpu_count() or 1
