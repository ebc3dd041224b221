"""A graph with stamped blocks is, byte for byte, the graph that tracing every block gives."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

import exporter
import fp4trt.families
from exporter import trace
from exporter.passes import stamp_blocks
from exporter.passes.name_nodes import SCOPES
from fp4trt.errors import BadGraph
from fp4trt.families.sd3 import SD35_MEDIUM
from tests.frame.diffusers_models import MODELS


@pytest.fixture
def trace_every_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def do() -> None:
        for module in (trace, stamp_blocks):
            monkeypatch.setattr(module, "TRACED_BLOCKS", 100)

    return do


@pytest.mark.slow
def test_a_stamped_graph_equals_a_fully_traced_one(
    trace_every_block: Callable[[], None], traced_graph: Callable[..., onnx.ModelProto]
) -> None:
    """Blocks of other formats: the first whole, a middle one and the last in part, some in FP8, the rest in BF16."""

    def in_fp4(path: str) -> bool:
        whole = ("transformer_blocks.0.", "single_transformer_blocks.2.")
        return path.startswith(whole) or path.endswith(("2.ff.net.2", "1.proj_out"))

    def in_fp8(path: str) -> bool:
        return path.startswith(("transformer_blocks.1.", "transformer_blocks.2.norm"))

    changes: dict[str, Any] = {"num_layers": 3, "num_single_layers": 3, "guidance_embeds": False}
    stamped = traced_graph(in_fp4, fp8=in_fp8, **changes)
    trace_every_block()
    traced = traced_graph(in_fp4, fp8=in_fp8, **changes)
    assert [node.name for node in stamped.graph.node] == [node.name for node in traced.graph.node]
    assert stamped.SerializeToString(deterministic=True) == traced.SerializeToString(deterministic=True)


def _block_model(
    *, other: str = "Relu", read_by_others: bool = False, useless_at_the_end: bool = False, tail: bool = False
) -> ir.Model:
    """Two blocks ``x -> Relu -> Add(x) * Exp(c)``; the first computes Exp(c) for both.

    Args:
        other: what the last block has in place of its Relu.
        read_by_others: what follows the blocks reads the first one's result too.
        useless_at_the_end: the blocks also give Neg(x), which the first reads of x and the last of the first one's;
            nobody reads the last one's, so that the tracer has dropped it.
        tail: a third block has a Tanh alone.
    """
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    x, c, y = (ir.Value(name=name, type=kind, shape=shape) for name in "xcy")
    nodes: list[ir.Node] = []

    def add(index: int | None, op_type: str, *inputs: ir.Value) -> ir.Value:
        scopes = {} if index is None else {SCOPES: repr(["", f"blocks.{index}", "op"])}
        nodes.append(ir.node(op_type, inputs, name=f"{op_type}{len(nodes)}", metadata_props=scopes))
        return nodes[-1].outputs[0]

    factor = add(0, "Exp", c)
    value, extra = x, y
    for index, op_type in enumerate(("Relu", other)):
        value = add(index, "Mul", add(index, "Add", add(index, op_type, value), extra), factor)
        if useless_at_the_end and index == 0:
            extra = add(index, "Neg", extra)
    if tail:
        value = add(2, "Tanh", value)
    if read_by_others:
        value = add(None, "Sub", value, nodes[3].outputs[0])
    graph = ir.Graph([x, c, y], [value], nodes=nodes, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=11)


def test_a_stack_gets_its_number_of_blocks_each_reading_the_one_before() -> None:
    model = _block_model()
    stamp_blocks.stamp_blocks(model, {"blocks": 7})
    exp, *nodes = list(model.graph)
    assert [node.op_type for node in nodes] == ["Relu", "Add", "Mul"] * 7
    assert nodes[0].inputs[0] is model.graph.inputs[0]
    for before, relu in zip(nodes[2::3], nodes[3::3], strict=False):
        assert relu.inputs[0] is before.outputs[0]
    for add, mul in zip(nodes[1::3], nodes[2::3], strict=True):
        assert add.inputs[1] is model.graph.inputs[2]
        assert mul.inputs[1] is exp.outputs[0]
    assert model.graph.outputs[0] is nodes[-1].outputs[0]


def test_the_last_block_lacks_what_nothing_reads_of_it() -> None:
    model = _block_model(useless_at_the_end=True)
    stamp_blocks.stamp_blocks(model, {"blocks": 4})
    _, *nodes = list(model.graph)
    assert [node.op_type for node in nodes] == [*["Relu", "Add", "Mul", "Neg"] * 3, "Relu", "Add", "Mul"]
    for before, add, neg in zip(nodes[3::4], nodes[5::4], [*nodes[7::4], None], strict=True):
        assert add.inputs[1] is before.outputs[0]
        assert neg is None or neg.inputs[0] is before.outputs[0]


def test_a_last_block_of_another_kind_stays_as_it_is() -> None:
    model = _block_model(tail=True)
    stamp_blocks.stamp_blocks(model, {"blocks": 5}, ["blocks"])
    _, *nodes = list(model.graph)
    assert [node.op_type for node in nodes] == [*["Relu", "Add", "Mul"] * 4, "Tanh"]
    assert nodes[-1].inputs[0] is nodes[-2].outputs[0]
    scopes = [ast.literal_eval(node.metadata_props[SCOPES])[1] for node in nodes[::3]]
    assert scopes == [f"blocks.{index}" for index in range(5)]


def test_blocks_that_differ_are_no_stack() -> None:
    with pytest.raises(AssertionError, match="nothing in the first block is like Tanh4 of the last"):
        stamp_blocks.stamp_blocks(_block_model(other="Tanh"), {"blocks": 7})


def test_a_block_that_is_read_beyond_the_one_after_it_is_no_stack() -> None:
    with pytest.raises(AssertionError, match="of a block that is not the one before"):
        stamp_blocks.stamp_blocks(_block_model(read_by_others=True), {"blocks": 7})


@pytest.mark.slow
def test_a_stack_of_unlike_blocks_that_is_declared_equal_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["sd3.5-medium"]
    replace(model, config={**model.config, "num_layers": 4, "dual_attention_layers": (0, 1)}).save(tmp_path)
    (stack,) = SD35_MEDIUM.stacks
    wrong = replace(SD35_MEDIUM, stacks=(replace(stack, equal=True, tail=True),))
    monkeypatch.setattr(fp4trt.families, "FAMILIES", (wrong,))
    needed = r"the graph needs transformer_blocks\.2\.\S+ as BF16 \[\d+(, \d+)?\], (and )?the checkpoint has"
    with pytest.raises(BadGraph, match=needed):
        exporter.export(tmp_path, tmp_path / "plain.onnx", precision="bf16")
    assert not (tmp_path / "plain.onnx").exists()
