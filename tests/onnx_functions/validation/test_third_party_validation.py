"""A third party's graph is run by itself: what it does is judged, and that nobody knows what it should do is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fp4trt
import onnx_functions
from fp4trt.errors import BadGraph, CannotRun
from onnx_functions.validation.third_party_validation import NO_REFERENCE
from onnx_functions.validation.verdict import Gate, Report
from tests.onnx_functions.small_graphs import array, integers, node, product, save, value

X, Y = value("x", "B", "S", 64), value("y", "B", "S", 32)


def _gates(report: Report) -> dict[str, Gate]:
    return {gate.name: gate for gate in report.gates}


def _outcomes(report: Report) -> dict[str, str]:
    return {
        gate.name: "skipped" if gate.was_skipped else "passed" if gate.passed else "FAILED" for gate in report.gates
    }


def test_a_graph_in_fp4_passes_and_the_report_says_what_was_not_seen(
    small_graph: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path: Path = small_graph.path  # type: ignore[attr-defined]
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert fp4trt.run(["validate", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [gate["name"] for gate in found["gates"]] == [
        "runs", "finite", "shapes", "inputs", "outputs", "second witness"
    ]  # fmt: skip
    assert all(gate["passed"] and not gate["was_skipped"] for gate in found["gates"])
    assert (found["reference"], found["reference_kind"], found["note"]) == (None, "none", NO_REFERENCE)
    assert "wrong layout" in found["note"]
    assert NO_REFERENCE in Path(found["html"]).read_text(encoding="utf-8").replace("There is", "there is")
    assert json.loads(Path(found["report"]).read_text())["note"] == NO_REFERENCE
    assert fp4trt.run(["validate", str(path)]) == 0
    assert NO_REFERENCE in capsys.readouterr().out.splitlines()[-1]


def test_it_runs_at_two_sizes_with_every_symbol_changed(tmp_path: Path) -> None:
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", [product("x")], [X], [Y]))
    gates = _gates(report)
    assert gates["runs"].detail == "at x [2, 3, 64] and at x [4, 5, 64], in ONNX Runtime"
    assert gates["shapes"].detail == "y [4, 5, 32] at x [4, 5, 64]"
    assert report.passed


def test_a_baked_size_fails_the_run_and_names_its_node(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "size"], "f"), product("f")]
    path = save(tmp_path / "theirs.onnx", nodes, [X], [value("y", 1, 16, 32)], [integers("size", 1, 16, 64)])
    report = onnx_functions.validate(path)
    assert _gates(report)["runs"].detail.startswith("not at x [2, 3, 64]: the Reshape Reshape of f of x [2, 3, 64]")
    assert _gates(report)["runs"].offenders == ("Reshape of f",)
    assert set(_outcomes(report).values()) == {"FAILED", "skipped"}


def test_a_slice_to_one_example_runs_and_fails_the_shapes(tmp_path: Path) -> None:
    ends = [integers("begin", 0), integers("end", 3), integers("axis", 1)]
    nodes = [node("Slice", ["x", "begin", "end", "axis"], "f"), product("f")]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X], [Y], ends))
    assert _outcomes(report) == {
        "runs": "passed", "finite": "passed", "shapes": "FAILED", "inputs": "passed", "outputs": "passed",
        "second witness": "passed",
    }  # fmt: skip
    assert "y: is [4, 3, 32], declared as ['B', 'S', 32], at x [4, 5, 64]" in _gates(report)["shapes"].detail


def test_an_input_that_is_multiplied_by_nothing_is_found(tmp_path: Path) -> None:
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    nodes = [node("Mul", ["t", "zero"], "t0"), node("Add", ["x", "t0"], "f"), product("f")]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X, value("t", "B", 1, 1)], [Y], [zero]))
    assert _gates(report)["inputs"].detail.startswith("changing t changes nothing in the outputs")
    assert [gate.name for gate in report.failures] == ["inputs"]


def test_the_input_that_changes_least_is_named_with_how_much(tmp_path: Path) -> None:
    small = numpy_helper.from_array(np.full(1, 1e-3, np.float32), "small")
    nodes = [node("Mul", ["t", "small"], "t0"), node("Add", ["x", "t0"], "f"), product("f")]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X, value("t", "B", "S", 1)], [Y], [small]))
    assert _gates(report)["inputs"].detail.startswith("all 2 change the outputs, t the least: y by 0.00")
    assert report.passed


def test_an_output_that_stays_is_found_and_one_that_is_not_finite(tmp_path: Path) -> None:
    nodes = [
        product("x"), node("Identity", ["row"], "still"), node("Mul", ["x", "x"], "square"),
        node("Neg", ["square"], "below"), node("Sqrt", ["below"], "root"),
    ]  # fmt: skip
    outputs = [Y, value("still", 64), value("root", "B", "S", 64)]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X], outputs, [array("row", 64)]))
    assert _gates(report)["outputs"].offenders == ("still",)
    assert _gates(report)["finite"].offenders == ("root", "root")
    assert {gate.name for gate in report.failures} == {"finite", "outputs"}


def test_what_no_values_make_finite_fails_there_and_hides_no_change(tmp_path: Path) -> None:
    nodes = [node("Mul", ["x", "x"], "q"), node("Neg", ["q"], "n"), node("Log", ["n"], "f"), product("f")]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X], [Y]))
    assert _outcomes(report) == {
        "runs": "passed", "finite": "FAILED", "shapes": "passed", "inputs": "skipped", "outputs": "skipped",
        "second witness": "skipped",
    }  # fmt: skip
    assert _gates(report)["inputs"].detail.startswith("no value of the outputs is finite, so no change can be seen")


@pytest.mark.parametrize("mark", ["Cast", "Sign"])
def test_a_mask_of_floats_is_changed_so_that_it_matters(mark: str, tmp_path: Path) -> None:
    made = (
        [node("Cast", ["mask"], "b", to=TensorProto.BOOL), node("Not", ["b"], "n")]
        if mark == "Cast"
        else [node("LessOrEqual", ["mask", "nothing"], "n")]
    )
    nodes = [*made, node("Where", ["n", "nothing", "x"], "f"), product("f")]
    nothing = numpy_helper.from_array(np.zeros(1, np.float32), "nothing")
    inputs = [X, value("mask", "B", "S", 1)]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, inputs, [Y], [nothing]))
    assert report.passed, [gate.line for gate in report.failures]
    assert _gates(report)["inputs"].detail.startswith("all 2 change the outputs")


def test_an_input_that_another_hides_at_first_is_seen_beside_others(tmp_path: Path) -> None:
    nodes = [node("Greater", ["mask", "most"], "b"), node("Where", ["b", "x", "nothing"], "f"), product("f")]
    stored = [numpy_helper.from_array(np.float32([100]), "most"), numpy_helper.from_array(np.float32([0]), "nothing")]
    path = save(tmp_path / "theirs.onnx", nodes, [X, value("mask", "B", "S", 1)], [Y], stored)
    report = onnx_functions.validate(path)
    assert report.passed, [gate.line for gate in report.failures]
    assert _gates(report)["inputs"].detail.startswith("all 2 change the outputs")


def test_an_index_that_changes_with_some_values_alone_follows_the_inputs(tmp_path: Path) -> None:
    nodes = [product("x"), node("ReduceMax", ["y", "last"], "m", keepdims=0), node("Greater", ["m", "most"], "over"),
             node("Cast", ["over"], "count", to=TensorProto.INT64)]  # fmt: skip
    stored = [integers("last", -1), numpy_helper.from_array(np.float32([60]), "most")]
    outputs = [Y, value("count", "B", "S", kind=TensorProto.INT64)]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X], outputs, stored))
    assert report.passed, [gate.line for gate in report.failures]
    assert _gates(report)["outputs"].detail == "all 2 change with the inputs"


def test_masks_and_indices_are_changed_so_that_they_matter(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32), "table")
    nodes = [
        node("Gather", ["table", "ids"], "e"),
        node("Where", ["mask", "e", "nothing"], "f"),
        product("f"),
    ]
    nothing = numpy_helper.from_array(np.zeros(1, np.float32), "nothing")
    inputs = [value("ids", "B", "S", kind=TensorProto.INT64), value("mask", "B", "S", 1, kind=TensorProto.BOOL)]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, inputs, [Y], [table, nothing]))
    assert report.passed, [gate.line for gate in report.failures]


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.BOOL])
def test_a_scalar_that_is_no_float_is_an_input_like_any_other(kind: int, tmp_path: Path) -> None:
    nodes = [node("Cast", ["t"], "tf", to=TensorProto.FLOAT), node("Add", ["x", "tf"], "f"), product("f")]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X, value("t", kind=kind)], [Y]))
    assert report.passed, [gate.line for gate in report.failures]
    assert _gates(report)["runs"].detail == "at x [2, 3, 64], t [] and at x [4, 5, 64], t [], in ONNX Runtime"


def test_without_onnx_runtime_a_third_party_graph_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "theirs.onnx", [product("x")], [X], [Y])
    monkeypatch.setitem(sys.modules, "onnxruntime.capi", None)
    monkeypatch.delitem(sys.modules, "onnxruntime.capi.onnxruntime_pybind11_state", raising=False)
    assert fp4trt.run(["validate", str(path)]) == 2
    printed = capsys.readouterr()
    assert "ONNX Runtime, which validates, cannot be imported" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "validation").exists()


def test_data_that_may_not_be_read_are_no_fault_of_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "theirs.onnx", [product("x")], [X], [Y])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    opened = Path.open

    def refused(file: Path, *arguments: Any, **options: Any) -> Any:
        if file.name == "w.data":
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    assert fp4trt.run(["validate", str(path)]) == 2
    assert "w.data cannot be read (Permission denied); this says nothing of the graph" in capsys.readouterr().err


def test_sizes_that_have_to_be_equal_are_tried_equal(tmp_path: Path) -> None:
    nodes = [node("Add", ["x", "mask"], "f"), product("f")]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X, value("mask", "B2", "S2", 1)], [Y]))
    assert report.passed
    assert "x [16, 16, 64], mask [16, 16, 1]" in _gates(report)["runs"].detail


def test_a_graph_with_a_body_is_run_by_the_evaluator_and_says_so(small_graph: object) -> None:
    path: Path = small_graph.path  # type: ignore[attr-defined]
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    last = next(found for found in model.graph.node if "third/output" in found.output)
    last.output[0] = "sum"
    branch = helper.make_graph([node("Identity", ["sum"], "inner")], "branch", [], [value("inner", kind=16)])
    model.graph.node.append(node("If", ["yes"], "third/output", then_branch=branch, else_branch=branch))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    onnx.save(model, path)
    report = onnx_functions.validate(path)
    assert report.passed
    assert "in onnx's ReferenceEvaluator, for ONNX Runtime cannot (node If of" in _gates(report)["runs"].detail
    assert _outcomes(report)["second witness"] == "skipped"


def test_an_operator_without_a_kernel_is_named_and_nothing_is_said_of_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [node("TRT_Plugin", ["x"], "f", domain="trt"), product("f")]
    path = save(tmp_path / "theirs.onnx", nodes, [X], [Y])
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("trt", 1))
    onnx.save(model, path)
    report = onnx_functions.validate(path)
    assert "TRT_Plugin" in _gates(report)["runs"].detail
    assert set(_outcomes(report).values()) == {"skipped"}
    assert (report.passed, report.failures) == (False, ())
    capsys.readouterr()
    assert fp4trt.run(["validate", str(path)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("no validation: the graph could not be run here: ")
    assert "nothing is known of its numbers; report in" in last
    assert "FAILED" not in last
    page = (tmp_path / "validation" / "report.html").read_text(encoding="utf-8")
    assert "Validation <span class=skipped>not run</span>" in page


def test_weights_that_wait_to_become_fp4_are_refused_with_the_command_to_run(tmp_path: Path) -> None:
    nodes = [node("TRT_FP4QDQ", ["w"], "m", domain="trt", block_size=16), node("MatMul", ["x", "m"], "y")]
    with pytest.raises(BadGraph, match=r"1 TRT_FP4QDQ nodes that wait .* run fp4trt export theirs\.onnx"):
        onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, [X], [Y]))


@pytest.mark.parametrize("options", [["--level", "blocks"], ["--blocks", "1"], ["--tokens", "4,4"]])
def test_what_needs_a_checkpoint_is_refused_as_before(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "theirs.onnx", [product("x")], [X], [Y])
    assert fp4trt.run(["validate", str(path), *options]) == 2
    assert "the graph's metadata have no fp4trt.linears" in capsys.readouterr().err


def test_too_little_memory_is_no_failure_of_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_functions.validation.third_party_validation.available_memory", lambda: 1000)
    with pytest.raises(CannotRun, match=r"running theirs\.onnx needs about .* GiB of memory"):
        onnx_functions.validate(save(tmp_path / "theirs.onnx", [product("x")], [X], [Y]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.type.tensor_type.ClearField("shape"), "the input x has no shape"),
        (lambda value: value.type.CopyFrom(helper.make_sequence_type_proto(value.type)), "the input x is no tensor"),
        (lambda value: setattr(value.type.tensor_type, "elem_type", TensorProto.STRING), "the input x is STRING"),
    ],
)
def test_an_input_that_nothing_can_be_put_into_is_refused(
    change: Callable[[onnx.ValueInfoProto], None], said: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "theirs.onnx", [product("x")], [X], [Y])
    model = onnx.load(path)
    change(model.graph.input[0])
    onnx.save(model, path)
    with pytest.raises(BadGraph, match=said):
        onnx_functions.validate(path)


def test_it_needs_no_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "theirs.onnx", [product("x")], [X], [Y])
    code = f"import sys, fp4trt; assert fp4trt.run(['validate', {str(path)!r}]) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
