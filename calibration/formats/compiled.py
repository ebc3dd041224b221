"""Functions of arrays as machine code, by Numba."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["compiled"]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as machine code, from Numba's cache where that can be written; other threads run meanwhile."""
    import numba

    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the folder of this file nor the user's own takes a cache
        return numba.njit(nogil=True, error_model="numpy")(function)
