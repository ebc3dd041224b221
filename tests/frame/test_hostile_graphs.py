"""Whatever somebody does to a graph, each command answers: no traceback, no hang, at most one line of error."""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fp4trt

COUNT = 100
ODD = (
    "Add",
    "Reshape",
    "Nothing",
    "",
    "Cast",
    "DequantizeLinear",
    "MatMul",
    "Loop",
    "Split",
    "Shape",
    "Gemm",
    "Constant",
)


class _Built(Exception):
    """What the builder's child is replaced by: the graph got as far as that."""

    exit_code = 7


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands, none of which builds."""

    def built(*_: object) -> None:
        raise _Built("built")

    monkeypatch.setattr("trt_build.builder.run_child", built)
    return [
        ["inspect", "m.onnx"], ["lint", "m.onnx"], ["validate", "m.onnx", "-o", "report", "--force"],
        ["build", "m.onnx", "-o", "e.engine", "--shape", "B=1:1:2", "--shape", "S=8:16:32", "--allow-slow"],
        ["export", "m.onnx", "-o", "ours.onnx", "--force", "--allow-slow"],
    ]  # fmt: skip


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{op} of {output}", **attributes)


def _linear(x: str, weight: str, y: str) -> list[onnx.NodeProto]:
    codes, scales = f"{y}_codes", f"{y}_scales"
    quantize = helper.make_node(
        "TRT_FP4DynamicQuantize", [x, "s"], [codes, scales], f"quantize {y}", domain="trt", axis=-1, block_size=16,
        scale_type=17,
    )  # fmt: skip
    return [
        _node("TRT_FP4QDQ", [weight], f"{y}_marked", domain="trt", block_size=16, axis=-1),
        _node("Transpose", [f"{y}_marked"], f"{y}_turned", perm=[1, 0]),
        quantize,
        _node("DequantizeLinear", [scales, "s"], f"{y}_wide"),
        _node("DequantizeLinear", [codes, f"{y}_wide"], f"{y}_float", axis=-1, block_size=16),
        _node("Cast", [f"{y}_float"], f"{y}_half", to=TensorProto.FLOAT16),
        _node("MatMul", [f"{y}_half", f"{y}_turned"], y),
    ]


def _model() -> onnx.ModelProto:
    """Return an attention between two linears that are marked for FP4, with an If and its bodies."""
    rng = np.random.default_rng(0)
    bodies = [
        helper.make_graph(
            [_node(op, ["q"], op)], op, [], [helper.make_tensor_value_info(op, TensorProto.FLOAT16, None)]
        )
        for op in ("Identity", "Neg")
    ]
    nodes = [
        *_linear("x", "w", "q"),
        _node("If", ["yes"], "chosen", then_branch=bodies[0], else_branch=bodies[1]),
        _node("Reshape", ["chosen", "heads"], "h"), _node("Transpose", ["h"], "qh", perm=[0, 2, 1, 3]),
        _node("Transpose", ["qh"], "kh", perm=[0, 1, 3, 2]), _node("MatMul", ["qh", "kh"], "scores"),
        _node("Softmax", ["scores"], "p", axis=-1), _node("MatMul", ["p", "qh"], "o"),
        _node("Transpose", ["o"], "ot", perm=[0, 2, 1, 3]), _node("Reshape", ["ot", "joined"], "a"),
        _node("Add", ["a", "t"], "sum"),
        *_linear("sum", "w", "y"),
    ]  # fmt: skip
    stored = [
        numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float16), "w"),
        numpy_helper.from_array(np.float32(0.01).reshape(()), "s"), numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.array([0, 0, 4, 16], np.int64), "heads"),
        numpy_helper.from_array(np.array([0, 0, 64], np.int64), "joined"),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT16, ["B", "S", 64]), value("t", TensorProto.FLOAT16, ["B", "S", 1])]
    graph = helper.make_graph(nodes, "theirs", inputs, [value("y", TensorProto.FLOAT16, ["B", "S", 64])], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("trt", 1)])


def _tensors(model: onnx.ModelProto) -> list[str]:
    made = [name for node in model.graph.node for name in node.output]
    return [*made, *(value.name for value in (*model.graph.initializer, *model.graph.input))]


def _another_input(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    if node.input:
        names = [*_tensors(model), "", "nothing", *node.output]
        node.input[dice.randrange(len(node.input))] = dice.choice(names)


def _no_node(model: onnx.ModelProto, node: onnx.NodeProto, _: random.Random) -> None:
    if node in model.graph.node:
        model.graph.node.remove(node)


def _a_constant(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    values = np.ones(dice.choice([(), (1, 16, 64), (64, 64)]), np.float16)
    output = node.output[:1] or ["constant"]
    node.CopyFrom(helper.make_node("Constant", [], output, node.name, value=numpy_helper.from_array(values)))


def _another_attribute(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    for attribute in node.attribute:
        attribute.i = dice.choice([0, -1, 5, 17, 99, 2**40])
        attribute.ints[:] = [dice.choice([0, 1, 9, -1]) for _ in range(dice.randrange(4))]


def _bare(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    node.ClearField(dice.choice(["input", "output", "attribute", "name"]))


def _another_operator(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    node.op_type, node.domain = dice.choice(ODD), dice.choice(["", "trt", "somebody"])


def _another_output(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    node.output[:1] = [dice.choice(_tensors(model))]


def _another_tensor(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    tensor = dice.choice(list(model.graph.initializer))
    tensor.dims[:] = [dice.choice([0, 1, -1, 16, 2**40]) for _ in range(dice.randrange(4))]
    tensor.data_type = dice.choice([tensor.data_type, 0, 1, 7, 16, 17, 23, 99])
    if dice.random() < 0.3:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=dice.choice(["", ".", "a\0b", "a" * 10_000, "../m.onnx"]))


def _another_signature(model: onnx.ModelProto, node: onnx.NodeProto, dice: random.Random) -> None:
    value = dice.choice([*model.graph.input, *model.graph.output])
    change = dice.choice(["name", "type", "kind", "shape", "dim", "symbol"])
    if change == "name":
        value.name = dice.choice(["", "x", "q", "y"])
    elif change == "type":
        value.ClearField("type")
    elif change == "kind":
        value.type.tensor_type.elem_type = dice.choice([0, 1, 7, 8, 9, 23, 99])
    elif change == "shape":
        value.type.tensor_type.ClearField("shape")
    elif value.type.tensor_type.shape.dim:
        dim = dice.choice(list(value.type.tensor_type.shape.dim))
        if change == "dim":
            dim.dim_value = dice.choice([-1, 0, 16, 2**40])
        else:
            dim.dim_param = dice.choice(["", "B", "S + 1", "B*(", "2**9999", "S/0", "open('x')", "s" * 300])


CHANGES: tuple[Callable[[onnx.ModelProto, onnx.NodeProto, random.Random], None], ...] = (
    _another_input, _another_input, _no_node, _a_constant, _another_attribute, _bare, _another_operator,
    _another_output, _another_tensor, _another_signature,
)  # fmt: skip


def _mutated(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    dice = random.Random(seed)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    bodies = [entry.g for node in copy.graph.node for entry in node.attribute if entry.HasField("g")]
    for _ in range(dice.choice([1, 1, 2])):
        nodes = [*copy.graph.node, *(node for body in bodies for node in body.node)]
        dice.choice(CHANGES)(copy, dice.choice(nodes), dice)
    return copy


def test_no_mutation_of_a_graph_gives_a_traceback_or_hangs(
    verbs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the graphs have their weights packed already, as far as that goes."""
    monkeypatch.chdir(tmp_path)
    base, file = _model(), Path("m.onnx")
    file.write_bytes(base.SerializeToString())
    assert fp4trt.run(verbs[-1]) == 0
    packed = onnx.load("ours.onnx", load_external_data=True)
    codes: dict[str, set[int]] = {}
    faulthandler.dump_traceback_later(240, exit=True)
    for seed in range(COUNT):
        file.write_bytes(_mutated(packed if seed % 2 else base, seed).SerializeToString())
        for verb in verbs:
            capfd.readouterr()
            code = fp4trt.run(verb)
            errors = [line for line in capfd.readouterr().err.splitlines() if ": error: " in line]
            assert code in (0, 1, 2, 7), (seed, verb)
            assert len(errors) == (code in (2, 7)) or code == 1, (seed, verb, errors)
            codes.setdefault(verb[0], set()).add(code)
    faulthandler.cancel_dump_traceback_later()
    assert not list(tmp_path.glob("*partial*"))
    assert codes["build"] == {1, 2, 7}
    assert codes["lint"] >= {0, 1}
    assert codes["validate"] == {0, 1, 2}
