"""An attention that was written out in FP8, and then went wrong."""

from __future__ import annotations

import json
from typing import Final

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.mutation import mutation

A: Final = "transformer_blocks.0.attn"
B: Final = "single_transformer_blocks.0.attn"
FP8: Final = int(TensorProto.FLOAT8E4M3FN)
BF16: Final = int(TensorProto.BFLOAT16)


def in_fp8(graph: Damaged, *paths: str) -> None:
    """Write attentions out as the exporter does, and promise them."""
    for path in paths:
        _write_out(graph, path)
    graph.metadata("fp4trt.attention", json.dumps({"fp8": list(paths)}))


def _write_out(graph: Damaged, path: str) -> None:
    attention = graph.node(f"{path}/Attention")
    nodes, made = graph.model.graph.node, []

    def add(name: str, inputs: list[str], **attributes: object) -> str:
        op, output = name.rpartition("/")[2], f"{path}/{name}_output_0"
        made.append(helper.make_node(op, inputs, [output], f"{path}/{name}", **attributes))
        return output

    def rounded(operand: str, x: str, scale: str) -> str:
        codes = add(f"{operand}/QuantizeLinear", [x, scale], output_dtype=FP8)
        return add(f"{operand}/DequantizeLinear", [codes, scale], output_dtype=BF16)

    for index, operand in enumerate("qkv"):
        graph.scalar(f"{path}.{operand}_scale", 0.02 + index / 1000)
    graph.scalar("probabilities", 1 / 448)
    graph.scalar("width", 64**-0.5)
    q, k, v = attention.input
    turned = add("k/Transpose", [k], perm=[0, 1, 3, 2])
    scores = add("scores/MatMul", [rounded("q", q, f"{path}.q_scale"), rounded("k", turned, f"{path}.k_scale")])
    wide = add("scores/Cast", [scores], to=int(TensorProto.FLOAT))
    softmax = add("softmax/Softmax", [add("scores/Mul", [wide, "width"])], axis=-1)
    add("output/MatMul", [rounded("softmax", softmax, "probabilities"), rounded("v", v, f"{path}.v_scale")])
    made[-1].output[0] = attention.output[0]
    position = next(i for i, node in enumerate(nodes) if node.name == attention.name)
    del nodes[position]
    for node in reversed(made):
        nodes.insert(position, node)


def _without(graph: Damaged, operand: str) -> None:
    in_fp8(graph, A)
    quantize, dequantize = (graph.node(f"{A}/{operand}/{kind}Linear") for kind in ("Quantize", "Dequantize"))
    source, gone = quantize.input[0], dequantize.output[0]
    for node in graph.model.graph.node:
        node.input[:] = [source if name == gone else name for name in node.input]
    graph.remove(quantize.name, dequantize.name)


@mutation("attention-operand", f"{A}/scores/MatMul", "slow")
def an_attention_whose_query_is_not_in_fp8(graph: Damaged) -> None:
    _without(graph, "q")


@mutation("attention-operand", f"{A}/output/MatMul", "slow")
def an_attention_whose_value_is_not_in_fp8(graph: Damaged) -> None:
    _without(graph, "v")


@mutation("attention-operand", f"{A}/output/MatMul", "slow")
def an_attention_whose_probabilities_are_not_in_fp8(graph: Damaged) -> None:
    _without(graph, "softmax")
    graph.between(f"{A}/output/MatMul", 0, "Cast", to=BF16)


@mutation("attention-scale-value", f"{A}.q_scale", "refused")
def a_scale_of_queries_that_is_zero(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.scalar(f"{A}.q_scale", 0)


@mutation("attention-scale-value", f"{A}.k_scale", "refused")
def a_scale_of_keys_that_is_negative(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.scalar(f"{A}.k_scale", -0.02)


@mutation("attention-scale-value", f"{A}.v_scale", "refused")
def a_scale_of_values_that_is_nan(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.scalar(f"{A}.v_scale", np.nan)


@mutation("attention-scale-value", f"{A}.v_scale", "accepted")
def a_scale_of_values_that_is_infinite(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.scalar(f"{A}.v_scale", np.inf)


@mutation("attention-scale-constant", f"{A}.q_scale", "accepted")
def a_scale_of_queries_in_bfloat16(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.put(f"{A}.q_scale", np.asarray(0.02, ml_dtypes.bfloat16), (), TensorProto.BFLOAT16)


@mutation("attention-scale-constant", f"{A}.v_scale", "slow")
def a_scale_of_values_for_each_head(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.put(f"{A}.v_scale", np.full(2, 0.02, np.float32), (2,), TensorProto.FLOAT)


@mutation("attention-softmax-scale", "probabilities", "accepted")
def a_scale_of_probabilities_that_cuts_them_off(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.scalar("probabilities", 1 / 1000)


@mutation("attention-softmax-scale", "probabilities", "accepted")
def a_scale_of_probabilities_that_loses_the_small_ones(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.scalar("probabilities", 1)


@mutation("attention-dequantize-scale", f"{A}/k/DequantizeLinear", "accepted")
def keys_dequantized_with_the_scale_of_queries(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.node(f"{A}/k/DequantizeLinear").input[1] = f"{A}.q_scale"


@mutation("promised-attention", f"{A}/q/QuantizeLinear", "accepted")
def the_scales_of_queries_and_keys_exchanged(graph: Damaged) -> None:
    in_fp8(graph, A)
    for kind in ("Quantize", "Dequantize"):
        graph.exchange_inputs(f"{A}/q/{kind}Linear", f"{A}/k/{kind}Linear", 1)


@mutation("promised-attention", f"{B}/scores/MatMul", "accepted")
def a_promise_of_an_attention_that_is_in_16_bit(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.metadata("fp4trt.attention", json.dumps({"fp8": [A, B]}))


@mutation("promised-attention", f"{A}/scores/MatMul", "accepted")
def an_attention_in_fp8_that_nothing_promises(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.metadata("fp4trt.attention", None)


@mutation("promise-metadata", "fp4trt.attention", "accepted")
def a_promise_of_attention_in_an_unknown_format(graph: Damaged) -> None:
    in_fp8(graph, A)
    graph.metadata("fp4trt.attention", json.dumps({"fp8": [A], "int8": [B]}))
