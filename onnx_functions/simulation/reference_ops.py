"""The second witness: onnx's own ReferenceEvaluator on the deployable graph as it stands.

It reads the same file and nothing of :mod:`onnx_functions.simulation.simulate`; only the trt operators, which onnx does
not know, are given to it, in numpy (see :mod:`onnx_functions.formats`). Slow: for small graphs.
"""

from __future__ import annotations

from pathlib import Path

from onnx.reference import ReferenceEvaluator

from fp4trt.number_formats import FORMATS
from onnx_functions.formats import graph_format
from onnx_functions.formats.nvfp4 import TRT_FP4DynamicQuantize, quantize_nvfp4
from onnx_functions.graph.external_data import embedded

__all__ = ["TRT_FP4DynamicQuantize", "quantize_nvfp4", "reference_evaluator"]


def reference_evaluator(path: Path) -> ReferenceEvaluator:
    """Open a deployable ONNX file, with its external data, in the ReferenceEvaluator.

    Inputs and outputs have the graph's own types; BF16 is ml_dtypes.bfloat16.
    """
    operators = [operator for name in FORMATS for operator in graph_format(name).OPERATORS]
    return ReferenceEvaluator(embedded(path), new_ops=operators)
