"""Weights that a model computes with in FP32: stored so, or in BF16 and cast."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from fp4trt.account import SCALE_LEAVES

__all__ = ["widen_weights"]


def widen_weights(model: ir.Model, wide: Container[str]) -> None:
    """Let every weight that was traced in FP32 be of the type that it is stored in.

    1. One that is stored in FP32, or is to be, stays as it is.
    2. Any other becomes one of BF16, and a Cast, which is exact, gives its readers FP32.

    A weight has no value yet; constants, which have one, and the scales of quantized linears stay as they are.

    Args:
        model: changed in place.
        wide: names of the weights that are stored in FP32.
    """
    graph = model.graph
    for name, value in graph.initializers.items():
        is_scale = name.rpartition(".")[2] in SCALE_LEAVES
        if value.const_value is not None or value.dtype != ir.DataType.FLOAT or is_scale or name in wide:
            continue
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}/Cast")
        wider = cast.outputs[0]
        wider.name, wider.shape, wider.type = f"{name}/Cast_output_0", value.shape, ir.TensorType(ir.DataType.FLOAT)
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
        for node, index in list(value.uses()):
            if node is not cast:
                node.replace_input_with(index, wider)
        graph.insert_before(graph[0], cast)
