"""A deployable graph runs in plain ONNX Runtime, on its own data, and computes what its types say."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.formats import nvfp4
from fp4trt.errors import BadGraph
from onnx_functions.graph.cut import cut
from onnx_functions.graph.element_types import element_types
from onnx_functions.graph.external_data import load_graph
from onnx_functions.graph.linears import Graph
from onnx_functions.simulation.reference_ops import reference_evaluator
from onnx_functions.simulation.simulate import runtime_session, session, simulate, teacher_forced


def to_bf16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def inputs(rows: int = 40) -> np.ndarray:
    return to_bf16(np.random.default_rng(1).standard_normal((rows, 32)))


def operand(codes: np.ndarray, block_scales: np.ndarray, g: np.float32, scale_dtype: str) -> np.ndarray:
    """What the double dequantization gives, with its roundings, in numpy."""
    table = np.array([*nvfp4.E2M1_VALUES, *(-value for value in nvfp4.E2M1_VALUES)], np.float32)
    d = block_scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * g
    d = to_bf16(d) if scale_dtype == "bfloat16" else d
    return to_bf16(table[codes] * np.repeat(d, 16, -1))


def expected(graph, x: np.ndarray) -> np.ndarray:
    def linear(path: str, x: np.ndarray) -> np.ndarray:
        activation = operand(
            *nvfp4.quantize_reference(x, graph.input_scales[path]), graph.input_scales[path], graph.scale_dtype
        )
        codes, scales = nvfp4.quantize_reference(graph.weights[path], graph.global_scales[path])
        weight = operand(codes, scales, graph.global_scales[path], graph.scale_dtype)
        product = to_bf16(activation.astype(np.float64) @ weight.T.astype(np.float64))
        return to_bf16(product + graph.biases[path])

    joined = np.concatenate([linear("first", x), linear("second", x)], -1)
    return linear("third", joined)


def test_the_simulation_rounds_where_the_graph_does(small_graph) -> None:
    found = session(small_graph.path).run(None, {"x": inputs()})[0]
    np.testing.assert_array_equal(found, expected(small_graph, inputs()))


def test_the_reference_evaluator_on_the_unmodified_file_agrees(small_graph) -> None:
    witness = reference_evaluator(small_graph.path).run(None, {"x": inputs().astype(ml_dtypes.bfloat16)})[0]
    found = session(small_graph.path).run(None, {"x": inputs()})[0]
    np.testing.assert_array_equal(witness.astype(np.float32), found)


def test_the_simulation_runs_from_any_working_directory(small_graph, monkeypatch, tmp_path_factory) -> None:
    here = session(small_graph.path).run(None, {"x": inputs()})[0]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    np.testing.assert_array_equal(session(small_graph.path).run(None, {"x": inputs()})[0], here)


def test_no_weight_is_copied_into_the_simulation(small_graph) -> None:
    simulated = simulate(load_graph(small_graph.path))
    external = [tensor for tensor in simulated.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert len(external) == len(simulated.graph.initializer)
    assert not any(tensor.raw_data for tensor in simulated.graph.initializer)


def test_rounding_to_bf16_is_to_nearest_even(tmp_path: Path) -> None:
    x = (np.arange(2**16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # every tie there is
    x = x[np.isfinite(x) & (np.abs(x) < 3.38e38)]
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Cast", ["x"], ["y"], "cast", to=TensorProto.BFLOAT16)]
    graph = helper.make_graph(nodes, "cast", [value("x", 1, ["N"])], [value("y", TensorProto.BFLOAT16, ["N"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    found = runtime_session(simulate(model), tmp_path).run(None, {"x": x})[0]
    np.testing.assert_array_equal(found, to_bf16(x))


def test_bypassed_quantizers_and_float32_leave_a_plain_product(small_graph) -> None:
    found = session(small_graph.path, bypass_activation_quantizers=True, float32=True).run(None, {"x": inputs()})[0]
    x = inputs()
    joined = [x @ small_graph.weights[path].T + small_graph.biases[path] for path in ("first", "second")]
    y = np.concatenate(joined, -1) @ small_graph.weights["third"].T + small_graph.biases["third"]
    assert np.linalg.norm(found - y) < 1e-5 * np.linalg.norm(y)


def test_a_linear_can_be_fed_on_its_own(small_graph) -> None:
    model = load_graph(small_graph.path)
    third = Graph(model).linear("third")
    run = runtime_session(teacher_forced(model, [third]), small_graph.path.parent)
    x = inputs()
    codes, scales, product = run.run(None, {"third/TRT_FP4DynamicQuantize:x": x})
    wanted_codes, wanted_scales = nvfp4.quantize_reference(x, small_graph.input_scales["third"])
    table = np.array([*nvfp4.E2M1_VALUES, *(-value for value in nvfp4.E2M1_VALUES)], np.float32)
    np.testing.assert_array_equal(codes.view(np.uint32), table[wanted_codes].view(np.uint32))
    np.testing.assert_array_equal(scales, wanted_scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    g = small_graph.global_scales["third"]
    weight = operand(*nvfp4.quantize_reference(small_graph.weights["third"], g), g, small_graph.scale_dtype)
    activation = operand(wanted_codes, wanted_scales, small_graph.input_scales["third"], small_graph.scale_dtype)
    y = activation @ weight.T + small_graph.biases["third"]
    assert np.linalg.norm(product - y) < 1e-6 * np.linalg.norm(y)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_a_linear_that_computes_in_fp32_is_fed_what_is_not_rounded(kind: int, tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "out.weight")
    nodes = [
        helper.make_node("Cast", ["out.weight"], ["w"], "weight", to=kind),
        helper.make_node("MatMul", ["x", "w"], ["y"], "out/MatMul"),
    ]
    given, found = (helper.make_tensor_value_info(name, kind, ["N", 4]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "linear", [given], [found], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    run = runtime_session(teacher_forced(model, [Graph(model).linear("out")]), tmp_path)
    x = np.full((1, 4), 1 + 2**-12, np.float32)
    np.testing.assert_array_equal(run.run(None, {"out/MatMul:x": x})[0], x if kind == TensorProto.FLOAT else x // 1)


def test_element_types_are_those_of_the_chain(small_graph) -> None:
    types = element_types(load_graph(small_graph.path))
    bf16 = small_graph.scale_dtype == "bfloat16"
    assert types["first/input_codes"] == TensorProto.FLOAT4E2M1
    assert types["first/input_block_scales"] == TensorProto.FLOAT8E4M3FN
    assert types["first/weight_scale/DequantizeLinear:y"] == (TensorProto.BFLOAT16 if bf16 else TensorProto.FLOAT)
    assert types["third/output"] == TensorProto.BFLOAT16


def test_a_piece_that_lacks_an_input_is_refused(small_graph) -> None:
    with pytest.raises(BadGraph, match="depends on x"):
        cut(load_graph(small_graph.path), {}, ["first/output"])


def test_a_placeholder_that_was_left_in_the_graph_is_named(small_graph) -> None:
    model = load_graph(small_graph.path)
    model.graph.node[0].op_type = "TRT_FP4QDQ"
    with pytest.raises(BadGraph, match="first/TRT_FP4DynamicQuantize"):
        simulate(model)


@pytest.mark.parametrize("location", ["../small.safetensors", "/etc/hosts", "C:\\data", ""])
def test_data_outside_the_models_folder_is_refused(small_graph, location: str) -> None:
    from onnx_functions.graph.external_data import span_of

    tensor = load_graph(small_graph.path).graph.initializer[0]
    tensor.external_data[0].value = location
    with pytest.raises(BadGraph, match="inside the model's directory"):
        span_of(tensor, small_graph.path.parent)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(BadGraph, match=r"not an ONNX model|holds no nodes"):
        session(path)
    onnx.save(onnx.ModelProto(), path)
    with pytest.raises(BadGraph, match="is empty"):
        session(path)
