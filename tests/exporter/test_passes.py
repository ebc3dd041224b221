"""Each rewrite on the smallest graph that shows its rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.external_weights import bind
from exporter.passes.double_dequantize import double_dequantize
from exporter.passes.name_nodes import name_nodes
from exporter.passes.remove_no_op_slices import remove_no_op_slices
from fp4trt.errors import BadGraph
from fp4trt.safetensors_file import StoredTensor


def _value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.BFLOAT16) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _model(inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node], weights: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=11)


def _linear(x: ir.Value, path: str) -> tuple[list[ir.Node], ir.Value]:
    weight = _value(f"{path}.weight", [32, 64])
    activation = ir.node("TRT_FP4DynamicQDQ", [x], {"linear": path}, domain="trt")
    placeholder = ir.node("TRT_FP4QDQ", [weight], {"block_size": 16}, domain="trt")
    turned = ir.node("Transpose", placeholder.outputs, {"perm": [1, 0]})
    product = ir.node("MatMul", [activation.outputs[0], turned.outputs[0]])
    return [activation, placeholder, turned, product], weight


def _two_linears() -> ir.Model:
    x = _value("x", ["B", 64])
    q, q_weight = _linear(x, "q")
    k, k_weight = _linear(x, "k")
    return _model([x], [q[-1].outputs[0], k[-1].outputs[0]], [*q, *k], [q_weight, k_weight])


def _ops(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


def test_a_group_shares_one_activation_chain_and_each_weight_gets_its_own() -> None:
    model = _two_linears()
    double_dequantize(model, {"q": "q", "k": "q"}, "float32")
    assert _ops(model) == sorted(
        ["TRT_FP4DynamicQuantize", *["DequantizeLinear"] * 6, *["Cast"] * 3, *["Transpose"] * 2, *["MatMul"] * 2]
    )
    assert sorted(model.graph.initializers) == [
        "k.weight", "k.weight_scale", "q.input_scale", "q.weight", "q.weight_scale", "q.weight_scale_2",
    ]  # fmt: skip
    assert model.graph.initializers["k.weight"].dtype == ir.DataType.FLOAT4E2M1
    assert model.graph.initializers["k.weight_scale"].shape == ir.Shape([32, 4])


def test_linears_that_lead_themselves_share_nothing() -> None:
    model = _two_linears()
    double_dequantize(model, {"q": "q", "k": "k"}, "bfloat16")
    assert _ops(model) == sorted(
        [*["TRT_FP4DynamicQuantize"] * 2, *["DequantizeLinear"] * 8, *["Transpose"] * 2, *["MatMul"] * 2]
    )
    assert "k.weight_scale_2" in model.graph.initializers


@pytest.mark.parametrize("name", ["q.weight_scale", "q.weight_scale_2"])
def test_a_tensor_of_the_graphs_own_keeps_a_name_that_the_pass_would_give(name: str) -> None:
    model = _two_linears()
    theirs = ir.Value(name=name, const_value=ir.tensor(np.array(3.0, np.float32), name=name))
    model.graph.register_initializer(theirs)
    double_dequantize(model, {"q": "q", "k": "q"}, "float32")
    assert model.graph.initializers[name] is theirs
    assert model.graph.initializers[name].const_value is not None
    assert f"{name}_1" in model.graph.initializers


@pytest.mark.parametrize(("shape", "size"), [([48, 0], 16), ([32, 40], 16), ([32, 64], 16.0), ([32, 64], 32)])
def test_a_weight_that_has_no_blocks_of_16_is_refused(shape: list[int | str], size: float) -> None:
    weight = _value("w", shape)
    node = ir.node("TRT_FP4QDQ", [weight], {"block_size": size}, domain="trt", name="odd")
    user = ir.node("Neg", node.outputs)
    with pytest.raises(BadGraph, match="odd"):
        double_dequantize(_model([], [user.outputs[0]], [node, user], [weight]), {}, "float32")


def test_a_placeholder_on_something_computed_is_refused() -> None:
    x = _value("x", ["B", 64])
    node = ir.node("TRT_FP4QDQ", [x], {"block_size": 16}, domain="trt", name="odd")
    with pytest.raises(BadGraph, match="not an initializer"):
        double_dequantize(_model([x], [node.outputs[0]], [node], []), {}, "float32")


def _constant(name: str, value: int) -> ir.Value:
    return ir.Value(name=name, const_value=ir.tensor(np.array([value], np.int64), name=name))


@pytest.mark.parametrize(
    ("start", "end", "step", "kept"),
    [(0, 2**63 - 1, 1, False), (1, 2**63 - 1, 1, True), (0, 5, 1, True), (0, 2**63 - 1, 2, True)],
)
def test_only_a_slice_that_takes_everything_goes(start: int, end: int, step: int, kept: bool) -> None:
    x = _value("x", ["B", 64])
    numbers = [_constant("start", start), _constant("end", end), _constant("axis", 0), _constant("step", step)]
    cut = ir.node("Slice", [x, *numbers])
    after = ir.node("Neg", cut.outputs)
    model = _model([x], [after.outputs[0]], [cut, after], numbers)
    remove_no_op_slices(model)
    assert _ops(model) == (["Neg", "Slice"] if kept else ["Neg"])


def test_nodes_are_named_after_their_module_and_the_tracers_notes_go() -> None:
    x = _value("x", ["B", 64])
    nodes = [ir.node("Neg", [x])]
    nodes.append(ir.node("Neg", nodes[0].outputs))
    for node in nodes:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'block.0', 'block.0.norm', 'neg_3']"
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File somewhere"
    last = ir.node("Abs", nodes[1].outputs)
    last.outputs[0].name = "latent"
    model = _model([x], [last.outputs[0]], [*nodes, last], [])
    name_nodes(model)
    assert [node.name for node in model.graph] == ["block.0.norm/Neg", "block.0.norm/Neg_1", "model/Abs"]
    assert [node.outputs[0].name for node in model.graph] == [
        "block.0.norm/Neg_output_0",
        "block.0.norm/Neg_1_output_0",
        "latent",
    ]
    assert all(not node.metadata_props for node in model.graph)


def test_a_weight_of_the_model_itself_keeps_its_name_and_a_constant_does_not() -> None:
    pad = _value("x_pad_token", [1, 64])
    start = _constant("start", 3)
    last = ir.node("Gather", [pad, start])
    name_nodes(model := _model([], [last.outputs[0]], [last], [pad, start]))
    assert list(model.graph.initializers) == ["x_pad_token", "constants/0"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"needs block.to_q.weight as U8 \[32, 8\], and the checkpoint has no such tensor"),
        ({"U8": [16, 16]}, r"needs block.to_q.weight as U8 \[32, 8\], the checkpoint has U8 \[16, 16\]"),
        ({"F8_E4M3": [32, 8]}, r"needs block.to_q.weight as U8 \[32, 8\], the checkpoint has F8_E4M3 \[32, 8\]"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_refused_at_equal_bytes(
    tensors: dict[str, list[int]], message: str, tmp_path: Path
) -> None:
    codes = _value("block.to_q.weight", [32, 16], ir.DataType.FLOAT4E2M1)
    stored = {str(codes.name): StoredTensor(tmp_path, kind, tuple(shape), 0, 256) for kind, shape in tensors.items()}
    with pytest.raises(BadGraph, match=message):
        bind(_model([], [codes], [], [codes]), stored, tmp_path)
