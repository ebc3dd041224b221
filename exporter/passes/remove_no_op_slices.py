"""Drop slices that take everything: torch writes ``x[:, :]`` as one Slice an axis."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["remove_no_op_slices"]

_TO_THE_END = np.iinfo(np.int64).max


def remove_no_op_slices(model: ir.Model) -> None:
    """Rewrite in place: a Slice from 0 to the largest integer in steps of 1 is its input, where it is not an output."""
    for node in list(model.graph):
        if node.op_type == "Slice" and node.domain == "" and _takes_everything(node):
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def _takes_everything(node: ir.Node) -> bool:
    if len(node.inputs) != 5 or node.outputs[0].is_graph_output():
        return False
    return all(_is_constant(node.inputs[index], wanted) for index, wanted in ((1, 0), (2, _TO_THE_END), (4, 1)))


def _is_constant(value: ir.Value | None, wanted: int) -> bool:
    return value is not None and value.const_value is not None and bool((value.const_value.numpy() == wanted).all())
