"""Validate the numerics of a graph, gate by gate."""

from __future__ import annotations

from typing import Any

__all__ = ["validate"]


def __getattr__(name: str) -> Any:
    """Load `validate` on first use: it runs the torch reference, other modules here need no torch."""
    if name != "validate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from onnx_functions.validation.run_gates import validate

    return validate
