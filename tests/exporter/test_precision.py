"""A plain checkpoint leaves as a BF16 graph with the same interface, and only when that was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import fp4trt
from calibration.checkpoints import quantized as checkpoint
from calibration.checkpoints.plain import load_source
from exporter import export
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadCheckpoint, BadGraph, WrongPrecision
from fp4trt.families import family_of

BF16 = onnx.TensorProto.BFLOAT16


@pytest.fixture
def copy_of_plain(plain_digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain_digits, tmp_path / "digits")
    (tmp_path / "digits" / "model.onnx").unlink()
    return tmp_path / "digits"


def _interface(model: onnx.ModelProto) -> list[object]:
    return [value.SerializeToString() for value in (*model.graph.input, *model.graph.output)]


def test_the_interface_is_the_quantized_graphs_and_no_linear_is_promised_in_fp4(
    plain_digits: Path, quantized_digits: Path
) -> None:
    plain = onnx.load(plain_digits / "model.onnx", load_external_data=False)
    quantized = onnx.load(quantized_digits / "model.onnx", load_external_data=False)
    assert _interface(plain) == _interface(quantized)
    assert {entry.domain: entry.version for entry in plain.opset_import} == {"": 23}
    metadata = {entry.key: entry.value for entry in plain.metadata_props}
    linears = json.loads(metadata["fp4trt.linears"])
    assert linears["nvfp4"] == []
    assert len(linears["bf16"]) == 20 + len(
        json.loads({e.key: e.value for e in quantized.metadata_props}["fp4trt.linears"])["bf16"]
    )
    assert all(f"{path}/MatMul" in {node.name for node in plain.graph.node} for path in linears["bf16"])
    assert json.loads(metadata["fp4trt.symbols"])["L"]["pixels_per_token"] == 4
    assert not [node for node in plain.graph.node if node.op_type == "DequantizeLinear"]


def test_its_weights_are_the_checkpoints_own_bytes(plain_digits: Path) -> None:
    stored = tensors_in_folder(plain_digits)
    model = onnx.load(plain_digits / "model.onnx", load_external_data=False)
    pointing = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    assert pointing.keys() == stored.keys()
    for name, entry in pointing.items():
        assert entry["location"] == checkpoint.WEIGHTS
        assert (int(entry["offset"]), int(entry["length"])) == (stored[name].offset, stored[name].nbytes)
    assert sorted(path.name for path in plain_digits.iterdir()) == ["config.json", checkpoint.WEIGHTS, "model.onnx"]


def test_it_computes_what_the_model_computes(plain_digits: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    config = json.loads((plain_digits / "config.json").read_text())
    inputs = family_of(config).example_inputs(config, (1, 4, 3), 5, torch.bfloat16)
    with torch.no_grad():
        expected = load_source(plain_digits)(**inputs, return_dict=False)[0].float().numpy()
    import ml_dtypes

    fed = {
        name: value.float().numpy().astype(ml_dtypes.bfloat16 if value.dtype == torch.bfloat16 else np.float32)
        for name, value in inputs.items()
    }
    found = np.asarray(ReferenceEvaluator(str(plain_digits / "model.onnx")).run(None, fed)[0], np.float32)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_fp32_weights_are_rounded_into_a_copy(tiny_flux: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_flux(tmp_path / "flux")
    tensors = load_file(source / checkpoint.WEIGHTS)
    exact = {name: value.float() * (1 + 2.0**-9) for name, value in tensors.items()}
    save_file(exact, source / checkpoint.WEIGHTS)
    result = export(source, precision="bf16")
    assert result["copied_because"] == "weights stored as F32 are rounded to BF16"
    model = onnx.load(source / "model.onnx")
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in exact}
    assert weights.keys() == exact.keys()
    for name, tensor in weights.items():
        assert tensor.data_type == BF16
        assert tensor.raw_data == exact[name].to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def test_the_built_in_model_is_copied_to_where_the_output_is(copied_plain: Path) -> None:
    assert sorted(path.name for path in copied_plain.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(copied_plain / "model.onnx", full_check=True)


def test_the_built_in_model_needs_an_output() -> None:
    with pytest.raises(BadGraph, match="--output"):
        export("digits", precision="bf16")


@pytest.mark.parametrize("source", ["folder", "digits"])
def test_a_plain_checkpoint_is_refused_with_the_option_that_takes_it(
    source: str, copy_of_plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(copy_of_plain) if source == "folder" else source
    assert fp4trt.run(["export", name, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--precision bf16" in error
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused_as_a_plain_one(quantized_digits: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongPrecision, match="is quantized"):
        export(quantized_digits, tmp_path / "out", precision="bf16")


def test_a_weight_that_is_not_a_number_is_named(copy_of_plain: Path) -> None:
    tensors = load_file(copy_of_plain / checkpoint.WEIGHTS)
    tensors["proj_out.weight"][3, 5] = torch.nan
    save_file(tensors, copy_of_plain / checkpoint.WEIGHTS)
    with pytest.raises(BadCheckpoint, match=r"proj_out\.weight holds NaN"):
        export(copy_of_plain, precision="bf16")


def test_a_config_of_another_model_is_refused(copy_of_plain: Path) -> None:
    config = json.loads((copy_of_plain / "config.json").read_text())
    (copy_of_plain / "config.json").write_text(json.dumps({**config, "joint_attention_dim": 32}))
    with pytest.raises(BadCheckpoint, match=r"context_embedder\.weight is \[128, 64\] in .*\[128, 32\] by its config"):
        export(copy_of_plain, precision="bf16")


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_a_scale_dtype_is_refused_where_there_are_no_scales(
    given: str, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(digits), "-o", str(tmp_path / "x"), "--precision", "bf16", "--scale-dtype", given]
    assert fp4trt.run(arguments) == 2
    assert f"error: --scale-dtype {given} is of block scales, which a bf16 graph has none of" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
