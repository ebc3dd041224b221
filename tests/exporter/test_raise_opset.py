"""An older opset is raised where that changes nothing, and refused by the operator's name where it would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from exporter.passes.raise_opset import raise_opset
from fp4trt.errors import BadGraph


def _model(opset: int, *nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4, 6])]
    graph = helper.make_graph(nodes, "g", inputs, values)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def _run(model: ir.Model, path: Path) -> list[np.ndarray]:
    ir.save(model, path)
    x = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)
    return onnxruntime.InferenceSession(path).run(None, {"x": x})


REDUCTIONS = [
    helper.make_node(f"Reduce{kind}", ["x"], ["y"], name="r", axes=axes, keepdims=keep)
    for kind in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare")
    for axes, keep in (([-1], 1), ([0, 2], 0))
]


@pytest.mark.parametrize(
    "node",
    [
        *REDUCTIONS,
        helper.make_node("ReduceMean", ["x"], ["y"], name="r"),
        helper.make_node("Reshape", ["x", "s"], ["y"]),
    ],
    ids=lambda node: f"{node.op_type} {len(node.attribute)}",
)
def test_a_raised_operator_computes_what_it_computed(node: onnx.NodeProto, tmp_path: Path) -> None:
    size = helper.make_node("Constant", [], ["s"], value_ints=[0, -1])
    before = _run(_model(17, size, node), tmp_path / "before.onnx")
    model = _model(17, size, node)
    raise_opset(model, 23)
    assert model.graph.opset_imports[""] == 23
    for found, expected in zip(_run(model, tmp_path / "after.onnx"), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_split_without_sizes_says_how_many_parts_it_makes(tmp_path: Path) -> None:
    node = helper.make_node("Split", ["x"], ["y", "z", "w"], name="split", axis=-1)
    outputs = ("y", "z", "w")
    before = _run(_model(17, node, outputs=outputs), tmp_path / "before.onnx")
    model = _model(17, node, outputs=outputs)
    raise_opset(model, 23)
    assert model.graph[0].attributes["num_outputs"].as_int() == 3
    for found, expected in zip(_run(model, tmp_path / "after.onnx"), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("node", "opset", "enough"),
    [
        (helper.make_node("GridSample", ["x", "x"], ["y"], name="odd one", mode="bilinear"), 19, 20),
        (helper.make_node("DFT", ["x"], ["y"], name="odd one", axis=1), 17, 20),
        (helper.make_node("GroupNormalization", ["x", "x", "x"], ["y"], name="odd one", num_groups=2), 20, 21),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else str(value),
)
def test_an_operator_that_means_something_else_is_named(node: onnx.NodeProto, opset: int, enough: int) -> None:
    with pytest.raises(BadGraph, match=rf"odd one is a {node.op_type}, .* at opset {enough} or newer"):
        raise_opset(_model(opset, node), 23)
    raise_opset(_model(enough, node), 23)


@pytest.mark.parametrize("opset", [16, 24])
def test_an_opset_out_of_reach_is_refused(opset: int) -> None:
    with pytest.raises(BadGraph, match=f"declares opset {opset}; expected 17 to 23"):
        raise_opset(_model(opset, helper.make_node("Relu", ["x"], ["y"])), 23)


def test_operators_of_other_domains_and_of_subgraphs_are_looked_at_where_they_stand() -> None:
    inner = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["t"], name="inner", axes=[1])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    yes = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    either = helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)
    foreign = helper.make_node("ReduceMean", ["x"], ["z"], domain="trt", name="foreign", axes=[1])
    model = _model(17, yes, either, foreign)
    raise_opset(model, 23)
    by_name = {node.name: node for node in model.graph.all_nodes()}
    assert "axes" in by_name["foreign"].attributes
    assert "axes" not in by_name["inner"].attributes
    assert len(by_name["inner"].inputs) == 2
