"""The number format FP8: the fast code equals the slow reference, ml_dtypes' casts, and ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from calibration.formats import fp8
from calibration.formats.linears import QuantizedLinear
from calibration.formats.modelopt_backend import mtq

F32 = npt.NDArray[np.float32]

_VALUES = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _hard_cases() -> dict[str, F32]:
    rng = np.random.default_rng(7)
    ties = (_VALUES[1:] + _VALUES[:-1]) / 2
    return {
        "random": rng.standard_normal((64, 64)).astype(np.float32),
        "every value": np.concatenate([_VALUES, -_VALUES]),
        "every tie": np.concatenate([ties, -ties]),
        "beside every tie": np.concatenate([np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e3))]),
        "too large": np.array([449, 464, 464.01, 480, 1e38, -449, -1e38], np.float32),
        "subnormal": (rng.standard_normal(64) * 1e-42).astype(np.float32),
        "zeros": np.array([0.0, -0.0, 1e-30, -1e-30], np.float32),
        "wide": (rng.standard_normal((64, 64)) * np.exp(8 * rng.standard_normal((64, 1)))).astype(np.float32),
    }


CASES = _hard_cases()


def _in_onnx_runtime(x: F32, scale: np.float32) -> npt.NDArray[np.uint8]:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN),
        helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, None), value("scale", TensorProto.FLOAT, [])]
    graph = helper.make_graph(nodes, "quantizer", inputs, [value("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x, "scale": np.asarray(scale)})
    codes: npt.NDArray[np.uint8] = found.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 0.0123, 1e-38, 3e4])
def test_codes_equal_the_slow_reference_ml_dtypes_and_onnx_runtime(name: str, scale: float) -> None:
    x, s = CASES[name], torch.tensor(scale)
    codes = fp8.quantize(torch.from_numpy(x), s).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes, fp8.quantize_reference(x, s.numpy()))
    with np.errstate(all="ignore"):
        clipped = np.clip(x / s.numpy(), -448, 448)
    np.testing.assert_array_equal(codes, clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    np.testing.assert_array_equal(codes, _in_onnx_runtime(x, np.float32(scale)))


@settings(max_examples=150, deadline=None)
@given(
    x=hnp.arrays(np.float32, 16, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    scale=st.floats(2.0**-100, 2.0**100, width=32),
)
def test_codes_equal_the_slow_reference_on_any_finite_values(x: F32, scale: float) -> None:
    codes = fp8.quantize(torch.from_numpy(x), torch.tensor(scale, dtype=torch.float32))
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), fp8.quantize_reference(x, np.float32(scale)))


@pytest.mark.parametrize("scale", [1.0, 0.0123, 1e-38, 3e4])
def test_the_table_of_codes_is_what_quantizing_gives_each_bfloat16_number(scale: float) -> None:
    table = fp8.codes_by_bits(torch.tensor(scale))
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = numbers.isfinite()
    bits = numbers.view(torch.int16).numpy().view(np.uint16)
    codes = fp8.quantize(numbers[finite], torch.tensor(scale)).view(torch.uint8).numpy()
    np.testing.assert_array_equal(table[bits[finite.numpy()]], codes)
    assert (table[bits[~finite.numpy()]] == 0x7F).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.array([1, bad], np.float32)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fp8.quantize(torch.from_numpy(x), torch.tensor(1.0))
    with pytest.raises(ValueError, match="NaN or infinite"):
        fp8.quantize_reference(x, np.float32(1))


def test_the_largest_magnitude_is_kept_and_the_error_is_at_most_a_sixteenth() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    rounded = fp8.fake_quantize(x, fp8.tensor_scale(x.abs().max()))
    assert torch.isclose(rounded.abs().max(), x.abs().max(), rtol=1e-6)
    large = x.abs() > x.abs().max() / 448 / 64  # above the subnormal numbers
    assert ((rounded - x).abs() <= x.abs() / 16)[large].all()
    assert float((rounded - x).norm() / x.norm()) == pytest.approx(0.027, abs=1e-3)


def test_it_differs_from_modelopts_fake_quantization_only_at_ties() -> None:
    """It multiplies by 448 / amax where we divide by amax / 448."""
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    amax = x.abs().max()
    ours, theirs = fp8.fake_quantize(x, fp8.tensor_scale(amax)), fp8_eager(x, amax)
    different = ~torch.isclose(ours, theirs, rtol=1e-5)
    assert different.float().mean() < 1e-5
    assert torch.isclose(ours, theirs, rtol=0.14)[different].all()  # one code


def test_modelopts_export_of_a_weight_has_the_same_codes_and_scales() -> None:
    from modelopt.torch.export import quant_utils

    linear = torch.nn.Sequential(torch.nn.Linear(256, 64)).bfloat16()
    x = torch.randn(4, 256).bfloat16()
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(linear, mtq.FP8_DEFAULT_CFG, lambda model: model(x))
    scale = fp8.tensor_scale(linear[0].weight.detach().abs().max().float())
    theirs: Any = quant_utils.get_weight_scaling_factor(linear[0])
    assert theirs.squeeze() == scale
    assert quant_utils.get_activation_scaling_factor(linear[0]).squeeze() == fp8.tensor_scale(x.abs().max().float())
    packed = quant_utils.to_quantized_weight(linear[0].weight.detach(), theirs, "fp8")
    assert torch.equal(packed.view(torch.uint8), fp8.quantize(linear[0].weight.detach(), scale).view(torch.uint8))


def test_a_linear_rounds_its_input_in_fp32_and_multiplies_in_its_own_type() -> None:
    linear = QuantizedLinear(32, 8, bias=True, format="fp8").to(torch.bfloat16)
    linear.input_scale = torch.tensor(0.01)
    x = torch.randn(3, 32).bfloat16()
    rounded = fp8.dequantize(fp8.quantize(x, torch.tensor(0.01)), torch.tensor(0.01)).bfloat16()
    expected = torch.nn.functional.linear(rounded, linear.weight, linear.bias)
    assert torch.equal(linear(x), expected)
    linear.quantize_activations = False
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
