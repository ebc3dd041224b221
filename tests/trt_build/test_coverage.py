"""Every way to lose FP4 without a word from the builder, and the reason that is given for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fp4trt
import trt_build
from fp4trt.errors import CoverageError, LintError
from trt_build.coverage import SixteenBit, measure_coverage, require_coverage
from trt_build.graph import read_graph
from trt_build.layer_info import Layer

pytest.importorskip("tensorrt_rtx")

WEIGHT = "block.to_out/weight/DequantizeLinear"


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def dequantize_along_axis_0(model: onnx.ModelProto) -> None:
    next(attribute for attribute in node(model, WEIGHT).attribute if attribute.name == "axis").i = 0
    scale = next(t for t in model.graph.initializer if t.name == "block.to_out.weight_scale")
    scale.dims[:] = reversed(scale.dims)


def use_float_block_scales(model: onnx.ModelProto) -> None:
    scale = numpy_helper.from_array(np.ones((128, 8), np.float32), "wide_scale")
    model.graph.initializer.append(scale)
    node(model, WEIGHT).input[1] = "wide_scale"


def multiply_the_weight_by_a_vector(model: onnx.ModelProto) -> None:
    factors = numpy_helper.from_array(np.linspace(0.5, 1, 128, dtype=np.float32), "factors")
    model.graph.initializer.append(factors)
    cast = node(model, "block.to_out/weight/Cast")
    place = list(model.graph.node).index(cast)
    multiply = helper.make_node("Mul", [cast.input[0], "factors"], ["scaled"], name="smooth/Mul")
    cast.input[0] = "scaled"
    model.graph.node.insert(place, multiply)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (dequantize_along_axis_0, f"'{WEIGHT}' dequantizes along axis 0"),
        (use_float_block_scales, f"the block scales of '{WEIGHT}' are not FP8 with a global scale"),
        (multiply_the_weight_by_a_vector, "Mul 'smooth/Mul' stands between its weight and the product"),
    ],
)
def test_the_reason_of_lost_fp4_is_given(
    attention_graph: Any, spoil: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    path = attention_graph()
    model = onnx.load(path, load_external_data=False)
    spoil(model)
    onnx.save(model, path)
    result = trt_build.build(path, allow_slow=True)
    with pytest.raises(CoverageError, match=r"block\.to_out") as caught:
        require_coverage([SixteenBit(**item) for item in result["lost"]], result["quantized_linears"])
    assert reason in str(caught.value)


def test_a_promised_linear_that_the_graph_lacks_is_lost(attention_graph: Any) -> None:
    path = attention_graph()
    model = onnx.load(path, load_external_data=False)
    node(model, "block.to_out/MatMul").name = "renamed"
    onnx.save(model, path)
    lost = measure_coverage(read_graph(path), [Layer("some", "gemm", ("BFLOAT16",), (), (), ())]).lost
    assert SixteenBit("block.to_out", None, "the graph has no node block.to_out/MatMul", "nvfp4") in lost


def bypass_every_quantizer(model: onnx.ModelProto) -> None:
    inputs = {node.name.split("/")[0]: node.input[0] for node in model.graph.node if node.op_type.startswith("TRT_")}
    for path in ("to_q", "to_k", "to_v", "to_out"):
        node(model, f"block.{path}/MatMul").input[0] = inputs["block.to_out" if path == "to_out" else "block.to_q"]


def describe(model: onnx.ModelProto, text: str) -> None:
    next(entry for entry in model.metadata_props if entry.key == "fp4trt.linears").value = text


@pytest.mark.parametrize("text", ['{"nvfp4": [], "bf16": []}', "{}"])
def test_metadata_that_promise_little_do_not_hide_fp4_weights_that_run_in_16_bit(
    attention_graph: Any, text: str
) -> None:
    path = attention_graph()
    model = onnx.load(path, load_external_data=False)
    bypass_every_quantizer(model)
    describe(model, text)
    onnx.save(model, path)
    with pytest.raises(LintError, match=r"the graph holds FP4 weights|block\.to_q.*is not quantized"):
        trt_build.build(path)
    assert len(read_graph(path).promised_fp4) == 4


def test_the_manifest_beside_the_graph_promises_too(attention_graph: Any) -> None:
    path = attention_graph()
    assert trt_build.build(path)["quantized_linears"] == 4
    (path.parent / "fp4trt.json").write_text('{"quantized": {"nvfp4": ["block.to_out", "head"]}}')
    with pytest.raises(CoverageError, match=r"1 of 5 linears promised in FP4 would run in 16 bit: head"):
        trt_build.build(path)


def test_a_weight_only_graph_without_metadata_is_legal_and_reported(
    attention_graph: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = attention_graph(metadata=False)
    model = onnx.load(path, load_external_data=False)
    bypass_every_quantizer(model)
    dead = [node for node in model.graph.node if "/input" in node.name or node.op_type.startswith("TRT_")]
    for quantizer in dead:
        model.graph.node.remove(quantizer)
    onnx.save(model, path)
    assert fp4trt.run(["build", str(path), "--shape", "B=1", "--shape", "L=64"]) == 0
    out = capsys.readouterr().out
    assert "nothing promises FP4 GEMMs of this graph" in out
    assert "16 bit: 4 linears: weight-only: FP4 weight, input not quantized" in out
