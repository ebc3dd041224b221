"""Exporter: a quantized checkpoint in, an ONNX graph for TensorRT out."""

from __future__ import annotations

from typing import Any

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    """Load ``export`` with its dependencies only when it is asked for."""
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from exporter.onnx_export import export

    return export
