"""Leave in 16 bit what a checkpoint does not have in FP4."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from exporter.trt_ops import ACTIVATION_PLACEHOLDER, WEIGHT_PLACEHOLDER

__all__ = ["drop_placeholders"]


def drop_placeholders(model: ir.Model, quantized: Collection[str]) -> None:
    """Rewrite in place, a graph that we traced: a placeholder of a linear that is not in ``quantized`` is its input."""
    kept = {None, *quantized}
    for node in list(model.graph):
        if _linear(node) not in kept:
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def _linear(node: ir.Node) -> str | None:
    """Return the path of the linear that a placeholder stands for, or None for any other node."""
    if node.op_type == ACTIVATION_PLACEHOLDER:
        return node.attributes["linear"].as_string()
    if node.op_type == WEIGHT_PLACEHOLDER and node.inputs[0] is not None:
        return str(node.inputs[0].name).removesuffix(".weight")
    return None
