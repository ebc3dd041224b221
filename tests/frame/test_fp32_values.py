"""What diffusers computes with in FP32 keeps an FP32 source's values all the way to the graph; the rest is in BF16."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import exporter
import onnx_functions
from calibration import load, quantize
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import WEIGHTS
from calibration.inputs.captured import save_inputs
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from onnx_functions.inspection.inspect import describe
from tests.frame.diffusers_models import MODELS

MODEL = replace(MODELS["wan"], config={**MODELS["wan"].config, "num_layers": 1})
KEPT = {
    "scale_shift_table",
    "blocks.0.scale_shift_table",
    "blocks.0.norm2.weight",
    "blocks.0.norm2.bias",
    *(f"condition_embedder.time_embedder.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")),
}

Source = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A small Wan in FP32 whose values no BF16 number has, with captured inputs beside it; and these values."""
    folder = tmp_path_factory.mktemp("fp32") / "wan"
    MODEL.save(folder)
    tensors = load_file(folder / WEIGHTS)
    torch.manual_seed(1)
    tensors = {name: value.float() * (1 + 2**-10 * torch.rand(value.shape)) for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS)
    config = load_json(folder / "config.json")
    calls = [family_of(config).example_inputs(config, (1, 16, 8), seed, torch.bfloat16) for seed in range(2)]
    save_inputs(folder.with_name("inputs.safetensors"), calls)
    return folder, tensors


@pytest.fixture(scope="module")
def quantized(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It quantized block by block."""
    folder = tmp_path_factory.mktemp("quantized") / "wan"
    quantize(source[0], folder, recipe="nvfp4-quality", calibration=source[0].with_name("inputs.safetensors"))
    return folder


def _assert_kept(found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    assert {name for name in KEPT if torch.equal(found[name], tensors[name])} == KEPT
    others = {name for name, value in found.items() if name in tensors and value.dtype == torch.float32} - KEPT
    assert others == set()


def test_they_are_stored_in_fp32_by_block_and_in_one_pass_and_load_so(
    source: Source, quantized: Path, tmp_path: Path
) -> None:
    folder, tensors = source
    family, config = family_of(load_json(folder / "config.json")), load_json(folder / "config.json")
    amax = dict.fromkeys(family.quantized(config), 4.0)
    (tmp_path / "amax.json").write_text(json.dumps(amax))
    quantize(folder, tmp_path / "one-pass", recipe="nvfp4-ptq", calibration=tmp_path / "amax.json")
    for result in (quantized, tmp_path / "one-pass"):
        _assert_kept(load_file(result / WEIGHTS), tensors)
        _assert_kept(load(result).state_dict(), tensors)
    _assert_kept(load_source(folder).state_dict(), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_those_of_a_plain_source_are_exported_in_fp32_and_the_rest_in_bf16(
    dtype: torch.dtype, source: Source, shared_traces: None, tmp_path: Path
) -> None:
    folder, tensors = source
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    exporter.export(tmp_path, precision="bf16")
    _assert_in_graph(tmp_path / "model.onnx", tensors)
    report = onnx_functions.validate(tmp_path, level="full" if dtype == torch.float32 else "blocks")
    assert report.passed, [gate.line for gate in report.failures]


def test_a_quantized_graph_points_at_them_in_fp32_and_validates(
    source: Source, quantized: Path, shared_traces: None
) -> None:
    exported = exporter.export(quantized)
    assert not exported.copied_weights
    _assert_in_graph(quantized / "model.onnx", source[1])
    report = onnx_functions.validate(quantized, level="blocks")
    assert report.passed, [gate.line for gate in report.failures]
    promised = describe(quantized)["graph"]["promise"]["promised"]
    assert promised == {"nvfp4": 10, "bf16": 4, "fp32": 2}


def _assert_in_graph(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    held = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer if tensor.name in tensors}
    in_fp32 = {name for name, tensor in held.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    assert in_fp32 == KEPT
    for name in KEPT:
        assert held[name].raw_data == tensors[name].float().numpy().tobytes()
