"""The folder of a whole pipeline stands for its transformer, to every command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import fp4trt
from calibration.checkpoints import quantized as checkpoint
from calibration.checkpoints.plain import find_source
from exporter.onnx_export import _open
from fp4trt.pipeline_folder import graph_in
from onnx_functions.graph.external_data import load_graph
from onnx_functions.inspection.inspect import describe
from onnx_functions.linting import lint
from onnx_functions.validation.torch_reference import open_reference
from trt_build.graph import read_graph

INDEX = "model_index.json"
COMMANDS = ("lint", "inspect", "validate", "build", "package", "export", "calibrate", "quantize", "search", "compare")


@pytest.fixture
def pipeline(quantized_digits: Path, tmp_path: Path) -> Path:
    """A pipeline around the quantized built-in model, with its graph."""
    shutil.copytree(quantized_digits, tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / INDEX).write_text('{"_class_name": "FluxPipeline"}')
    return tmp_path / "pipe"


def test_every_reader_looks_into_the_transformers_folder(pipeline: Path) -> None:
    inner = pipeline / "transformer"
    assert find_source(pipeline) == inner
    assert checkpoint.read(pipeline).directory == inner
    assert _open(pipeline, "nvfp4").directory == inner
    assert read_graph(pipeline).path == inner / "model.onnx"
    assert lint(pipeline).path == inner / "model.onnx"
    assert lint(pipeline).passed
    assert describe(pipeline) == describe(inner)
    assert graph_in(pipeline) == inner / "model.onnx"
    graph = load_graph(inner / "model.onnx")
    assert open_reference(graph, inner / "model.onnx", pipeline).directory == inner


def test_a_config_beside_the_index_is_not_the_transformers(pipeline: Path) -> None:
    (pipeline / "config.json").write_text("{}")
    assert find_source(pipeline) == pipeline / "transformer"
    assert describe(pipeline)["kind"] == "quantized checkpoint"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("folders", "words"), [(("unet", "vae"), "is a pipeline around a UNet (unet/)"), (("vae",), "without transformer/")]
)
def test_a_pipeline_without_a_transformer_is_refused_in_one_line(
    command: str, folders: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    for name in folders:
        (pipe / name).mkdir(parents=True)
    (pipe / INDEX).write_text("{}")
    options = {"compare": ["a=digits"], "search": ["--fp8-budget", "0.1"], "package": ["--for", "bfl"]}
    more = options.get(command, [])
    output = [] if command in ("lint", "inspect") else ["-o", str(tmp_path / "out")]
    assert fp4trt.run([command, str(pipe), *more, *output]) == 2
    printed = capsys.readouterr().err.strip()
    assert words in printed
    assert "\n" not in printed
    assert not (tmp_path / "out").exists()
