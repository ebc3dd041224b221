from __future__ import annotations

import json
import re
from pathlib import Path

from trt_build.layer_info import find_gemms, is_layer_message, layers_in_json, parse_layers

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


def _as_json(of_10: bool) -> str:
    """The same layers as the inspector tells them, before TensorRT 11 or since."""
    layers = []
    for line in (line.strip() for line in MESSAGE.splitlines() if line.startswith("Name: ")):
        name, kind, metadata = re.match(r"Name: (.*?), LayerType: (\w+),.* Metadata:(.*)$", line).groups()
        parts = re.search(r"Inputs: \[(.*)\], Constants: \[(.*)\], Outputs: \[(.*)\], TacticName", line).groups()
        layer = {"Name": name, "LayerType": kind, "Metadata": metadata.strip().replace("][", "]\x1f[")}
        for key, part in zip(("Inputs", "Constants", "Outputs"), parts, strict=True):
            types = re.findall(r"Datatype: (\w+)", part)
            layer[key] = [{"Name": "x", "Dimensions": [1]} | _typed(each, of_10) for each in types]
        layers.append(layer)
    io = {"Bindings": ["x"]} if of_10 else {"I/O Tensors": [{"Name": "x", "DataType": "BFloat16"}]}
    return json.dumps({"Layers": layers, **io})


def _typed(name: str, of_10: bool) -> dict[str, str]:
    shown = {"BFloat16": "Row major linear BF16 format", "FP4E2M1": "FP4", "Float": "Row major linear FP32"}
    return {"Format/Datatype": shown.get(name, name)} if of_10 else {"Datatype": name, "Format": "Row major linear"}


def test_the_inspector_s_json_of_both_schemas_tells_the_same_layers() -> None:
    wanted = parse_layers(MESSAGE)
    assert layers_in_json(_as_json(of_10=True)) == layers_in_json(_as_json(of_10=False)) == wanted
    assert layers_in_json(json.dumps({"Layers": ["a", "b"], "Bindings": []})) == ()
