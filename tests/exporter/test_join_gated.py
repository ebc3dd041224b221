"""The two linears of a gated feed-forward meet behind a Concat and a Split, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from exporter.passes.join_gated import join_gated
from exporter.trt_ops import ACTIVATION_PLACEHOLDER, DOMAIN


def _graph(bias: bool) -> ir.Model:
    """``sigmoid(x W0 + b0) * (x W1 + b1)``, with the sigmoid before the second product."""
    random = np.random.default_rng(0)
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=ir.Shape([3, 4]))
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def weight(name: str, *shape: int) -> ir.Value:
        value = ir.Value(name=name, type=kind, shape=ir.Shape(shape))
        value.const_value = ir.tensor(random.standard_normal(shape).astype(np.float32), name=name)
        initializers.append(value)
        return value

    def add(op_type: str, *inputs: ir.Value, domain: str = "", **attributes: str) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=f"{op_type}{len(nodes)}")
        node.outputs[0].type, node.outputs[0].shape = kind, ir.Shape([3, 6])
        node.outputs[0].name = f"{node.name}_output"
        nodes.append(node)
        return node.outputs[0]

    def linear(path: str) -> ir.Value:
        product = add(
            "MatMul", add(ACTIVATION_PLACEHOLDER, x, domain=DOMAIN, linear=path), weight(f"{path}.weight", 4, 6)
        )
        return add("Add", product, weight(f"{path}.bias", 6)) if bias else product

    gate = add("Sigmoid", linear("ff.gate"))
    result = add("Mul", gate, linear("ff.up"))
    graph = ir.Graph([x], [result], nodes=nodes, initializers=initializers, opset_imports={"": 23, DOMAIN: 1}, name="g")
    return ir.Model(graph, ir_version=11)


def _evaluated(model: ir.Model) -> np.ndarray:
    """Return what a graph gives, with its placeholders as what they stand for before quantization: nothing."""
    plain = model.clone()
    for node in list(plain.graph):
        if node.op_type == ACTIVATION_PLACEHOLDER:
            before = node.inputs[0]
            assert before is not None
            for reader, position in list(node.outputs[0].uses()):
                reader.replace_input_with(position, before)
            plain.graph.remove(node, safe=True)
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    (result,) = ReferenceEvaluator(ir.to_proto(plain)).run(None, {"x": x})
    return np.asarray(result)


@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_pair_is_concatenated_and_split_again(bias: bool) -> None:
    model = _graph(bias)
    wanted = _evaluated(model)
    join_gated(model, [("ff.gate", "ff.up")])
    (split,) = (node for node in model.graph if node.op_type == "Split")
    concat = split.inputs[0].producer() if split.inputs[0] else None
    assert concat is not None
    assert [value.producer().op_type for value in concat.inputs if value] == ["Add" if bias else "MatMul"] * 2  # type: ignore[union-attr]
    assert [node.op_type for value in split.outputs for node, _ in value.uses()] == ["Sigmoid", "Mul"]
    assert np.array_equal(_evaluated(model), wanted)
