"""What the low-rank branches of SVDQuant cost an engine: bytes, and kernels that would not be there without them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnx_functions.graph.branches import SMOOTHING, is_factor
from onnx_functions.graph.external_data import nbytes_of
from trt_build.graph import Graph
from trt_build.layer_info import Layer

__all__ = ["branch_cost"]


def branch_cost(graph: Graph, layers: Iterable[Layer]) -> dict[str, Any] | None:
    """Return what the branches of a graph cost, as JSON; None for a graph without any.

    Returns:
        ``linears`` with a branch; ``bytes`` of all factors and smoothings; ``kernels`` that compute them, also those
        that add it to the product as they go. The kernel that makes an input smooths it too, at no cost of its own.
    """
    names = (name for name in graph.index.constants if is_factor(name) or name.endswith(f".{SMOOTHING}"))
    stored = [nbytes_of(graph.index.constants[name]) for name in names]
    if not stored:
        return None
    products = set(graph.branch_products)
    return {
        "linears": len(graph.branched),
        "bytes": sum(stored),
        "kernels": sum(any(node in products for node in layer.onnx_nodes) for layer in layers),
    }
