"""MXFP8 goes from the checkpoint to the engine as data of :mod:`fp4trt.number_formats` alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import exporter
import onnx_functions
from calibration import load, quantize, read
from calibration.checkpoints.plain import load_source
from calibration.formats import mxfp8
from trt_build import build


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
