"""A graph that bakes a size in is found, with the node that does so; one that follows its symbols is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx import NodeProto

from onnx_functions.graph.sizes import sizes_at
from onnx_functions.graph.symbols import assignments, evaluated
from onnx_functions.linting import lint
from tests.onnx_functions.small_graphs import array, integers, node, product, save, value

X, Y = value("x", "B", "S", 64), value("y", "B", "S", 32)
SLICE = [integers("begin", 0), integers("end", 16), integers("axis", 1)]


def _found(tmp_path: Path, *graph: Any) -> list[tuple[str, str, str]]:
    report = lint(save(tmp_path / "theirs.onnx", *graph))
    meant = ("no-fp4", "dead-initializer")
    return [(finding.rule, finding.node, finding.message) for finding in report.findings if finding.rule not in meant]


def _shape_with(*rest: int) -> list[NodeProto]:
    """Return nodes that give `target`: x's own batch, then the initializer `rest`."""
    assert rest
    return [node("Shape", ["x"], "size"), node("Gather", ["size", "zero"], "batch"),
            node("Concat", ["batch", "rest"], "target", axis=0)]  # fmt: skip


BAKED = {
    "a Reshape to one example": (
        [node("Reshape", ["x", "size"], "f"), product("f")], [X], [value("y", 1, 16, 32)], [integers("size", 1, 16, 64)]
    ),
    "a Reshape that keeps the batch": (
        [*_shape_with(16, 64), node("Reshape", ["x", "target"], "f"), product("f")],
        [X], [Y], [integers("zero", 0), integers("rest", 16, 64)],
    ),
    "a Reshape with room for the rest": (
        [node("Reshape", ["x", "size"], "f"), product("f")], [X], [Y], [integers("size", -1, 16, 64)]
    ),
    "a Reshape that merges the batch into the tokens": (
        [node("Reshape", ["x", "size"], "f"), product("f")], [X], [Y], [integers("size", 1, -1, 64)]
    ),
    "an Expand": ([node("Expand", ["x", "size"], "f"), product("f")], [X], [Y], [integers("size", 1, 16, 64)]),
    "a Slice": ([node("Slice", ["x", "begin", "end", "axis"], "f"), product("f")], [X], [Y], SLICE),
    "a Slice that the output declares too": (
        [node("Slice", ["x", "begin", "end", "axis"], "f"), product("f")], [X], [value("y", "B", 16, 32)], SLICE
    ),
    "an Add of positions": ([node("Add", ["x", "table"], "f"), product("f")], [X], [Y], [array("table", 1, 16, 64)]),
    "a Gather of positions": (
        [node("Gather", ["x", "ids"], "f", axis=1), product("f")], [X], [Y], [integers("ids", *range(16))]
    ),
    "a Concat with a batch": (
        [node("Concat", ["x", "more"], "f", axis=1), product("f")], [X], [value("y", "B", "N", 32)],
        [array("more", 2, 4, 64)],
    ),
    "a Split": (
        [
            NodeProto(op_type="Split", name="Split of f", input=["x", "parts"], output=["a", "b"]),
            node("Concat", ["b", "a"], "f", axis=0), product("f"),
        ],
        [X], [Y], [integers("parts", 1, 1)],
    ),
    "a Reshape behind a mask that has to be as long": (
        [node("Add", ["x", "mask"], "a"), node("Reshape", ["a", "size"], "f"), product("f")],
        [X, value("mask", "B2", "S2", 1)], [value("y", 1, 16, 32)], [integers("size", 1, 16, 64)],
    ),
    "a Squeeze of the batch": (
        [node("Squeeze", ["x", "zero"], "f"), node("MatMul", ["f", "w"], "m"), node("Unsqueeze", ["m", "zero"], "y")],
        [X], [Y], [integers("zero", 0)],
    ),
    "a Slice that takes a text of one length off": (
        [
            node("Concat", ["text", "x"], "joined", axis=1),
            node("Slice", ["joined", "begin", "end", "axis"], "f"), product("f"),
        ],
        [X, value("text", "B", "T", 64)], [Y], [integers("begin", 8), integers("end", 2**62), integers("axis", 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAKED)
def test_a_baked_size_is_found_with_the_node_that_bakes_it(kind: str, tmp_path: Path) -> None:
    (found,) = _found(tmp_path, *BAKED[kind])
    assert found[:2] == ("baked-size", f"{kind.split()[1]} of f")


LEGAL = {
    "flattened and back": (
        [
            node("Reshape", ["x", "flat"], "f"), node("MatMul", ["f", "w"], "m"), node("Shape", ["x"], "size"),
            node("Slice", ["size", "zero", "two"], "rows"), node("Concat", ["rows", "columns"], "target", axis=0),
            node("Reshape", ["m", "target"], "y"),
        ],
        [X], [Y], [integers("flat", -1, 64), integers("zero", 0), integers("two", 2), integers("columns", 32)],
    ),
    "a mask that has to be as long": (
        [node("Add", ["x", "mask"], "f"), product("f")], [X, value("mask", "B2", "S2", 1)], [Y]
    ),
    "a past, and a total that is declared as their sum": (
        [node("Concat", ["past", "x"], "c", axis=1), node("Add", ["c", "mask"], "f"), product("f")],
        [X, value("past", "B", "P", 64), value("mask", "B", "P + S", 1)], [value("y", "B", "P + S", 32)],
    ),
    "a past, and a total of a name of its own": (
        [node("Concat", ["past", "x"], "c", axis=1), node("Add", ["c", "mask"], "f"), product("f")],
        [X, value("past", "B", "P", 64), value("mask", "B", "total", 1)], [value("y", "B", "total", 32)],
    ),
    "the first token": (
        [node("Slice", ["x", "begin", "one", "one"], "f"), product("f")],
        [value("x", 1, "S", 64)], [value("y", 1, 1, 32)], [integers("begin", 0), integers("one", 1)],
    ),
    "the mean of all tokens": (
        [node("ReduceMean", ["x", "axis"], "f", keepdims=0), product("f")],
        [value("x", 1, "S", 64)], [value("y", 1, 32)], [integers("axis", 1)],
    ),
    "a table of a hundred positions": (
        [
            node("Shape", ["x"], "size"), node("Slice", ["size", "one", "two"], "count"),
            node("Slice", ["table", "zero", "count", "one"], "p"), node("Add", ["x", "p"], "f"), product("f"),
        ],
        [X], [Y], [integers("zero", 0), integers("one", 1), integers("two", 2), array("table", 1, 100, 64)],
    ),
    "patches of 14": (
        [node("Reshape", ["x", "size"], "f"), node("Neg", ["f"], "y")],
        [value("x", "B", 3, "H", "W")], [value("y", "B", 3, "rows", 14, "columns", 14)],
        [integers("size", 0, 3, -1, 14, 16, 14)],
    ),
    "patches of 13": (
        [node("Reshape", ["x", "size"], "f"), node("Neg", ["f"], "y")],
        [value("x", "B", "L")], [value("y", "rows", 13)], [integers("size", -1, 13)],
    ),
    "learned tokens that are taken back": (
        [
            *_shape_with(8, 64), node("Expand", ["queries", "target"], "q"), node("Concat", ["q", "x"], "c", axis=1),
            node("Softmax", ["c"], "s", axis=1), node("Slice", ["s", "zero", "eight", "one"], "f"), product("f"),
        ],
        [X], [value("y", "B", 8, 32)],
        [
            integers("zero", 0), integers("one", 1), integers("eight", 8), integers("rest", 8, 64),
            array("queries", 1, 8, 64),
        ],
    ),
    "sizes without names": ([product("x")], [value("x", None, None, 64)], [value("y", None, None, 32)]),
    "an output of unknown names": (
        [node("Reshape", ["x", "size"], "f"), product("f")], [X], [value("y", "N", 32)], [integers("size", -1, 64)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEGAL)
def test_a_graph_that_follows_its_symbols_has_no_finding(kind: str, tmp_path: Path) -> None:
    assert _found(tmp_path, *LEGAL[kind]) == []


def test_a_message_says_what_was_found_and_what_would_fit(tmp_path: Path) -> None:
    ((_, _, message),) = _found(tmp_path, *BAKED["an Add of positions"])
    assert message == (
        "the Add Add of f of x [32, 32, 64], table [1, 16, 64] does not fit (elements of axis -2: 32, expected 16) "
        "at any two sizes of B, S that were tried"
    )
    ((_, _, message),) = _found(tmp_path, *BAKED["a Slice"])
    assert message == "axis 1 of the output y is 16 where S, as declared, is 13440 and 26880"


def test_what_a_graph_computes_of_sizes_is_computed(tmp_path: Path) -> None:
    import onnx

    nodes, *rest = LEGAL["flattened and back"]
    model = onnx.load(save(tmp_path / "theirs.onnx", nodes, *rest))
    found = sizes_at(model, {"x": (3, 5, 64)}, tmp_path)
    assert found.misfits == []
    assert found.values["target"].tolist() == [3, 5, 32]
    assert (found.whole("f"), found.whole("y")) == ((15, 64), (3, 5, 32))
    again = sizes_at(model, {"x": (4, 5, 64)}, tmp_path, found)
    assert again.whole("y") == (4, 5, 32)


def test_a_symbol_may_be_an_expression_of_others_and_nothing_else_is_evaluated() -> None:
    size = ("P + S", "2*S", "S // 2", 'open("x")', "S.bit_length()", "9**9**9", "T", 7)
    assert evaluated(size, {"P": 3, "S": 5}) == (8, 10, 2, None, None, None, None, 7)
    first = next(assignments({"x": ("B", "S", 64), "mask": ("B", "P + S"), "odd": ("dim-1",)}))
    assert set(first.first) == {"B", "S", "P + S", "dim-1"}
