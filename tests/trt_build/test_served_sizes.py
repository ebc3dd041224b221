"""A profile that the graph cannot serve is refused before anything is built, with the node and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fp4trt
import trt_build
from fp4trt.errors import BadProfileError
from trt_build.graph import read_graph
from trt_build.profiles import make_profile
from trt_build.served_sizes import require_served


@pytest.fixture
def baked(attention_graph: Any) -> Path:
    """The attention graph, with a Reshape to 16 tokens before its first quantizer."""
    path: Path = attention_graph(metadata=False)
    model = onnx.load(path, load_external_data=False)
    quantizer = next(node for node in model.graph.node if node.op_type == "TRT_FP4DynamicQuantize")
    model.graph.node.insert(0, helper.make_node("Reshape", [quantizer.input[0], "size"], ["one"], "baked/Reshape"))
    quantizer.input[0] = "one"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 16, 128], np.int64), "size"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("shapes", "corner", "found"),
    [
        (["hidden_states=1x8x128:1x16x128:1x32x128"], "minimum", "1x8x128"),
        (["B=1", "L=16:16:32"], "maximum", "1x32x128"),
        (["B=1:2:2", "L=16"], "optimum", "2x16x128"),
    ],
)
def test_each_corner_of_a_profile_has_to_fit(
    shapes: list[str], corner: str, found: str, baked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trt_build.builder.run_child", lambda *_: pytest.fail("it was built"))
    elements = np.prod([int(n) for n in found.split("x")])
    with pytest.raises(BadProfileError) as caught:
        trt_build.build(baked, shapes=shapes)
    size = found.replace("x", ", ")
    assert str(caught.value) == (
        f"the graph cannot serve the {corner} of the profile, where hidden_states is {found}: the Reshape "
        f"baked/Reshape of hidden_states [{size}], size [3] does not fit (elements for the shape [1, 16, 128]: "
        f"{elements}, expected 2048); give a range that it can, or export it again with that size dynamic"
    )


def test_the_command_says_so_in_one_line_and_exits_with_2(baked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(baked.parent.iterdir())
    assert fp4trt.run(["build", str(baked), "--shape", "B=1", "--shape", "L=8:16:32"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(baked.parent.iterdir()) == before


def test_the_options_of_our_own_graphs_are_held_to_the_graph_too(baked: Path, attention_graph: Any) -> None:
    plain = read_graph(attention_graph("plain"))
    model = onnx.load(baked, load_external_data=False)
    model.metadata_props.extend(plain.model.metadata_props)
    onnx.save(model, baked)
    with pytest.raises(BadProfileError, match=r"the minimum of the profile, where hidden_states is 1x1024x128: "):
        trt_build.build(baked, resolution="512:1024:1360")


def test_the_only_size_that_fits_passes(baked: Path) -> None:
    graph = read_graph(baked)
    require_served(graph.model, graph.path.parent, make_profile(graph.input_shapes, {}, shapes=["B=1", "L=16"]))


def test_an_output_that_keeps_another_size_than_its_symbol_is_refused(attention_graph: Any) -> None:
    path = attention_graph(metadata=False)
    model = onnx.load(path, load_external_data=False)
    last = next(node for node in model.graph.node if "latent" in node.output)
    last.output[0] = "whole"
    model.graph.node.append(helper.make_node("Slice", ["whole", "zero", "end", "one"], ["latent"], "cut"))
    for name, number in (("zero", 0), ("end", 16), ("one", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), name))
    onnx.save(model, path)
    graph = read_graph(path)
    profile = make_profile(graph.input_shapes, {}, shapes=["B=1", "L=8:16:32"])
    with pytest.raises(BadProfileError, match="axis 1 of the output latent, which node cut gives, is 16 where L, as "):
        require_served(graph.model, graph.path.parent, profile)
    require_served(graph.model, graph.path.parent, make_profile(graph.input_shapes, {}, shapes=["B=1", "L=8:16:16"]))
