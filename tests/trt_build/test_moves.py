"""Moves between dequantization and product: what the lint and the coverage say of them is what TensorRT-RTX does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import trt_build
from onnx_functions.linting import lint
from trt_build.graph import read_graph

pytest.importorskip("tensorrt_rtx")

Move = tuple[str, Sequence[int], dict[str, Any]]
"""An operator, the integers that it reads, and its attributes."""

TURN: Move = ("Transpose", (), {"perm": [1, 0]})


def reshape(*size: int) -> Move:
    return "Reshape", size, {}


@pytest.fixture
def linear(tmp_path: Path, double_dequantize: Any) -> Any:
    """A function that writes y = x @ w.T in NVFP4, w stored as `dims`, with moves on either side of the product."""

    def write(
        weight: Sequence[Move] = (TURN,),
        activation: Sequence[Move] = (),
        before: Sequence[Move] = (),
        dims: Sequence[int] = (128, 128),
    ) -> Path:
        graph = double_dequantize(0, "float32")

        def moved(tensor: str, moves: Sequence[Move], place: str) -> str:
            for number, (op, integers, attributes) in enumerate(moves):
                name = f"{place} {number} {op}"
                stored = [numpy_helper.from_array(np.array(integers, np.int64), f"{name} to")] if integers else []
                graph.initializers.extend(stored)
                tensor = graph.node(name, op, [tensor, *(held.name for held in stored)], **attributes)
            return tensor

        x = moved(graph.node("x", "Tanh", ["hidden_states"]), before, "before")
        x = moved(graph.quantized_activation("layer", x), activation, "activation")
        elements = int(np.prod(dims))
        codes = graph.initializer("layer.weight", TensorProto.FLOAT4E2M1, dims, bytes([0x35]) * (elements // 2))
        blocks = (*dims[:-1], dims[-1] // 16)
        scales = bytes([0x38]) * (elements // 16)
        scales = graph.initializer("layer.weight_scale", TensorProto.FLOAT8E4M3FN, blocks, scales)
        overall = graph.scalar("layer.weight_scale_2", 1e-4)
        w = moved(graph.dequantize("layer/weight_scale", "layer/weight", codes, scales, overall), weight, "weight")
        product = graph.node("layer/MatMul", "MatMul", [x, w])
        size = graph.node("size", "Shape", ["hidden_states"])
        return graph.save(tmp_path / "model.onnx", graph.node("y", "Reshape", [product, size]), None)

    return write


def verdict(path: Path) -> tuple[int, list[str]]:
    """Return how many linears are built in FP4, and the rules that the lint finds broken."""
    built = trt_build.build(path, shapes=["B=1", "L=64"], allow_slow=True)
    assert len(built["lost"]) + built["fp4_linears"] == 1
    return built["fp4_linears"], [finding.rule for finding in lint(path).findings]


@pytest.mark.parametrize(
    "moves",
    [
        {"activation": [reshape(-1, 128)]},
        {"activation": [("Unsqueeze", (0,), {})]},
        {"activation": [("Transpose", (), {"perm": [1, 0, 2]})]},
        {"weight": [reshape(128, 128), TURN]},
        {"weight": [("Squeeze", (0,), {}), TURN], "dims": (1, 128, 128)},
        {"weight": [("Flatten", (), {"axis": 1}), TURN, TURN, TURN]},
        {"weight": [("Cast", (), {"to": 1}), TURN, ("Cast", (), {"to": 16})]},
    ],
)
def test_fp4_stays_where_the_last_axis_does(linear: Any, moves: dict[str, Any]) -> None:
    assert verdict(linear(**moves)) == (1, [])


@pytest.mark.parametrize(
    ("moves", "rules"),
    [
        ({"weight": [reshape(128, 128), TURN], "dims": (64, 256)}, ["weight-product", "activation-idle"]),
        ({"weight": [reshape(128, 128), TURN], "dims": (256, 64)}, ["weight-product", "activation-idle"]),
        ({"before": [reshape(0, -1, 64)], "activation": [reshape(0, -1, 128)]}, ["activation-missing"]),
    ],
)
def test_fp4_is_lost_where_the_last_axis_changes(linear: Any, moves: dict[str, Any], rules: list[str]) -> None:
    assert verdict(linear(**moves)) == (0, rules)


def test_an_activation_whose_last_axis_is_moved_is_not_quantized_along_the_sum(linear: Any) -> None:
    """So it is built in 16 bit, at any length that the transposed axis lets through."""
    path = linear(activation=[("Transpose", (), {"perm": [0, 2, 1]})])
    assert "activation-missing" in {finding.rule for finding in lint(path).findings}


def test_a_key_with_a_bias_is_not_the_weight_of_the_scores(attention_graph: Any) -> None:
    """TorchScript's exporter writes Add(bias, product): its first input is stored, what it gives is not."""
    path = attention_graph(metadata=False)
    graph = read_graph(path)
    product = next(node for node in graph.model.graph.node if node.name == "block/Mul")
    product.op_type = "MatMul"
    key = next(node for node in graph.model.graph.node if node.output[0] == product.input[1])
    key.input[:] = reversed(key.input)
    assert graph.other_linears == ("head",)


def test_a_weight_in_a_constant_node_is_the_weight_of_a_linear_too(attention_graph: Any) -> None:
    """TorchScript's exporter writes it so; FP4 codes that lie there are promised as well."""
    graph = read_graph(attention_graph(metadata=False))
    inner = graph.model.graph
    for name in ("head.weight", "block.to_out.weight"):
        stored = next(tensor for tensor in inner.initializer if tensor.name == name)
        inner.node.insert(0, helper.make_node("Constant", [], [name], name, value=stored))
        inner.initializer.remove(stored)
    assert graph.other_linears == ("head",)
    assert "block.to_out" in graph.promised_fp4


def test_a_weight_that_the_graph_quantizes_itself_is_stored_in_16_bit(attention_graph: Any) -> None:
    graph = read_graph(attention_graph(metadata=False))
    nodes = graph.model.graph.node
    turned = next(node for node in nodes if node.name == "head/weight/Transpose")
    at = next(place for place, node in enumerate(nodes) if node.name == turned.name)
    quantize = helper.make_node("QuantizeLinear", ["head.weight", "one"], ["codes"], "q", output_dtype=17)
    dequantize = helper.make_node("DequantizeLinear", ["codes", "one"], ["wide"], "dq")
    turned.input[0] = "wide"
    nodes.insert(at, dequantize)
    nodes.insert(at, quantize)
    assert graph.other_linears == ("head",)
    assert graph.promised_fp8 == ()
