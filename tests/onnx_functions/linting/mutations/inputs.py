"""Inputs, activations and sizes that an exporter has made constants of."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper

from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.mutation import MODULATION, OUT, TRT, mutation
from tests.onnx_functions.linting.mutations.outside import unpromise

QUANTIZE = f"{MODULATION}/input/QuantizeLinear"


@mutation("dead-input", "extra", "accepted")
def an_input_that_nothing_reads(graph: Damaged) -> None:
    graph.model.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.BFLOAT16, ["B"]))


@mutation("dead-input", "guidance", "accepted")
def an_input_that_is_read_for_its_shape_alone(graph: Damaged) -> None:
    graph.put("ones", np.full(1, 0x3F80, np.uint16), (1,), TensorProto.BFLOAT16)
    for node in graph.model.graph.node:
        node.input[:] = ["guidance/as_ones" if name == "guidance" else name for name in node.input]
    nodes = (
        helper.make_node("Shape", ["guidance"], ["guidance/size"], "guidance/Shape"),
        helper.make_node("Expand", ["ones", "guidance/size"], ["guidance/as_float"], "guidance/Expand"),
        helper.make_node("Cast", ["guidance/as_float"], ["guidance/as_ones"], "guidance/Cast", to=_kind(graph)),
    )
    for node in reversed(nodes):
        graph.model.graph.node.insert(0, node)


def _kind(graph: Damaged) -> int:
    value = next(value for value in graph.model.graph.input if value.name == "guidance")
    return int(value.type.tensor_type.elem_type)


@mutation("constant-output", "latent", "refused")
def an_output_that_is_a_constant_of_the_right_size(graph: Damaged) -> None:
    last = _last(graph)
    graph.put("zero", np.zeros(1, np.uint16), (1,), TensorProto.BFLOAT16)
    graph.model.graph.node.append(helper.make_node("Shape", [last.output[0]], ["latent/size"], "latent/Shape"))
    graph.model.graph.node.append(helper.make_node("Expand", ["zero", "latent/size"], ["latent"], "latent/Expand"))


def _last(graph: Damaged) -> NodeProto:
    """Return the node that makes the output, which is then called `computed`."""
    last = next(node for node in graph.model.graph.node if "latent" in node.output)
    last.output[0] = "computed"
    return last


def _put_baked(graph: Damaged, *dims: int) -> None:
    bits = np.random.default_rng(0).standard_normal(dims).astype("<f4").view("<u4") >> 16
    graph.put("baked", bits.astype(np.uint16), dims, TensorProto.BFLOAT16)


@mutation("constant-activation", f"{OUT}/{TRT}", "accepted")
def an_activation_that_is_a_constant(graph: Damaged) -> None:
    _put_baked(graph, 1, 1, 128)
    graph.node(f"{OUT}/{TRT}").input[0] = "baked"


@mutation("constant-activation", f"{OUT}/MatMul", "slow")
def a_constant_multiplied_by_an_fp4_weight(graph: Damaged) -> None:
    _put_baked(graph, 1, 1, 128)
    graph.node(f"{OUT}/MatMul").input[0] = "baked"


@mutation("constant-activation", QUANTIZE, "slow", "fp8")
def an_fp8_activation_that_is_a_constant(graph: Damaged) -> None:
    graph.put("baked", np.ones((1, 128), np.float32), (1, 128), TensorProto.FLOAT)
    graph.node(QUANTIZE).input[0] = "baked"


@mutation("baked-size", f"{OUT}/{TRT}/inserted_0", "accepted")
def a_token_count_baked_into_a_reshape(graph: Damaged) -> None:
    graph.put("size", np.array([1, 16, 128], np.int64), (3,), TensorProto.INT64)
    graph.between(f"{OUT}/{TRT}", 0, "Reshape", "size")


@mutation("baked-size", "latent", "accepted")
def a_slice_that_takes_as_many_tokens_as_one_example_had(graph: Damaged) -> None:
    _slice(graph)


def _slice(graph: Damaged) -> None:
    last = _last(graph)
    for name, value in (("begin", 0), ("end", 16), ("axis", 1)):
        graph.put(name, np.array([value], np.int64), (1,), TensorProto.INT64)
    cut = helper.make_node("Slice", [last.output[0], "begin", "end", "axis"], ["latent"], "latent/Slice")
    graph.model.graph.node.append(cut)


@mutation("declared-size", "latent", "accepted")
def an_output_declared_at_the_size_of_one_example(graph: Damaged) -> None:
    unpromise(graph)
    dims = next(value for value in graph.model.graph.output if value.name == "latent").type.tensor_type.shape.dim
    dims[1].dim_value = 16
