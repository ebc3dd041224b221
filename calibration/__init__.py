"""Calibration: a BF16 checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import importlib
from typing import Any

from fp4trt import moved

__all__ = ["calibrate", "compare", "convert", "load", "quantize", "read", "search"]

_HOME = {
    "calibrate": "calibration.by_block.calibration",
    "compare": "generation.comparison.compare",
    "convert": "calibration.interchange.convert",
    "search": "calibration.layer_choice.search",
    "quantize": "calibration.quantization",
    "load": "calibration.checkpoints.quantized",
    "read": "calibration.checkpoints.quantized",
}

moved.install()


def __getattr__(name: str) -> Any:
    """Load a public function with its room's dependencies only when it is asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
