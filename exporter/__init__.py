"""Exporter: a quantized checkpoint in, an ONNX graph for TensorRT out."""

from __future__ import annotations

from typing import Any

from fp4trt import moved

__all__ = ["export", "export_graph"]

moved.install()


def __getattr__(name: str) -> Any:
    """Load a verb with its dependencies only when it is asked for."""
    if name == "export":
        from exporter.onnx_export import export

        return export
    if name == "export_graph":
        from exporter.placeholders import export_graph

        return export_graph
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
