"""The walks over a graph: what each looks through, and where it ends."""

from __future__ import annotations

import math

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from onnx_functions.graph.attentions import find_attentions
from onnx_functions.graph.index import ALIASES, CASTS, MOVES, QUANTIZED, SOURCE, Index, Reader
from onnx_functions.graph.linears import Graph
from tests.onnx_functions.small_graphs import array, integers, node, value

FP8 = int(TensorProto.FLOAT8E4M3FN)


def fp8(name: str, *dims: int) -> TensorProto:
    """Return FP8 zeros."""
    return helper.make_tensor(name, FP8, dims, bytes(math.prod(dims)), raw=True)


def index(nodes: list[NodeProto], initializers: list[TensorProto] | None = None) -> Graph:
    """Return the index of a graph from x to y."""
    graph = helper.make_graph(nodes, "g", [value("x", "B", 64)], [value("y", None)], initializers or [])
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))


@pytest.fixture
def weight() -> Graph:
    """Codes and scale, dequantized, cast, reshaped and turned, on the way to a product."""
    return index(
        [
            node("Identity", ["scale"], "alias"),
            node("DequantizeLinear", ["codes", "alias"], "wide"),
            node("Cast", ["wide"], "cast", to=int(TensorProto.FLOAT)),
            node("Reshape", ["cast", "size"], "matrix"),
            node("Transpose", ["matrix"], "turned", perm=[1, 0]),
            node("MatMul", ["x", "turned"], "y"),
        ],
        [
            helper.make_tensor("codes", FP8, [1, 32, 64], bytes(2048), raw=True),
            array("scale"),
            integers("size", 32, 64),
        ],
    )


def test_each_walk_ends_where_its_name_says(weight: Graph) -> None:
    assert weight.through_casts("turned") == "turned"
    assert weight.through_casts("cast") == "wide"
    assert weight.through_moves("turned") == "wide"
    assert weight.to_source("turned") == "codes"
    assert [found.op_type for found in weight.chain("turned")] == ["Transpose", "Reshape", "Cast", "DequantizeLinear"]
    assert (weight.constant("alias"), weight.constant("cast"), weight.constant("x")) == ("scale", "", "")
    stored = weight.stored("turned")
    assert stored is not None
    assert stored.name == "codes"


def test_the_walks_contain_each_other() -> None:
    assert set(ALIASES) < set(CASTS) < set(MOVES) < set(SOURCE) < set(QUANTIZED)


def test_readers_are_found_behind_moves_and_dequantization(weight: Graph) -> None:
    (reader,) = weight.readers("codes", SOURCE)
    assert (reader.node.op_type, reader.index, reader.transposed) == ("MatMul", 1, 1)
    (reader,) = weight.readers("codes", MOVES)
    assert (reader.node.op_type, reader.index) == ("DequantizeLinear", 0)
    (reader,) = weight.readers("codes", SOURCE, lambda found: found.op_type == "Reshape")
    assert (reader.node.op_type, reader.transposed) == ("Reshape", 0)


def test_what_is_read_as_a_scale_or_a_shape_is_not_what_comes_out(weight: Graph) -> None:
    (scale,) = weight.readers("scale", SOURCE)
    assert (scale.node.op_type, scale.index) == ("DequantizeLinear", 1)
    (size,) = weight.readers("size", SOURCE)
    assert (size.node.op_type, size.index) == ("Reshape", 1)


def test_a_node_that_reads_a_tensor_twice_is_two_readers() -> None:
    squared = index([node("MatMul", ["x", "x"], "y")])
    assert list(squared.readers("x")) == [Reader(squared.producer["y"], 0, 0), Reader(squared.producer["y"], 1, 0)]


def test_what_adds_a_stored_tensor_to_a_computed_one_is_not_stored() -> None:
    added = index([node("MatMul", ["x", "w"], "p"), node("Add", ["b", "p"], "y")], [array("w", 64, 32), array("b", 32)])
    assert added.stored("y") is None
    assert added.to_source("y") == "y"


def test_a_constant_node_gives_a_constant() -> None:
    found = index([helper.make_node("Constant", [], ["c"], "c", value=array("v", 3)), node("Add", ["x", "c"], "y")])
    assert list(found.constants["c"].dims) == [3]
    assert found.constant("c") == "c"


