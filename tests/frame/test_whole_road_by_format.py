"""MXFP8 goes from the checkpoint to the engine as data of :mod:`fp4trt.number_formats` alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import exporter
import fp4trt
import onnx_functions
from calibration import load, quantize, read
from calibration.checkpoints.plain import load_source
from calibration.formats import mxfp8
from fp4trt.number_formats import FORMATS
from onnx_functions.inspection.inspect import describe
from onnx_functions.inspection.table import table
from trt_build import build
from trt_build.coverage import measure_coverage
from trt_build.graph import read_graph
from trt_build.layer_info import Layer


@pytest.fixture(scope="module")
def in_mxfp8(digits: Path, five_calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built-in model in MXFP8, with its graph."""
    folder = tmp_path_factory.mktemp("mxfp8") / "digits"
    quantize(digits, folder, recipe="mxfp8-ptq", calibration=five_calls)
    exporter.export(folder)
    return folder


def test_a_loaded_checkpoint_computes_with_rounded_weights_and_inputs(in_mxfp8: Path, digits: Path) -> None:
    model, source, checkpoint = load(in_mxfp8), load_source(digits), read(in_mxfp8)
    path = "transformer_blocks.0.attn.to_q"
    assert set(checkpoint.formats.values()) == {"mxfp8"}
    assert {stored.dtype for name, stored in checkpoint.tensors.items() if name.startswith(path)} >= {"F8_E4M3", "U8"}
    weight = source.get_submodule(path).weight
    assert torch.equal(model.get_submodule(path).weight, mxfp8.fake_quantize(weight, torch.ones(())))
    config = json.loads((in_mxfp8 / "config.json").read_text())["quantization_config"]
    assert (config["quant_algo"], config["config_groups"]["group_0"]["weights"]["group_size"]) == ("MXFP8", 32)


def test_every_gate_of_validation_passes(in_mxfp8: Path) -> None:
    report = onnx_functions.validate(in_mxfp8)
    assert report.passed, [gate.line for gate in report.failures]
    assert all(row.differing_codes == 0 for row in report.linears if row.path in read(in_mxfp8).formats)


def test_a_build_says_first_what_the_engine_makes_of_it(in_mxfp8: Path) -> None:
    assert {finding.rule for finding in onnx_functions.lint(in_mxfp8).findings} == {"mxfp8-storage"}
    lines: list[str] = []
    result = build(in_mxfp8, gpu="rtx5090", on_line=lines.append)
    assert lines[0] == "20 linears in MXFP8: stored in 8 bits, unpacked and multiplied in BF16 on SM120"
    assert (result.fp4_gemms, result.fp8_gemms, result.lost) == (0, 0, [])
    reasons = {item["reason"] for item in result.sixteen_bit}
    assert "MXFP8: stored in 8 bits, unpacked and multiplied in BF16" in reasons


def test_an_engine_is_described_with_all_its_linears_and_what_it_only_stores_in_mxfp8(in_mxfp8: Path) -> None:
    build(in_mxfp8, gpu="rtx5090")
    found = describe(in_mxfp8 / "rtx5090.json")
    promise = found["promise"]
    assert sum(entry["linears"] for entry in found["formats"].values()) == 30
    assert promise["promised"] == {"mxfp8": 20}
    assert (len(promise["stored"]["mxfp8"]), promise["differing"]) == (20, [])
    lines = table(found)
    assert "  quantized GEMMs        none promised" in lines
    told = "stored in 8 bits, unpacked and multiplied in BF16, as this GPU has no GEMM of it"
    assert f"  20 linears promised in mxfp8: {told}" in lines


def test_commands_count_the_linears_of_every_format(
    digits: Path, mixed_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside, output = mixed_digits.parent, tmp_path / "mixed"
    options = ["--recipe", beside / "recipe.yaml", "--calibration", beside / "amax.json"]
    assert fp4trt.run(["quantize", str(digits), "-o", str(output), *map(str, options)]) == 0
    words = "12 linears in NVFP4, 2 in FP8, 6 in MXFP8"
    assert f"quantized {words} (mixed)" in capsys.readouterr().out
    assert fp4trt.run(["export", str(output), "--json"]) == 0
    told = capsys.readouterr()
    assert f"nodes, {words}, " in told.err
    assert json.loads(told.out)["precision"] == "nvfp4, fp8, mxfp8"


def test_a_build_counts_the_gemms_of_each_format_that_it_has(mixed_digits: Path) -> None:
    graph = read_graph(mixed_digits)
    layers = [
        Layer("k", "gemm", (FORMATS[kind].engine,), (FORMATS[kind].engine,), ("BFloat16",), (f"{path}/MatMul",))
        for kind, paths in graph.promised.items()
        for path in paths
    ]
    found = measure_coverage(graph, layers).summary()
    assert found["coverage"] == {
        kind: {"gemms": count, "linears": count} for kind, count in (("nvfp4", 12), ("fp8", 2), ("mxfp8", 6))
    }
    stored = measure_coverage(graph, layers, ["nvfp4", "fp8"]).summary()
    assert list(stored["coverage"]) == ["nvfp4", "fp8"]
