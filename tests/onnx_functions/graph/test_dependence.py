"""Which inputs an output depends on, by values or by shapes alone, through bodies and functions too."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import fp4trt
from fp4trt.errors import BadGraph
from onnx_functions.graph.bodies import circle
from onnx_functions.graph.dependence import dependences
from onnx_functions.graph.external_data import load_graph
from onnx_functions.linting import lint
from tests.onnx_functions.small_graphs import array, node, product, save, value

X, Y = value("x", "B", "S", 64), value("y", "B", "S", 32)


def _rules(path: Path) -> list[tuple[str, str]]:
    return [(found.rule, found.tensor) for found in lint(path).refused]


def test_an_input_that_nothing_reads_is_refused_and_a_default_is_not_asked(tmp_path: Path) -> None:
    path = save(tmp_path / "theirs.onnx", [product("x")], [X, value("t", "B"), value("w", 64, 32)], [Y])
    assert _rules(path) == [("dead-input", "t")]


def test_what_is_read_for_its_shape_alone_is_no_value(tmp_path: Path) -> None:
    nodes = [node("Shape", ["x"], "size"), node("Expand", ["row", "size"], "f"), product("f")]
    path = save(tmp_path / "theirs.onnx", nodes, [X], [Y], [array("row", 64)])
    found = lint(path).refused
    assert [finding.rule for finding in found] == ["dead-input", "constant-output"]
    assert found[0].message == "the input is read for its shape alone: changing its values changes nothing"
    known = dependences(onnx.load(path))
    assert (known.by_values("y"), known.by_anything("y")) == ((), ("x",))


@pytest.mark.parametrize(("inner", "reads"), [("Neg", ("c", "x")), ("Shape", ("c",))])
def test_what_a_body_reads_outside_itself_counts(inner: str, reads: tuple[str, ...], tmp_path: Path) -> None:
    values = [node(inner, ["x"], "inner")]
    values += [node("ConstantOfShape", ["inner"], "filled")] if inner == "Shape" else []
    last = values[-1].output[0]
    branch = helper.make_graph(values, "branch", [], [value(last)])
    chosen = node("If", ["c"], "f", then_branch=branch, else_branch=branch)
    path = save(tmp_path / "theirs.onnx", [chosen, product("f")], [value("c", kind=TensorProto.BOOL), X], [Y])
    assert dependences(onnx.load(path)).by_values("y") == reads


def test_a_loop_carries_what_enters_it(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("Identity", ["go"], "on"), node("Add", ["state", "x"], "next")],
        "body",
        [value("i", kind=TensorProto.INT64), value("go", kind=TensorProto.BOOL), value("state")],
        [value("on", kind=TensorProto.BOOL), value("next")],
    )
    loop = node("Loop", ["count", "", "start"], "f", body=body)
    inputs = [value("count", kind=TensorProto.INT64), X, value("start", "B", "S", 64), value("none", 1)]
    path = save(tmp_path / "theirs.onnx", [loop, product("f")], inputs, [Y])
    assert dependences(onnx.load(path)).by_values("y") == ("count", "x", "start")


@pytest.mark.parametrize(("operators", "reads"), [(["Neg"], ("x",)), (["Shape", "ConstantOfShape"], ())])
def test_a_local_function_is_looked_into(operators: list[str], reads: tuple[str, ...], tmp_path: Path) -> None:
    names = ["a", *(f"t{index}" for index in range(len(operators)))]
    body = [helper.make_node(op, [names[i]], [names[i + 1]]) for i, op in enumerate(operators)]
    function = helper.make_function("theirs", "F", ["a"], [names[-1]], body, [helper.make_opsetid("", 20)])
    call = node("F", ["x"], "f", domain="theirs")
    path = save(tmp_path / "theirs.onnx", [call, product("f")], [X], [Y], functions=[function])
    assert dependences(onnx.load(path)).by_values("y") == reads


def _ring(count: int) -> list[onnx.NodeProto]:
    """Return nodes that read each other in a circle, beside the product."""
    return [node("Identity", [f"r{index}"], f"r{(index + 1) % count}") for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 300])
@pytest.mark.parametrize("verb", ["inspect", "export", "build", "validate", "lint"])
def test_a_circle_is_one_line_for_every_verb(
    verb: str, count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    turned = node("MatMul", ["x", "r0"], "y")
    path = save(tmp_path / "theirs.onnx", [*_ring(count), turned], [X], [Y])
    options = {"export": ["-o", str(tmp_path / "ours.onnx")], "build": ["--shape", "B=1", "--shape", "S=8"]}
    assert fp4trt.run([verb, str(path), *options.get(verb, [])]) == (1 if verb == "lint" else 2)
    said = capfd.readouterr()
    if verb == "lint":
        assert "wrong: tensor-order: " in said.out
        return
    assert "circle" in said.err or "before it is computed" in said.err
    assert said.err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["theirs.onnx"]


def test_a_circle_through_a_body_or_two_givers_of_one_name_is_one_too(tmp_path: Path) -> None:
    branch = helper.make_graph([node("Neg", ["f"], "inner")], "branch", [], [value("inner")])
    chosen = node("If", ["c"], "f", then_branch=branch, else_branch=branch)
    path = save(tmp_path / "theirs.onnx", [chosen, product("f")], [value("c", kind=TensorProto.BOOL), X], [Y])
    with pytest.raises(BadGraph, match=r"1 of its nodes read each other in a circle \(If of f -> If of f\)"):
        load_graph(path)
    twice = [node("Neg", ["x"], "f"), node("Identity", ["f"], "f")]
    assert circle(onnx.load(save(path, [*twice, product("f")], [X], [Y])).graph) == ["Identity of f"]


def test_a_long_chain_is_no_circle(tmp_path: Path) -> None:
    chain = [node("Identity", [f"t{index}"], f"t{index + 1}") for index in range(3000)]
    path = save(tmp_path / "theirs.onnx", [node("Neg", ["x"], "t0"), *chain, product("t3000")], [X], [Y])
    assert circle(load_graph(path).graph) == []
    assert circle(onnx.load(save(path, [*chain[::-1], product("t3000")], [X], [Y])).graph) == []
