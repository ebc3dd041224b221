"""What of a third-party graph cannot become FP4 is refused in one line that names the node; the rest works."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import fp4trt
from exporter import export_graph
from exporter.lint_gate import passed_lint
from fp4trt.errors import BadGraph, LintError
from onnx_functions.linting import lint
from onnx_functions.simulation.reference_ops import reference_evaluator

BF16, FP16, FP32, BOOL = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BOOL
Maker = Callable[..., Any]


@pytest.fixture
def graph(foreign_graph: Maker, normal: Maker) -> Any:
    """A graph that stores a weight w [32, 64] and has no node yet."""
    made = foreign_graph(BF16)
    made.weight("w", normal(32, 64))
    return made


def _mark(graph: Any, weight: str = "w", domain: str = "trt", **attributes: Any) -> str:
    return str(graph.node("TRT_FP4QDQ", weight, out="m", domain=domain, **attributes))


def _refused(graph: Any, folder: Path) -> str:
    with pytest.raises(BadGraph) as caught:
        export_graph(graph.save(folder / "theirs.onnx"), folder / "ours.onnx")
    assert [path.name for path in folder.iterdir()] == ["theirs.onnx"]
    return str(caught.value)


def _computed(path: Path, x: np.ndarray, output: int = 0, **others: Any) -> np.ndarray:
    found = reference_evaluator(path).run(None, {"x": x, **others})[output]
    return np.asarray(found, np.float32)


@pytest.mark.parametrize("axis", [0, -2, 2, "last"])
def test_blocks_along_another_axis_are_refused(axis: int | str, graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph, axis=axis))
    assert _refused(graph, tmp_path).startswith(f"node of m asks for blocks along axis {axis!r}; TensorRT has them")


@pytest.mark.parametrize("axis", [1, -1])
def test_the_last_axis_may_be_named_from_either_end(axis: int, graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph, axis=axis))
    assert export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")["quantized_weights"] == ["w"]


@pytest.mark.parametrize("domain", ["", "com.example"])
def test_a_placeholder_of_another_domain_is_refused(domain: str, graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph, domain=domain))
    assert _refused(graph, tmp_path) == f"node of m is a TRT_FP4QDQ in the domain {domain!r}; expected 'trt'"


def test_a_node_without_a_name_is_called_by_its_output(graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph, axis=0))
    for node in graph.nodes:
        node.name = ""
    assert _refused(graph, tmp_path).startswith("(node of m) asks for blocks along axis 0")


def _operators(graph: Any, op: str, inputs: list[str], outputs: list[str]) -> None:
    graph.nodes.append(helper.make_node(op, inputs, outputs, name="theirs", domain="trt"))
    graph.product(_mark(graph))


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "said"),
    [
        ("TRT_FP4DynamicQuantize", ["x"], ["c", "s"], "theirs, a TRT_FP4DynamicQuantize, has 1 inputs and 2 outputs"),
        ("TRT_FP4DynamicQuantize", ["x", ""], ["c", "s"], "expected 2 and 2, all of them given"),
        ("TRT_FP4DynamicQuantize", ["x", "w"], ["c"], "has 2 inputs and 1 outputs"),
        ("TRT_FP4QDQ", [], ["c"], "theirs, a TRT_FP4QDQ, has 0 inputs"),
        ("TRT_FP4DynamicQDQ", ["x"], ["c"], "is a TRT_FP4DynamicQDQ, which no graph may hold"),
    ],
)
def test_an_operator_that_lacks_what_it_needs_is_refused(
    op: str, inputs: list[str], outputs: list[str], said: str, graph: Any, tmp_path: Path
) -> None:
    _operators(graph, op, inputs, outputs)
    assert said in _refused(graph, tmp_path)


def test_nodes_that_read_each_other_are_refused(graph: Any, tmp_path: Path) -> None:
    graph.node("Identity", "b", out="a")
    graph.node("Identity", "a", out="b")
    graph.product(_mark(graph, "a"))
    assert _refused(graph, tmp_path) == "node of a reads b before it is computed; export the graph again"


@pytest.mark.parametrize(("op", "attributes"), [("Reshape", {}), ("Transpose", {"perm": [0, 5]})])
def test_a_weight_behind_what_cannot_be_followed_is_refused(
    op: str, attributes: dict[str, Any], graph: Any, tmp_path: Path
) -> None:
    graph.initializers.append(helper.make_tensor("shape", TensorProto.INT64, [2], [32, 64]))
    graph.node(op, *(["w", "shape"] if op == "Reshape" else ["w"]), out="r", **attributes)
    graph.product(_mark(graph, "r"))
    said = _refused(graph, tmp_path)
    assert "node of r" in said
    assert ("is not an initializer but the result of node of r (Reshape)" in said) == (op == "Reshape")


def test_a_transpose_without_perm_turns_all_axes_of_a_weight(
    foreign_graph: Maker, normal: Maker, tmp_path: Path
) -> None:
    weight, graph = normal(4, 32, 64), foreign_graph(FP32)
    graph.inputs[0] = helper.make_tensor_value_info("x", FP32, ["B", 4, 8, 64])
    graph.outputs.append(helper.make_tensor_value_info("y", FP32, ["B", 4, 8, 32]))
    graph.node("Transpose", graph.weight("w", weight.T), out="r")
    graph.node("Transpose", _mark(graph, "r"), out="t", perm=[0, 2, 1])
    graph.node("MatMul", "x", "t", out="y")
    export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    x = normal(2, 4, 8, 64, seed=1)
    found = _computed(tmp_path / "ours.onnx", x)
    wanted = x @ np.swapaxes(weight, 1, 2)
    assert np.linalg.norm(found - wanted) < 0.12 * np.linalg.norm(wanted)


def _product(weight: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Transpose", [weight], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["inside"], name="product inside"),
    ]


def _hidden() -> list[onnx.NodeProto]:
    mark = helper.make_node("TRT_FP4QDQ", ["w"], ["inner"], name="hidden", domain="trt", block_size=16)
    return [mark, *_product("inner")]


def _either_way(graph: Any, nodes: list[onnx.NodeProto], columns: int = 32) -> None:
    """Add an If whose first branch has these nodes, and gives ``inside``."""
    value = helper.make_tensor_value_info("inside", BF16, ["B", columns])
    other = helper.make_tensor_value_info("other", BF16, ["B", columns])
    zeros = helper.make_node("Sub", ["y", "y"], ["other"])
    branches = (helper.make_graph(nodes, "then", [], [value]), helper.make_graph([zeros], "else", [], [other]))
    graph.inputs.append(helper.make_tensor_value_info("c", BOOL, []))
    graph.nodes.append(
        helper.make_node("If", ["c"], ["z"], name="if", then_branch=branches[0], else_branch=branches[1])
    )
    graph.outputs.append(helper.make_tensor_value_info("z", BF16, ["B", columns]))


def test_a_placeholder_in_a_subgraph_is_refused(graph: Any, tmp_path: Path) -> None:
    graph.product("w")
    _either_way(graph, _hidden())
    assert _refused(graph, tmp_path) == (
        "hidden marks a weight inside a subgraph or function; inline it and export again"
    )


def test_a_placeholder_in_a_function_is_refused(graph: Any, tmp_path: Path) -> None:
    graph.node("Theirs", "x", "w", out="y", domain="local")
    graph.outputs.append(helper.make_tensor_value_info("y", BF16, ["B", 32]))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trt", 1), helper.make_opsetid("local", 1)]
    model = onnx.load(graph.save(tmp_path / "theirs.onnx"))
    model.functions.append(helper.make_function("local", "Theirs", ["x", "w"], ["inside"], _hidden(), opsets[:2]))
    model.opset_import.append(opsets[2])
    onnx.save(model, tmp_path / "theirs.onnx")
    with pytest.raises(BadGraph, match="hidden marks a weight inside a subgraph or function"):
        export_graph(tmp_path / "theirs.onnx", tmp_path / "ours.onnx")


def test_a_subgraph_may_read_the_marked_weight(graph: Any, normal: Maker, tmp_path: Path) -> None:
    marked = _mark(graph)
    graph.product(marked)
    _either_way(graph, _product(marked))
    export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    x = normal(3, 64, seed=1).astype(graph.numpy)
    same = [_computed(tmp_path / "ours.onnx", x, output, c=np.array(True)) for output in (0, 1)]
    assert np.any(same[0])
    np.testing.assert_array_equal(*same)


def test_a_name_that_only_a_subgraph_has_is_not_given_again(graph: Any, normal: Maker, tmp_path: Path) -> None:
    graph.product(_mark(graph))
    inner = [helper.make_node("Add", ["y", "y"], ["w_scale"]), helper.make_node("Identity", ["w_scale"], ["inside"])]
    _either_way(graph, inner)
    export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    x = normal(3, 64, seed=1).astype(graph.numpy)
    y, z = (_computed(tmp_path / "ours.onnx", x, output, c=np.array(True)) for output in (0, 1))
    np.testing.assert_array_equal(z, 2 * y)


@pytest.mark.parametrize("taken", ["initializer", "activation"])
def test_a_moved_weight_takes_no_name_that_is_there(
    taken: str, foreign_graph: Maker, normal: Maker, tmp_path: Path
) -> None:
    graph = foreign_graph(BF16)
    graph.node("Transpose", graph.weight("w", normal(32, 64).T), out="t", perm=[1, 0])
    if taken == "initializer":
        graph.product(graph.weight("t_moved", normal(32, 64, seed=2)), "other")
    else:
        graph.node("Relu", "x", out="t_moved")
        graph.outputs.append(helper.make_tensor_value_info("t_moved", BF16, ["B", 64]))
    graph.product(_mark(graph, "t"))
    result = export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    assert result["quantized_weights"] == ["t_moved_1"]


def test_a_cast_that_overflows_is_refused_without_a_warning(
    foreign_graph: Maker, normal: Maker, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    graph = foreign_graph(FP16)
    graph.node("Cast", graph.weight("w", 1e6 * normal(32, 64), FP32), out="r", to=FP16)
    graph.product(_mark(graph, "r"))
    assert "holds NaN or infinite values" in _refused(graph, tmp_path)
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def _export(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = fp4trt.run(["export", *map(str, arguments)])
    return status, *capfd.readouterr()


def test_what_only_loses_speed_is_refused_by_the_users_name_and_allowed_on_request(
    graph: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph.inputs[0] = helper.make_tensor_value_info("x", BF16, [64, "B"])
    graph.outputs.append(helper.make_tensor_value_info("y", BF16, [32, "B"]))
    graph.node("MatMul", _mark(graph), "x", out="y")
    theirs = graph.save(tmp_path / "theirs.onnx")
    status, _, error = _export(capfd, theirs, "-o", tmp_path / "ours")
    assert status == 1
    assert f"error: the graph made of {theirs} is refused: slow: weight-product: node of y [w]: " in error
    assert error.endswith("; or pass --allow-slow\n")
    assert not (tmp_path / "ours").exists()
    status, out, error = _export(capfd, theirs, "-o", tmp_path / "ours", "--allow-slow", "--json")
    assert status == 0, error
    assert "allowed: slow: weight-product: node of y [w]: " in error
    assert len(json.loads(out)["allowed"]) == 1
    assert lint(tmp_path / "ours", allow_slow=True).passed
    with pytest.raises(LintError, match="the graph made of CHECKPOINT is refused: slow: weight-product: ") as caught:
        passed_lint(tmp_path / "ours" / "model.onnx", Path("CHECKPOINT"))
    assert "--allow-slow" not in str(caught.value)  # which export has not for a checkpoint


def test_blocks_across_a_product_are_allowed_on_request_too(
    foreign_graph: Maker, normal: Maker, tmp_path: Path
) -> None:
    graph = foreign_graph(BF16)
    graph.outputs.append(helper.make_tensor_value_info("y", BF16, ["B", 32]))
    graph.node("MatMul", "x", _mark(graph, graph.weight("w", normal(64, 32))), out="y")
    theirs = graph.save(tmp_path / "theirs.onnx")
    with pytest.raises(BadGraph, match="or pass --allow-slow"):
        export_graph(theirs, tmp_path / "ours.onnx")
    allowed = export_graph(theirs, tmp_path / "ours.onnx", allow_slow=True)["allowed"]
    assert [line.split(":")[1:3] for line in allowed] == [[" weight-product", " node of y [w]"]]


def test_what_is_wrong_is_refused_whatever_is_allowed(graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph))
    graph.nodes[-1].name = "node of y_turned"
    theirs = graph.save(tmp_path / "theirs.onnx")
    with pytest.raises(LintError, match=r"theirs\.onnx is refused: wrong: duplicate-node-name") as caught:
        export_graph(theirs, tmp_path / "ours.onnx", allow_slow=True)
    assert "--allow-slow" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="a link needs a privilege on Windows")
def test_a_graph_in_a_hubs_cache_is_exported_as_any_other(
    graph: Any, hub_snapshot: Callable[..., Path], tmp_path: Path
) -> None:
    graph.product(_mark(graph))
    plain = graph.save(tmp_path / "theirs" / "theirs.onnx", external=True)
    snapshot = hub_snapshot(plain.parent, tmp_path / "hub", ["theirs.onnx", "theirs.bin"], "onnx")
    for name, source in (("a", plain), ("b", snapshot / "theirs.onnx")):
        export_graph(source, tmp_path / name / "ours.onnx")
    for name in ("ours.onnx", "ours.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (plain.parent / "second").hardlink_to(plain.parent / "theirs.bin")
    export_graph(plain, tmp_path / "c" / "ours.onnx")
    assert (tmp_path / "c" / "ours.onnx.data").read_bytes() == (tmp_path / "a" / "ours.onnx.data").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="a link needs a privilege on Windows")
def test_data_in_a_link_elsewhere_are_refused_for_what_they_are(graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph))
    path = graph.save(tmp_path / "theirs" / "theirs.onnx", external=True)
    data = path.with_name("theirs.bin")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadGraph, match=r"w lies in .*, a link out of the graph's folder that is not one of a hub's"):
        export_graph(path, tmp_path / "ours.onnx")


def test_the_standards_domain_may_be_called_by_its_alias(graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph))
    path = graph.save(tmp_path / "theirs.onnx")
    model = onnx.load(path)
    (standard,) = [entry for entry in model.opset_import if entry.domain == ""]
    standard.domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = node.domain or "ai.onnx"
    onnx.save(model, path)
    result = export_graph(path, tmp_path / "ours.onnx")
    assert result["declared_opset"] == standard.version
    written = onnx.load(tmp_path / "ours.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == 23
    assert "ai.onnx" not in {node.domain for node in written.graph.node}
    model.opset_import.append(helper.make_opsetid("", standard.version - 1))
    onnx.save(model, path)
    with pytest.raises(BadGraph, match=f"declares opset {standard.version - 1} and, under the name ai.onnx"):
        export_graph(path, tmp_path / "second.onnx")


def test_external_data_of_a_length_that_is_no_number_are_named(graph: Any, tmp_path: Path) -> None:
    graph.product(_mark(graph))
    path = graph.save(tmp_path / "theirs.onnx")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    (length,) = [entry for entry in model.graph.initializer[0].external_data if entry.key == "length"]
    length.value = "abc"
    onnx.save(model, path)
    with pytest.raises(BadGraph, match="initializer w has the length 'abc' in its external data"):
        export_graph(path, tmp_path / "ours.onnx")
