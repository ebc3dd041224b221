from __future__ import annotations

from pathlib import Path

from trt_build.layer_info import find_gemms, is_layer_message, parse_layers

# From a log of TensorRT-RTX 1.7.1, shortened: most dimensions, strides and formats are left out.
MESSAGE = Path(__file__).with_name("layers.txt").read_text(encoding="utf-8")


def test_every_layer_line_is_read() -> None:
    layers = parse_layers(MESSAGE)
    assert [layer.kind for layer in layers] == [
        "shape_call",
        "kgen",
        "signal",
        "kgen",
        "gemm",
        "kgen",
        "runtime_fusion",
    ]
    assert layers[4].inputs == ("FP4E2M1", "FP8")
    assert layers[4].constants == ("FP4E2M1", "Float")
    assert layers[4].onnx_nodes == ("k/MatMul", "q/input/DequantizeLinear", "q/MatMul")


def test_only_kernels_that_multiply_count_as_gemms() -> None:
    gemms = find_gemms(parse_layers(MESSAGE), {"q/MatMul", "k/MatMul", "o/MatMul"})
    assert [(gemm.format, gemm.linears) for gemm in gemms] == [
        ("nvfp4", ("k/MatMul", "q/MatMul")),
        ("bfloat16", ("o/MatMul",)),
    ]


def test_another_message_is_not_layer_information() -> None:
    assert is_layer_message(MESSAGE)
    assert not is_layer_message("Original: 67 layers")
    assert parse_layers("Original: 67 layers\nLayer: {ForeignNode} Host Persistent: 80 bytes") == ()
