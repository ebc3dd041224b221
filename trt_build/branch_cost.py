"""What low-rank branches, SVDQuant's and slots for LoRAs, cost an engine: bytes, and kernels for nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnx_functions.graph.branches import SMOOTHING, is_factor
from onnx_functions.graph.external_data import nbytes_of
from trt_build.graph import Graph
from trt_build.layer_info import Layer

__all__ = ["branch_cost", "slot_cost"]


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
    return {"linears": len(graph.branched), "bytes": sum(stored), "kernels": _kernels(graph.branch_products, layers)}


def slot_cost(graph: Graph, layers: Iterable[Layer]) -> dict[str, Any] | None:
    """Return what the slots for LoRAs of a graph cost, as JSON; None for a graph without any.

    Returns:
        ``linears`` with a slot; ``max_rank`` of a LoRA; ``kernels`` that compute them, also those that pad a factor
        whose rank may change, and those that add the result to the product as they go.
    """
    slots = graph.slots
    if slots is None:
        return None
    kernels = _kernels(graph.slot_products, layers)
    return {"linears": sum(map(len, slots.groups)), "max_rank": slots.max_rank, "kernels": kernels}


def _kernels(products: Iterable[str], layers: Iterable[Layer]) -> int:
    """Return how many kernels serve some products."""
    names = set(products)
    return sum(any(node in names for node in layer.onnx_nodes) for layer in layers)
