"""The gates on attention in FP8: each code and output as torch has it, and each kind of damage named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, numpy_helper

from onnx_functions.validation.run_gates import validate
from onnx_functions.validation.verdict import Gate

pytestmark = pytest.mark.slow

BLOCK = "transformer_blocks.0"
A = f"{BLOCK}.attn"


def gates_of(folder: Path, reference: Path | None = None, blocks: str | None = BLOCK) -> dict[str, Gate]:
    return {gate.name: gate for gate in validate(folder, reference, blocks=blocks).gates}


def test_the_built_in_model_passes_every_gate_with_attention_in_fp8(fp8_attention_digits: Path) -> None:
    gates = gates_of(fp8_attention_digits, blocks=None)
    assert {name: gate.detail for name, gate in gates.items() if not gate.passed or gate.was_skipped} == {}
    assert gates["attention promise"].detail == "2 attentions in FP8, as promised"
    assert gates["attention codes"].figure == 0
    # Bit for bit where sums over 64 and 47 fall out alike; a score that rounds the other way moves a probability.
    assert gates["attentions"].figure < 5e-3


def test_a_graph_without_it_has_no_such_gates(quantized_digits: Path) -> None:
    assert not {"attention promise", "attention codes", "attentions"} & gates_of(quantized_digits).keys()


def test_against_the_16_bit_model_only_the_promise_is_checked(fp8_attention_digits: Path, digits: Path) -> None:
    gates = gates_of(fp8_attention_digits, digits)
    assert gates["attention promise"].passed
    assert "attentions" not in gates


def _node(model: onnx.ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == f"{A}/{name}")


def _put(model: onnx.ModelProto, name: str, value: float) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.float32(value), name))


def _half_the_factor(model: onnx.ModelProto) -> None:
    _put(model, _node(model, "scores/Mul").input[1], 64**-0.5 / 2)


def _coarse_probabilities(model: onnx.ModelProto) -> None:
    _put(model, _node(model, "softmax/QuantizeLinear").input[1], 1.0)


def _bypass_the_value(model: onnx.ModelProto) -> None:
    source, gone = _node(model, "v/QuantizeLinear").input[0], _node(model, "v/DequantizeLinear").output[0]
    for node in model.graph.node:
        node.input[:] = [source if name == gone else name for name in node.input]


def _exchange_scales(model: onnx.ModelProto) -> None:
    for kind in ("Quantize", "Dequantize"):
        q, k = _node(model, f"q/{kind}Linear"), _node(model, f"k/{kind}Linear")
        q.input[1], k.input[1] = k.input[1], q.input[1]


def _promise_nothing(model: onnx.ModelProto) -> None:
    kept = [entry for entry in model.metadata_props if entry.key != "fp4trt.attention"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


@pytest.mark.parametrize(
    ("damage", "gate", "found"),
    [
        (_half_the_factor, "attentions", f"{A}: relative L2 error"),
        (_coarse_probabilities, "attentions", f"{A}: relative L2 error"),
        (_exchange_scales, "attention codes", f"{A}: "),
        (_bypass_the_value, "attention promise", f"{A}: its v not in FP8"),
        (_promise_nothing, "attention promise", f"{A}: it is in FP8, the graph does not promise it"),
    ],
)
def test_damage_is_found_and_named(
    damage: Callable[[onnx.ModelProto], None], gate: str, found: str, fp8_attention_digits: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fp8_attention_digits, tmp_path / "damaged")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    damage(model)
    onnx.save(model, folder / "model.onnx")
    gates = gates_of(folder)
    assert not gates[gate].passed
    assert found in gates[gate].detail
