"""A third party's graph is run at sizes and values that it accepts; without any it was not run, and is not faulty."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fp4trt
import onnx_functions
from onnx_functions.validation.verdict import Gate, Report
from tests.onnx_functions.small_graphs import array, integers, node, product, save, value

X, Y = value("x", "B", "S", 64), value("y", "B", "S", 32)


def _gates(report: Report) -> dict[str, Gate]:
    return {gate.name: gate for gate in report.gates}


def _top() -> list[onnx.NodeProto]:
    made = onnx.NodeProto(op_type="TopK", name="top", input=["x", "most"], output=["f", "at"])
    made.attribute.append(helper.make_attribute("axis", 1))
    return [made, product("f")]


TIED = {
    "tokens that are those of two inputs": (
        [node("Concat", ["x", "t"], "joined", axis=1), node("Add", ["joined", "ids"], "f"), product("f")],
        [X, value("t", "B", "T", 64), value("ids", "L", 64)], value("y", "B", "L", 32), [],
        "at x [2, 3, 64], t [2, 4, 64], ids [7, 64] and at x [6, 7, 64], t [6, 8, 64], ids [15, 64]",
    ),
    "tokens that are height times width": (
        [node("Reshape", ["x", "flat"], "r"), node("Add", ["r", "ids"], "f"), product("f")],
        [value("x", "B", "H", "W", 64), value("ids", "L", 64)], value("y", "B", "L", 32), [integers("flat", 0, -1, 64)],
        "at x [2, 3, 4, 64], ids [12, 64] and at x [6, 7, 8, 64], ids [56, 64]",
    ),
    "patches of 2 by 2, which shape inference rounds": (
        [node("SpaceToDepth", ["x"], "s", blocksize=2), node("Transpose", ["s"], "t", perm=[0, 2, 3, 1]),
         node("Reshape", ["t", "flat"], "r"), node("Add", ["r", "ids"], "f"), product("f")],
        [value("x", "B", 16, "H", "W"), value("ids", "L", 64)], value("y", "B", "L", 32), [integers("flat", 0, -1, 64)],
        "at x [2, 16, 16, 16], ids [64, 64] and at x [32, 16, 32, 32], ids [256, 64]",
    ),
    "a batch that is twice another": (
        [node("Concat", ["x", "x"], "joined", axis=0), node("Add", ["joined", "t"], "f"), product("f")],
        [X, value("t", "B2", 1, 64)], value("y", "B2", "S", 32), [],
        "at x [2, 3, 64], t [4, 1, 64] and at x [5, 6, 64], t [10, 1, 64]",
    ),
    "windows of 24": (
        [node("Reshape", ["x", "windows"], "r"), node("Reshape", ["r", "flat"], "f"), product("f")],
        [value("x", 1, "S", 64)], value("y", 1, "S", 32),
        [integers("windows", 1, -1, 24, 64), integers("flat", 1, -1, 64)],
        "at x [1, 24, 64] and at x [1, 48, 64]",
    ),
    "at least 32": (
        _top(),
        [X], value("y", "B", 32, 32), [integers("most", 32)],
        "at x [2, 32, 64] and at x [4, 48, 64]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_sizes_that_are_tied_are_searched_for(name: str, tmp_path: Path) -> None:
    nodes, inputs, output, stored, sizes = TIED[name]
    report = onnx_functions.validate(save(tmp_path / "theirs.onnx", nodes, inputs, [output], stored))
    assert report.passed, [gate.line for gate in report.failures]
    assert _gates(report)["runs"].detail == f"{sizes}, in ONNX Runtime"


UNFITTING = {
    "more tokens than are tried": (
        _top(), [integers("most", 4000)],
        "no sizes were found that the graph accepts; not at x [2, 3, 64]: the TopK top of x [2, 3, 64], most [1] ",
    ),
    "an index that no value gives": (
        [node("Cast", ["x"], "i", to=TensorProto.INT64), node("Add", ["i", "far"], "j"),
         node("Gather", ["row", "j"], "f"), product("f")],
        [integers("far", 5000), array("row", 64)],
        "no sizes and values were found that the graph accepts; at x [2, 3, 64], then x [4, 5, 64]: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFITTING)
def test_a_graph_for_which_nothing_is_found_to_put_in_is_not_called_faulty(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes, stored, said = UNFITTING[name]
    path = save(tmp_path / "theirs.onnx", nodes, [X], [value("y", "B", "N", 32)], stored)
    assert fp4trt.run(["validate", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["gates"][0]["detail"].startswith(f"could not be run here: {said}")
    assert {gate["was_skipped"] for gate in found["gates"]} == {True}
    assert [gate["passed"] for gate in found["gates"]] == [False, True, True, True, True, True]
    assert not found["passed"]


def test_a_symbol_that_fits_with_one_number_alone_is_told(tmp_path: Path) -> None:
    path = save(tmp_path / "theirs.onnx", _top(), [X], [value("y", "B", 500, 32)], [integers("most", 500)])
    report = onnx_functions.validate(path)
    assert report.passed, [gate.line for gate in report.failures]
    assert _gates(report)["runs"].detail == (
        "at x [2, 512, 64] and at x [4, 512, 64] (no other number than S 512 was found to fit), in ONNX Runtime"
    )


def test_a_baked_size_behind_one_that_other_numbers_mend_is_the_one_that_is_named(tmp_path: Path) -> None:
    nodes = [*_top()[:1], node("Add", ["f", "ids"], "g"), product("g")]
    inputs = [X, value("ids", "L", 64)]
    path = save(tmp_path / "theirs.onnx", nodes, inputs, [value("y", "B", "L", 32)], [integers("most", 32)])
    gate = _gates(onnx_functions.validate(path))["runs"]
    assert (gate.passed, gate.was_skipped, gate.offenders) == (False, False, ("Add of g",))
    assert gate.detail.startswith("the Add Add of g of f [")


VALUES = {
    "the logarithm of a variance": ([node("Log", ["t"], "e")], "values between 0 and 1", "NaN or infinite"),
    "the root of one minus a square": (
        [node("Mul", ["t", "t"], "tt"), node("Sub", ["one", "tt"], "r"), node("Sqrt", ["r"], "e")],
        "values between 0 and 1", "NaN or infinite",
    ),
    "the place in a table of a time": (
        [node("Mul", ["t", "most"], "tm"), node("Cast", ["tm"], "ti", to=TensorProto.INT64),
         node("Gather", ["table", "ti"], "e")],
        "values between 0 and 1", "does not run: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_that_a_model_is_not_made_for_are_not_held_against_it(name: str, tmp_path: Path) -> None:
    nodes, drawn, before = VALUES[name]
    stored = [array("one", 1), numpy_helper.from_array(np.float32([999]), "most"),
              numpy_helper.from_array(np.linspace(1, 9, 1000, dtype=np.float32), "table")]  # fmt: skip
    used = [tensor for tensor in stored if any(tensor.name in found.input for found in nodes)]
    inputs = [X, value("t", "B", 1, 1)]
    path = save(tmp_path / "theirs.onnx", [*nodes, node("Add", ["x", "e"], "f"), product("f")], inputs, [Y], used)
    report = onnx_functions.validate(path)
    assert report.passed, [gate.line for gate in report.failures]
    told = _gates(report)["finite"].detail
    assert told.startswith(f"832 values of the outputs are finite, with {drawn}; with standard normal values ")
    assert before in told
