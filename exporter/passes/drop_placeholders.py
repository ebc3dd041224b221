"""Leave in 16 bit what a checkpoint does not have quantized."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from exporter.trt_ops import placeholder_linear

__all__ = ["drop_placeholders"]


def drop_placeholders(model: ir.Model, quantized: Collection[str]) -> None:
    """Rewrite in place, a graph that we traced: a placeholder of a linear that is not in ``quantized`` is its input."""
    kept = {None, *quantized}
    for node in list(model.graph):
        if placeholder_linear(node) not in kept:
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
