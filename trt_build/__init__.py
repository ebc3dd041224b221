"""Deployable ONNX in, engine out: TensorRT-RTX builds in a child process, with FP4 coverage checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trt_build.builder import build as build

from fp4trt import moved

__all__ = ["build"]

moved.install()


def __getattr__(name: str) -> object:
    """Load `build` on first use, so that importing the package stays cheap (PEP 562)."""
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trt_build.builder import build

    return build
