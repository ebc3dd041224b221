"""Weights that a model computes with in FP32: stored in BF16, as every other one, and cast."""

from __future__ import annotations

import onnx_ir as ir

from fp4trt.account import SCALE_LEAVES

__all__ = ["widen_weights"]


def widen_weights(model: ir.Model) -> None:
    """Make every weight that was traced in FP32 one of BF16 and let a Cast, which is exact, give its readers FP32.

    A weight has no value yet; constants, which have one, and the scales of quantized linears stay as they are.
    """
    graph = model.graph
    for name, value in graph.initializers.items():
        is_scale = name.rpartition(".")[2] in SCALE_LEAVES
        if value.const_value is not None or value.dtype != ir.DataType.FLOAT or is_scale:
            continue
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}/Cast")
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.type = f"{name}/Cast_output_0", value.shape, ir.TensorType(ir.DataType.FLOAT)
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
        for node, index in list(value.uses()):
            if node is not cast:
                node.replace_input_with(index, wide)
        graph.insert_before(graph[0], cast)
