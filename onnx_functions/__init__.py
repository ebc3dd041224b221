"""Deployable ONNX in, verdict on its numerics out: what FP4 operators mean, and whether a graph computes it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_functions.linting import lint
    from onnx_functions.simulation.simulate import session, simulate
    from onnx_functions.validation.run_gates import validate

from fp4trt import moved

__all__ = ["lint", "session", "simulate", "validate"]

_HOME = {
    "lint": "onnx_functions.linting",
    "session": "onnx_functions.simulation.simulate",
    "simulate": "onnx_functions.simulation.simulate",
    "validate": "onnx_functions.validation.run_gates",
}

moved.install()


def __getattr__(name: str) -> Any:
    """Load a verb on first use (PEP 562): `validate` needs torch, the others do not."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
