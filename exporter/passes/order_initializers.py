"""Store initializers in the order in which the graph reads them."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["order_initializers"]


def order_initializers(model: ir.Model) -> None:
    """Reorder in place, so that the order does not tell how the graph was made; what nothing reads comes last."""
    initializers = model.graph.initializers
    read = [value for node in model.graph for value in node.inputs if value is not None and value.is_initializer()]
    for value in dict.fromkeys((*read, *initializers.values())):
        del initializers[str(value.name)]
        initializers[str(value.name)] = value
