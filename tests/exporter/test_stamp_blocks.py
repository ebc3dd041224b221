"""A graph with stamped blocks is, byte for byte, the graph that tracing every block gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from calibration.checkpoint import Checkpoint
from calibration.models import family_of
from calibration.safetensors_file import StoredTensor
from exporter import trace
from exporter.onnx_export import graph_of
from exporter.passes import stamp_blocks
from exporter.passes.name_nodes import SCOPES

CONFIG: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 16, "num_layers": 5,
    "num_single_layers": 6, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip


def _graph(keep: Callable[[str], bool], **changes: int) -> onnx.ModelProto:
    """Return the graph of a model whose checkpoint has the linears in FP4 that ``keep`` says."""
    config = {**CONFIG, **changes}
    nowhere = StoredTensor(Path(), "F8_E4M3", (), 0, 0)
    paths = [path for path in family_of(config).quantized(config) if keep(path)]
    checkpoint = Checkpoint(Path(), config, {}, {f"{path}.weight_scale": nowhere for path in paths})
    leaders = {path: group[0] for group in checkpoint.groups for path in group}
    model = graph_of(checkpoint, leaders, "float32", lambda hundredths: None)
    for value in model.graph.initializers.values():
        if "." in str(value.name):  # weights on the meta device
            value.const_value = None
    logging.getLogger("onnx_ir.serde").setLevel(logging.ERROR)
    return ir.to_proto(model)


@pytest.fixture
def trace_every_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def do() -> None:
        for module in (trace, stamp_blocks):
            monkeypatch.setattr(module, "TRACED_BLOCKS", 100)

    return do


@pytest.mark.parametrize(
    ("keep", "changes"),
    [
        (lambda path: True, {}),
        # Blocks of other formats: the first whole, a middle one and the last in part, the others in 16 bit.
        (
            lambda path: (
                path.startswith(("transformer_blocks.0.", "single_transformer_blocks.5."))
                or path.endswith(("3.ff.net.2", "4.proj_out"))
            ),
            {"guidance_embeds": False},
        ),
    ],
    ids=["all in FP4", "some in FP4"],
)
def test_a_stamped_graph_equals_a_fully_traced_one(
    keep: Callable[[str], bool], changes: dict[str, Any], trace_every_block: Callable[[], None]
) -> None:
    stamped = _graph(keep, **changes)
    trace_every_block()
    traced = _graph(keep, **changes)
    assert [node.name for node in stamped.graph.node] == [node.name for node in traced.graph.node]
    assert stamped.SerializeToString(deterministic=True) == traced.SerializeToString(deterministic=True)


def _block_model(*, odd: int | None = None, long_reach: bool = False) -> ir.Model:
    """Four blocks ``x -> Relu -> Add(x)``; block ``odd`` has a Tanh; the last also reads the second's output."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    nodes, value, ends = [], x, []
    for index in range(4):
        scopes = {SCOPES: repr(["", f"blocks.{index}", "op"])}
        first = ir.node("Tanh" if index == odd else "Relu", [value], name=f"a{index}", metadata_props=scopes)
        other = ends[1] if long_reach and index == 3 else value
        second = ir.node("Add", [first.outputs[0], other], name=f"b{index}", metadata_props=scopes)
        nodes += [first, second]
        value = second.outputs[0]
        ends.append(value)
    graph = ir.Graph([x], [value], nodes=nodes, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=11)


def test_a_stack_gets_its_number_of_blocks_each_reading_the_one_before() -> None:
    model = _block_model()
    stamp_blocks.stamp_blocks(model, {"blocks": 7})
    nodes = list(model.graph)
    assert [node.op_type for node in nodes] == ["Relu", "Add"] * 7
    for before, relu, add in zip(nodes[1::2], nodes[2::2], nodes[3::2], strict=False):
        assert relu.inputs[0] is add.inputs[1] is before.outputs[0]
    assert model.graph.outputs[0] is nodes[-1].outputs[0]


def test_blocks_that_differ_are_no_stack() -> None:
    with pytest.raises(AssertionError, match="a1 and a2 differ"):
        stamp_blocks.stamp_blocks(_block_model(odd=2), {"blocks": 7})


def test_a_block_that_reads_beyond_the_one_before_it_is_no_stack() -> None:
    with pytest.raises(AssertionError, match="of a block that is not the one before"):
        stamp_blocks.stamp_blocks(_block_model(long_reach=True), {"blocks": 7})
