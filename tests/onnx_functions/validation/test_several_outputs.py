"""A graph with several outputs is judged by each of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_functions.simulation.simulate import runtime_session, simulate
from onnx_functions.validation.structure_gates import Run, end_to_end_gate, inputs_gate, output_key, structure_gate

X, Y = np.linspace(1, 2, 6, dtype=np.float32), np.linspace(2, 5, 6, dtype=np.float32)


@pytest.fixture
def model() -> onnx.ModelProto:
    """``video = x + x`` and ``audio = y * y``."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [6]) for name in ("x", "y", "video", "audio")]
    nodes = [
        helper.make_node("Add", ["x", "x"], ["video"], name="twice"),
        helper.make_node("Mul", ["y", "y"], ["audio"], name="square"),
    ]
    graph = helper.make_graph(nodes, "two", values[:2], values[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def _run(video: float, audio: float) -> Run:
    wanted = {output_key("", 0): video * 2 * X, output_key("", 1): audio * Y**2}
    return Run("six", {"x": X, "y": Y}, wanted)


@pytest.mark.parametrize(("video", "audio", "wrong"), [(1, 1, None), (2, 1, "video"), (1, 2, "audio")])
def test_an_output_that_differs_fails_the_gates(
    video: float, audio: float, wrong: str | None, model: onnx.ModelProto, tmp_path: Path
) -> None:
    run = _run(video, audio)
    structure, _ = structure_gate(model, tmp_path, [], [run])
    end_to_end = end_to_end_gate(model, runtime_session(simulate(model), tmp_path), run)
    assert structure.passed == end_to_end.passed == (wrong is None)
    if wrong is not None:
        assert f"graph output {wrong}" in structure.detail
        assert end_to_end.offenders == ({"video": "twice", "audio": "square"}[wrong],)


def test_an_input_that_changes_one_output_alone_is_used(model: onnx.ModelProto, tmp_path: Path) -> None:
    assert inputs_gate(model, tmp_path, {"x": X, "y": Y}).passed
