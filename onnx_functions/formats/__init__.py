"""What each number format is in an ONNX graph, under one set of names: one module a format, numpy only.

A second witness of the arithmetic in :mod:`calibration.formats`: nothing here is imported from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, NodeProto
from onnx.reference.op_run import OpRun

from fp4trt.number_formats import FORMATS

__all__ = ["FloatArray", "GraphFormat", "Raw", "graph_format"]

FloatArray = npt.NDArray[np.float32]

Raw = Callable[[str], npt.NDArray[Any]]
"""Last part of the name of a linear's tensor to what is stored."""

Round = Callable[[FloatArray], FloatArray]
"""Rounds the product of two scales as the graph does."""


class GraphFormat(Protocol):
    """The module of a format.

    Attributes:
        ERROR_LIMIT: of a weight rounded to nearest, relative L2.
        OPERATORS: of the format, in numpy, for onnx's ReferenceEvaluator.
    """

    ERROR_LIMIT: float
    OPERATORS: Sequence[type[OpRun]]

    @staticmethod
    def functions() -> Sequence[FunctionProto]:
        """Return what ONNX Runtime needs beside its own operators."""
        ...

    @staticmethod
    def quantizer_node() -> NodeProto:
        """Return the quantizer of an activation: `x` [M, K] and, where the format has one, `scale` in; `q`, `s` out."""
        ...

    @staticmethod
    def bytes_of(outputs: Sequence[FloatArray]) -> tuple[npt.NDArray[np.uint8], ...]:
        """Return codes and block scales that a quantizer gave, in FP32, as the bytes that are stored."""
        ...

    @staticmethod
    def dequantize(quantized: Sequence[FloatArray], scale: np.float32, rounded: Round) -> FloatArray:
        """Return what codes and block scales stand for, in FP32."""
        ...

    @staticmethod
    def stored(raw: Raw) -> tuple[tuple[FloatArray, ...], np.float32]:
        """Return the values of codes and block scales as they are stored, in FP32, and the scale of the tensor."""
        ...


def graph_format(name: str) -> GraphFormat:
    """Return what the format of this name is in a graph."""
    return cast(GraphFormat, importlib.import_module(FORMATS[name].graph))
