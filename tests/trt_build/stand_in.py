"""TensorRT-RTX in the place of TensorRT, which needs a GPU."""

from __future__ import annotations

__all__ = ["STAND_IN"]

STAND_IN = """
from tensorrt_rtx import *
import tensorrt_rtx as _rtx
class Builder(_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(_rtx.ComputeCapability.SM120, 0)
        return config
__version__ = _rtx.__version__
"""
"""Source of a module ``tensorrt``; the one difference that matters: without a GPU it must be told its target."""
