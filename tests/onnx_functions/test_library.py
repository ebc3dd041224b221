"""The ONNX functions equal the slow reference bit for bit, in ONNX Runtime and in onnx's ReferenceEvaluator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from calibration.formats import nvfp4
from onnx_functions import library
from onnx_functions.simulation.reference_ops import quantize_nvfp4

E2M1 = np.array([*nvfp4.E2M1_VALUES, *(-value for value in nvfp4.E2M1_VALUES)], np.float32)
TIES = np.array([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -5, 6], np.float32)

Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def quantizer_model(codes_type: int, x_type: int, scale_type: int) -> bytes:
    """x, scale -> codes, block scales: cast into the types in question, and out of them."""
    nodes = [
        helper.make_node("Cast", ["x"], ["typed"], to=x_type),
        helper.make_node("Cast", ["scale"], ["g"], to=scale_type),
        helper.make_node(
            "TRT_FP4DynamicQuantize", ["typed", "g"], ["q", "s"], domain="trt", axis=-1, block_size=16, scale_type=17
        ),
        helper.make_node("Cast", ["q"], ["codes"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["s"], ["block_scales"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "quantizer",
        [value("x", 1, ["M", "K"]), value("scale", 1, [])],
        [value("codes", 1, ["M", "K"]), value("block_scales", 1, ["M", "S"])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    function = library.fp4_dynamic_quantize(codes_type)
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11).SerializeToString()


@cache
def runtime(x_type: int = TensorProto.FLOAT, scale_type: int = TensorProto.FLOAT) -> Run:
    session = ort.InferenceSession(quantizer_model(TensorProto.FLOAT8E4M3FN, x_type, scale_type))
    return lambda x, scale: session.run(None, {"x": x, "scale": np.asarray(scale)})


@cache
def evaluator(codes_type: int) -> Run:
    from onnx import load_from_string

    model = load_from_string(quantizer_model(codes_type, TensorProto.FLOAT, TensorProto.FLOAT))
    witness = ReferenceEvaluator(model)
    return lambda x, scale: witness.run(None, {"x": x, "scale": np.asarray(scale)})


def assert_equal_bits(found: tuple[np.ndarray, np.ndarray], x: np.ndarray, scale: np.float32) -> None:
    codes, block_scales = nvfp4.quantize_reference(x, scale)
    np.testing.assert_array_equal(found[0].view(np.uint32), E2M1[codes].view(np.uint32))
    wanted = block_scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(found[1].view(np.uint32), wanted.view(np.uint32))


def tensors() -> st.SearchStrategy[np.ndarray]:
    """[2, 32]: normal data of any size, exact ties, zeros of both signs, subnormals, huge values, side by side."""
    element = st.one_of(
        st.floats(-8, 8, width=32),
        st.sampled_from([float(value) for value in TIES]),
        st.floats(-(2.0**-126), 2.0**-126, width=32),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
    blocks = st.one_of(st.lists(element, min_size=16, max_size=16), st.just([0.0] * 16), st.just([-0.0] * 16))
    return st.lists(blocks, min_size=4, max_size=4).map(lambda rows: np.array(rows, np.float32).reshape(2, 32))


def scales() -> st.SearchStrategy[np.float32]:
    exponents = st.floats(-30, 20)
    return st.one_of(exponents.map(lambda e: np.float32(2.0**e)), st.sampled_from([np.float32(1 / 448), np.float32(1)]))


@settings(max_examples=300, deadline=None)
@given(x=tensors(), scale=scales())
def test_onnx_runtime_equals_the_slow_reference(x: np.ndarray, scale: np.float32) -> None:
    assert_equal_bits(runtime()(x, scale), x, scale)


@settings(max_examples=60, deadline=None)
@given(x=tensors(), scale=scales())
def test_the_reference_evaluator_equals_the_slow_reference(x: np.ndarray, scale: np.float32) -> None:
    assert_equal_bits(evaluator(TensorProto.FLOAT4E2M1)(x, scale), x, scale)


@settings(max_examples=200, deadline=None)
@given(x=tensors(), scale=scales())
def test_the_numpy_operator_equals_the_slow_reference(x: np.ndarray, scale: np.float32) -> None:
    values, block_scales = quantize_nvfp4(x, scale)
    assert_equal_bits((values, block_scales.astype(np.float32)), x, scale)


@settings(max_examples=100, deadline=None)
@given(x=tensors(), scale=scales())
def test_bf16_inputs_and_a_bf16_global_scale_are_read_exactly(x: np.ndarray, scale: np.float32) -> None:
    with np.errstate(over="ignore"):
        rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    if not np.isfinite(rounded).all():
        return
    g = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_equal_bits(runtime(TensorProto.BFLOAT16, TensorProto.BFLOAT16)(rounded, g), rounded, np.float32(g))


def test_ties_go_to_the_even_code() -> None:
    codes, block_scales = runtime()(TIES[None], np.float32(1 / 448))
    assert block_scales.tolist() == [[448.0]]
    expected = [0, 0, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, 6]
    np.testing.assert_array_equal(codes[0], np.array(expected, np.float32))


def test_a_zero_block_keeps_the_signs_of_its_zeros() -> None:
    x = np.array([[0.0, -0.0] * 8], np.float32)
    codes, block_scales = runtime()(x, np.float32(1 / 448))
    assert block_scales.tolist() == [[0.0]]
    np.testing.assert_array_equal(np.signbit(codes), np.signbit(x))


@pytest.mark.parametrize("output_dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16])
@pytest.mark.parametrize("scale_dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16])
def test_both_dequantizations_are_the_rounded_fp32_product(output_dtype: int, scale_dtype: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (4, 32)).astype(np.uint8)
    d = rng.standard_normal((4, 2)).astype(np.float32)
    held = d if scale_dtype == TensorProto.FLOAT else d.astype(ml_dtypes.bfloat16).astype(np.float32)
    wanted = E2M1[codes] * np.repeat(held, 16, -1)
    if output_dtype == TensorProto.BFLOAT16:
        wanted = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
    for function in (library.fp4_dequantize(), library.fp4_dequantize_gather()):
        model = _dequantizer(function, codes, scale_dtype, output_dtype)
        if function.name == "FP4Dequantize":
            found = ReferenceEvaluator(model).run(None, {"d": d})[0]
        else:
            found = ort.InferenceSession(model.SerializeToString()).run(None, {"d": d})[0]
        np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def _dequantizer(function, codes: np.ndarray, scale_dtype: int, output_dtype: int):
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    initializer = helper.make_tensor("codes", TensorProto.FLOAT4E2M1, codes.shape, packed.tobytes(), raw=True)
    nodes = [
        helper.make_node("Cast", ["d"], ["scales"], to=scale_dtype),
        helper.make_node(
            function.name, ["codes", "scales"], ["w"], domain=function.domain, block_size=16, output_dtype=output_dtype
        ),
        helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "dq", [value("d", 1, [4, 2])], [value("y", 1, [4, 32])], [initializer])
    domains = [("", 23), (library.SIMULATION_DOMAIN, 1), (library.MICROSOFT_DOMAIN, 1)]
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