def test_what_a_tensor_depends_on_counts_what_bodies_read() -> None:
    body = helper.make_graph([node("Neg", ["outside"], "inside")], "body", [], [value("inside", None)])
    nodes = [
        node("Abs", ["x"], "before"),
        node("Exp", ["before"], "outside"),
        node("Sqrt", ["x"], "beside"),
        node("If", ["true"], "y", then_branch=body, else_branch=body),
    ]
    found = index(nodes, [helper.make_tensor("true", TensorProto.BOOL, [], [True])])
    assert [above.op_type for above in found.above("y")] == ["Abs", "Exp", "If"]
    assert [above.op_type for above in found.above("y", until={"before"})] == ["Exp", "If"]


def test_a_long_chain_is_followed_without_recursion() -> None:
    links = [node("Identity", [f"w{i}"], f"w{i + 1}") for i in range(3000)]
    found = index([*links, node("MatMul", ["x", "w3000"], "y")], [array("w0", 64, 32)])
    assert found.constant("w3000") == "w0"
    assert [reader.node.op_type for reader in found.readers("w0", ALIASES)] == ["MatMul"]


def _attention(**between: list[NodeProto]) -> Index:
    """Return q @ k.T, Softmax, @ v, all in FP8; a zero point in a Constant says so of q alone."""
    nodes = [
        helper.make_node("Constant", [], ["zero"], "zero", value=helper.make_tensor("z", FP8, [], b"\0", raw=True))
    ]

    def rounded(name: str, tensor: str) -> str:
        kind, zero = ({}, ["zero"]) if name == "q" else ({"output_dtype": FP8}, [])
        nodes.append(node("QuantizeLinear", [tensor, "s", *zero], f"{name}8", **kind))
        nodes.append(node("DequantizeLinear", [f"{name}8", "s"], f"{name}r"))
        nodes.extend(between.get(name, []))
        return str(nodes[-1].output[0])

    nodes.append(node("MatMul", [rounded("q", "x"), rounded("k", "x")], "scores"))
    nodes.extend(between.get("scores", []))
    nodes.append(node("Softmax", [str(nodes[-1].output[0])], "p"))
    nodes.extend(between.get("softmax", []))
    probabilities = rounded("p", str(nodes[-1].output[0]))
    nodes.append(node("MatMul", [probabilities, rounded("v", "x")], "y"))
    return index(nodes, [array("s"), integers("axis", 0)])


@pytest.mark.parametrize("place", ["q", "scores", "softmax", "p"])
def test_an_attention_is_found_whatever_is_moved_inside_it(place: str) -> None:
    """Measured: TensorRT-RTX builds one FP8 kernel of each."""
    last = {"q": "qr", "scores": "scores", "softmax": "p", "p": "pr"}[place]
    moves = [node("Unsqueeze", [last, "axis"], "wide"), node("Squeeze", ["wide", "axis"], "narrow")]
    (found,) = find_attentions(_attention(**{place: moves}))
    assert found.in_fp8


def test_probabilities_that_are_transposed_make_no_attention() -> None:
    assert not find_attentions(_attention(p=[node("Transpose", ["pr"], "turned", perm=[1, 0])]))


def test_a_weight_scale_is_found_behind_a_cast_and_in_a_constant_node() -> None:
    """Between the two DequantizeLinear of a weight TensorRT-RTX folds a Cast: measured."""
    nodes = [
        helper.make_node("Constant", [], ["global"], "global", value=array("g")),
        node("DequantizeLinear", ["scales", "global"], "s"),
        node("Cast", ["s"], "s16", to=int(TensorProto.BFLOAT16)),
        node("DequantizeLinear", ["codes", "s16"], "w", axis=-1, block_size=16),
        node("Transpose", ["w"], "turned", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"], "layer/MatMul"),
    ]
    codes = helper.make_tensor("codes", TensorProto.FLOAT4E2M1, [32, 64], bytes(1024), raw=True)
    graph = index(nodes, [codes, fp8("scales", 32, 4)])
    linear = graph.linear("layer")
    assert (linear.weight_source, graph.weight_scale(linear)) == ("codes", "global")


def test_the_index_of_a_graph_without_names_still_follows_its_wires() -> None:
    nodes = [onnx.NodeProto(op_type="Identity", input=["x"], output=["y"])]
    assert index(nodes).to_source("y") == "x"
