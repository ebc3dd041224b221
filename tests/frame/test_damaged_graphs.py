"""Third-party graphs that are marked oddly or damaged: refused in one line before their export begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import fp4trt

FOREIGN: dict[str, tuple[dict[str, object], str]] = {
    "blocks along the first axis": ({"axis": 0}, "node of m asks for blocks along axis 0"),
    "blocks of 32": ({"block_size": 32}, "node of m asks for blocks of 32"),
    "no domain": ({"domain": ""}, "node of m is a TRT_FP4QDQ in the domain ''; expected 'trt'"),
    "another operator": ({"op_type": "TRT_FP4DynamicQDQ"}, "is a TRT_FP4DynamicQDQ, which no graph may hold"),
}


def _marked(**marking: object) -> onnx.ModelProto:
    """Return ``x [B, 32] @ w^T`` of an inline weight that one placeholder marks."""
    mark = {"op_type": "TRT_FP4QDQ", "domain": "trt", "inputs": ["w"], "outputs": ["m"], "name": "node of m", **marking}
    turn = helper.make_node("Transpose", ["m"], ["t"], perm=[1, 0])
    nodes = [helper.make_node(**mark), turn, helper.make_node("MatMul", ["x", "t"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 32]) for name in ("x", "y"))
    weight = helper.make_tensor("w", TensorProto.FLOAT, [32, 32], bytes(4096), raw=True)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trt", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=opsets)


def _refused_export(model: onnx.ModelProto, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Export a graph that must be refused before anything is begun, and return the one line."""
    onnx.save(model, folder / "theirs.onnx")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert fp4trt.run(["export", str(folder / "theirs.onnx"), "-o", str(folder / "ours")]) == 2
    out, err = capfd.readouterr()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_graph_that_marks_its_weights_oddly_is_refused(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marking, words = FOREIGN[how]
    assert words in _refused_export(_marked(**marking), tmp_path, capfd)


def _cut_raw(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = bytes(100)


def _cut_typed(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0] * 7)


def _cut_constant(model: onnx.ModelProto) -> None:
    _cut_raw(model)
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))


def _no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.UNDEFINED


def _beside(length: str) -> Callable[[onnx.ModelProto], None]:
    """Return what moves the weight into w.bin, as if it had another length there."""

    def damage(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="w.bin")
        weight.external_data.add(key="length", value=length)

    return damage


def _untyped(of: str, field: str) -> Callable[[onnx.ModelProto], None]:
    """Return what makes a graph not say the type, or the shape, of its input or output."""

    def damage(model: onnx.ModelProto) -> None:
        value = getattr(model.graph, of)[0]
        (value if field == "type" else value.type.tensor_type).ClearField(field)

    return damage


def _no_output(model: onnx.ModelProto) -> None:
    del model.graph.node[0].output[:]


FOREIGN_DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "raw data cut short": (_cut_raw, "w has 100 bytes of data, its shape [32, 32] needs 4096"),
    "typed data cut short": (_cut_typed, "w has 28 bytes of data, its shape [32, 32] needs 4096"),
    "a Constant cut short": (_cut_constant, "w has 100 bytes of data, its shape [32, 32] needs 4096"),
    "a weight without a type": (_no_type, "w has no element type"),
    "an output without a shape": (_untyped("output", "shape"), "the output y has no shape"),
    "an output without a type": (_untyped("output", "type"), "the output y has no type"),
    "an input without a shape": (_untyped("input", "shape"), "the input x has no shape"),
    "a placeholder without an output": (_no_output, "has 1 inputs and 0 outputs; expected 1 and 1"),
    "external data of another length": (_beside("10"), "w has 10 bytes of external data, its shape [32, 32]"),
    "external data of no length": (_beside("0"), "w has 0 bytes of external data, its shape [32, 32]"),
}


@pytest.mark.parametrize("how", FOREIGN_DAMAGE)
def test_a_damaged_foreign_graph_is_refused_before_its_export_begins(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = FOREIGN_DAMAGE[how]
    (tmp_path / "w.bin").write_bytes(bytes(4096))
    model = _marked()
    damage(model)
    assert words in _refused_export(model, tmp_path, capfd)
