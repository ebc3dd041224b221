"""The operators of quantization while a model is traced, and the ONNX nodes that stand for them.

A linear that can be quantized leaves torch as two placeholders around its product, which
:mod:`exporter.passes.double_dequantize` (FP4) and :mod:`exporter.passes.fp8_quantize` then replace by what TensorRT
reads::

    x      -> trt::TRT_FP4DynamicQDQ(linear=path) -> MatMul (+ Add)
    weight -> trt::TRT_FP4QDQ -> Transpose ----------^

The operators are traced on the meta device and never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import onnx.defs
import onnx_ir as ir
import torch
from onnxscript import opset23 as op
from onnxscript import values
from torch import nn

__all__ = [
    "ACTIVATION_PLACEHOLDER",
    "DOMAIN",
    "QUANTIZER",
    "WEIGHT_PLACEHOLDER",
    "TracedLinear",
    "placeholder_linear",
    "replace_placeholders",
    "translations",
]

DOMAIN: Final = "trt"
WEIGHT_PLACEHOLDER: Final = "TRT_FP4QDQ"
"""NVIDIA's name for a weight that is to be stored in FP4."""
ACTIVATION_PLACEHOLDER: Final = "TRT_FP4DynamicQDQ"
"""Ours, for an activation: names the linear whose scale it takes. No graph that we write holds it."""
QUANTIZER: Final = "TRT_FP4DynamicQuantize"
"""TensorRT's quantizer of an activation: codes and block scales out."""


@torch.library.custom_op("fp4trt::fp4_dynamic_qdq", mutates_args=())
def _activation_qdq(x: torch.Tensor, linear: str) -> torch.Tensor:
    """Stand for ``x`` [..., K] rounded to NVFP4 as the linear of that path reads it."""
    raise NotImplementedError("this operator is only traced; load the checkpoint to compute")


@_activation_qdq.register_fake
def _(x: torch.Tensor, linear: str) -> torch.Tensor:  # noqa: ARG001 - the operator's signature
    return torch.empty_like(x)


@torch.library.custom_op("fp4trt::fp4_qdq", mutates_args=())
def _weight_qdq(weight: torch.Tensor) -> torch.Tensor:
    """Stand for a weight [N, K] that is stored in NVFP4."""
    raise NotImplementedError("this operator is only traced; load the checkpoint to compute")


@_weight_qdq.register_fake
def _(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(weight)


class TracedLinear(nn.Linear):
    """A linear, which may be quantized, while the model is traced; ``path`` is its module path."""

    def __init__(self, linear: nn.Linear, path: str) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype)
        self.path = path

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``input`` [..., K] to [..., N]."""
        x = torch.ops.fp4trt.fp4_dynamic_qdq(input, self.path)
        return nn.functional.linear(x, torch.ops.fp4trt.fp4_qdq(self.weight), self.bias)


def placeholder_linear(node: ir.Node) -> str | None:
    """Return the path of the linear that a placeholder of ours stands for, or None for any other node."""
    if node.op_type == ACTIVATION_PLACEHOLDER:
        return node.attributes["linear"].as_string()
    if node.op_type == WEIGHT_PLACEHOLDER and node.inputs[0] is not None:
        return str(node.inputs[0].name).removesuffix(".weight")
    return None


def replace_placeholders(
    graph: ir.Graph,
    leaders: Mapping[str, str],
    *,
    activation: Callable[[ir.Graph, ir.Node, ir.Value, str], ir.Value],
    weight: Callable[[ir.Graph, ir.Node, ir.Value, str], ir.Value],
) -> None:
    """Replace, in place, the placeholders of the linears in ``leaders``; those of other linears stay.

    Args:
        graph: with placeholders.
        leaders: module path of each linear to the first of those that read the same quantized input.
        activation: inserts nodes before the placeholder for its input, under the leader's path, and returns their
            output; called once for each leader and input.
        weight: the same for a weight, under the linear's own path.
    """
    activations: dict[tuple[str, int], ir.Value] = {}
    for node in list(graph):
        path = placeholder_linear(node)
        if path is None or path not in leaders:
            continue
        x = node.inputs[0]
        assert x is not None
        if node.op_type == ACTIVATION_PLACEHOLDER:
            key = (leaders[path], id(x))
            if key not in activations:
                activations[key] = activation(graph, node, x, leaders[path])
            value = activations[key]
        else:
            value = weight(graph, node, x, path)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return torch operator to ONNX translation, for ``torch.onnx.export``'s ``custom_translation_table``."""
    activation = _operator(ACTIVATION_PLACEHOLDER, linear=onnx.defs.OpSchema.AttrType.STRING)
    weight = _operator(WEIGHT_PLACEHOLDER, block_size=onnx.defs.OpSchema.AttrType.INT)

    def activation_qdq(x: Any, linear: str) -> Any:
        return activation(x, linear=linear)

    def weight_qdq(w: Any) -> Any:
        return weight(w, block_size=16)

    def linear(x: Any, w: Any, bias: Any = None) -> Any:
        # Always a MatMul, also for two dimensions, where torch's translation makes a Gemm: one pattern for TensorRT.
        product = op.MatMul(x, op.Transpose(w, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)

    return {
        torch.ops.fp4trt.fp4_dynamic_qdq.default: activation_qdq,
        torch.ops.fp4trt.fp4_qdq.default: weight_qdq,
        torch.ops.aten.linear.default: linear,
    }


def _operator(name: str, **attributes: Any) -> values.Op:
    """Return a placeholder with one input and one output of the same type, described as the recorder wants it."""
    schema = onnx.defs.OpSchema
    description = schema(
        name,
        DOMAIN,
        1,
        inputs=[schema.FormalParameter("x", "T")],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(bfloat16)", "tensor(float16)", "tensor(float)"], "")],
        attributes=[schema.Attribute(key, kind, "") for key, kind in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, description)
