"""The exported graph is what TensorRT, and whoever reads it, was promised."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from calibration.checkpoints import quantized as checkpoint
from exporter import export, external_weights, onnx_export, trace
from exporter.onnx_export import group_leaders
from fp4trt.errors import BadGraph, OutputExists, TooLittleSpace
from fp4trt.safetensors_file import sha256_of
from onnx_functions.linting import lint

BF16, FP32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def graph(quantized_digits: Path) -> onnx.ModelProto:
    return onnx.load(quantized_digits / "model.onnx", load_external_data=False)


def _interface(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [size.dim_param or size.dim_value for size in tensor.shape.dim]


def test_inputs_and_output_are_those_of_nvidias_and_black_forest_labs_runtimes(graph: onnx.ModelProto) -> None:
    assert [_interface(value) for value in graph.graph.input] == [
        ("hidden_states", BF16, ["B", "L", 16]),
        ("encoder_hidden_states", BF16, ["B", "T", 64]),
        ("pooled_projections", BF16, ["B", 64]),
        ("timestep", BF16, ["B"]),
        ("img_ids", FP32, ["L", 3]),
        ("txt_ids", FP32, ["T", 3]),
        ("guidance", FP32, ["B"]),
    ]
    assert [_interface(value) for value in graph.graph.output] == [("latent", BF16, ["B", "L", 16])]


def test_it_declares_opset_23_and_passes_the_checker_with_full_check(
    quantized_digits: Path, graph: onnx.ModelProto
) -> None:
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": 23, "trt": 1}
    onnx.checker.check_model(quantized_digits / "model.onnx", full_check=True)


def test_every_node_and_tensor_has_one_name_and_every_value_a_type(graph: onnx.ModelProto) -> None:
    assert max(Counter(node.name for node in graph.graph.node).values()) == 1
    initializers = {tensor.name for tensor in graph.graph.initializer}
    assert len(initializers) == len(graph.graph.initializer)
    assert not initializers & {value.name for value in graph.graph.input}
    described = {value.name: value for value in graph.graph.value_info}
    assert all(value.type.tensor_type.elem_type != onnx.TensorProto.UNDEFINED for value in described.values())
    outputs = {value.name for value in graph.graph.output}
    assert [n for node in graph.graph.node for n in node.output if n not in described and n not in outputs] == []


def test_no_tensor_is_there_twice(graph: onnx.ModelProto) -> None:
    spans: Counter[tuple[object, ...]] = Counter()
    for tensor in graph.graph.initializer:
        if tensor.external_data:
            spans[tuple((entry.key, entry.value) for entry in tensor.external_data)] += 1
        else:
            array = onnx.numpy_helper.to_array(tensor)
            spans[tensor.data_type, array.shape, array.tobytes()] += 1
    assert max(spans.values()) == 1


def test_a_linears_product_carries_its_state_dict_path(graph: onnx.ModelProto) -> None:
    names = {node.name for node in graph.graph.node}
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    linears = json.loads(metadata["fp4trt.linears"])
    assert len(linears["nvfp4"]) == 20
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= set(linears["bf16"])
    assert all(f"{path}/MatMul" in names for paths in linears.values() for path in paths)


def test_metadata_hold_what_the_builder_needs_and_no_path_of_this_machine(
    graph: onnx.ModelProto, quantized_digits: Path
) -> None:
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata["fp4trt.family"] == "flux-digits"
    assert metadata["fp4trt.recipe"] == "nvfp4-ptq"
    assert json.loads(metadata["fp4trt.symbols"])["L"]["pixels_per_token"] == 4
    assert [len(group) for group in json.loads(metadata["fp4trt.groups"])] == [
        *(1, 1, 3, 3, 1, 1, 1, 1, 1, 1),
        *(1, 4, 1),
    ]
    content = graph.SerializeToString()
    for path in (Path.cwd(), Path(onnx.__file__).parent.parent, quantized_digits):
        assert str(path).encode() not in content


def test_initializers_point_into_the_checkpoint_and_add_next_to_nothing(
    graph: onnx.ModelProto, quantized_digits: Path
) -> None:
    stored = checkpoint.read(quantized_digits).tensors
    pointing = [tensor for tensor in graph.graph.initializer if tensor.external_data]
    for tensor in pointing:
        entry = {item.key: item.value for item in tensor.external_data}
        assert entry["location"] == checkpoint.WEIGHTS
        assert (int(entry["offset"]), int(entry["length"])) == (stored[tensor.name].offset, stored[tensor.name].nbytes)
    inside = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer if not tensor.external_data)
    assert inside < 1000
    covered = {tensor.name for tensor in pointing}
    followers = {
        f"{path}.{kind}"
        for group in checkpoint.read(quantized_digits).groups
        for path in group[1:]
        for kind in ("weight_scale_2", "input_scale")
    }
    assert covered == set(stored) - followers


def test_a_group_reads_one_quantized_activation_and_one_pair_of_global_scales(graph: onnx.ModelProto) -> None:
    consumers: Counter[str] = Counter(name for node in graph.graph.node for name in node.input)
    quantizers = [node for node in graph.graph.node if node.op_type == "TRT_FP4DynamicQuantize"]
    assert len(quantizers) == 10 + 3
    assert consumers["single_transformer_blocks.0.attn.to_q/input/Cast_output_0"] == 4
    assert consumers["single_transformer_blocks.0.attn.to_q.weight_scale_2"] == 4
    assert {node.op_type for node in graph.graph.node if node.domain == "trt"} == {"TRT_FP4DynamicQuantize"}
    for node in quantizers:
        assert {item.name: item.i for item in node.attribute} == {"axis": -1, "block_size": 16, "scale_type": 17}


@pytest.mark.slow
def test_exporting_twice_gives_identical_bytes(
    quantized_digits: Path, copy_of_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trace", "translate"):  # not what tests share: see tests/traced_once.py
        monkeypatch.setattr(onnx_export, name, getattr(trace, name))
    export(copy_of_digits, force=True)
    assert sha256_of(copy_of_digits / "model.onnx") == sha256_of(quantized_digits / "model.onnx")


def test_bfloat16_scales_need_no_cast_and_keep_global_scales_in_fp32(bfloat16_digits: Path) -> None:
    model = onnx.load(bfloat16_digits / "model.onnx", load_external_data=False)
    dequantizers = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantizers) == 2 * (20 + 13)
    for node in dequantizers:
        assert next(item.i for item in node.attribute if item.name == "output_dtype") == BF16
    assert not [node for node in model.graph.node if node.name.endswith(("/input/Cast", "/weight/Cast"))]
    globals_ = [tensor for tensor in model.graph.initializer if tensor.name.endswith(("weight_scale_2", "input_scale"))]
    assert {tensor.data_type for tensor in globals_} == {FP32}


def _values(path: Path) -> dict[str, bytes]:
    model = onnx.load(path)
    return {tensor.name: tensor.raw_data for tensor in model.graph.initializer if "." in tensor.name}


@pytest.fixture
def finished(quantized_digits: Path) -> ir.Model:
    """The exported graph as the last step gets it: its weights have no values yet."""
    model = ir.load(quantized_digits / "model.onnx")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def test_copied_weights_hold_the_same_values_and_need_no_checkpoint(
    quantized_digits: Path, copied_digits: Path, tmp_path: Path
) -> None:
    assert sorted(path.name for path in copied_digits.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = shutil.copytree(copied_digits, tmp_path / "moved")
    onnx.checker.check_model(moved / "model.onnx", full_check=True)
    assert _values(moved / "model.onnx") == _values(quantized_digits / "model.onnx")


def test_weights_that_do_not_fit_on_the_disk_are_refused_before_the_graph_is_made(
    quantized_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.onnx_export.graph_of", lambda *_: pytest.fail("the graph was made"))
    needed = sum(tensor.nbytes for tensor in checkpoint.read(quantized_digits).tensors.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(TooLittleSpace, match=f"has {needed - 1:,} bytes free, the weights .* need {needed:,}; make"):
        export(quantized_digits, tmp_path / "new" / "model.onnx", copy_weights=True)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_copied_where_a_graph_cannot_point_at_them(copy_of_digits: Path) -> None:
    tensors = checkpoint.read(copy_of_digits).tensors
    assert external_weights.must_copy(tensors, copy_of_digits) is None
    assert (
        external_weights.must_copy(tensors, copy_of_digits.parent) == f"the graph is written outside {copy_of_digits}"
    )
    os.link(copy_of_digits / checkpoint.WEIGHTS, copy_of_digits.parent / "hub-cache")
    assert external_weights.must_copy(tensors, copy_of_digits) == f"{checkpoint.WEIGHTS} is a link"


def test_an_existing_graph_is_replaced_only_with_force(copy_of_digits: Path) -> None:
    (copy_of_digits / "model.onnx").write_text("mine")
    with pytest.raises(OutputExists, match="--force"):
        export(copy_of_digits)
    assert (copy_of_digits / "model.onnx").read_text() == "mine"


@pytest.mark.parametrize("save", [external_weights.save_pointing, external_weights.save_with_copies])
def test_nothing_is_left_behind_when_writing_fails(
    save: Callable[..., None], finished: ir.Model, copy_of_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: sha256_of(path) for path in copy_of_digits.glob("*.*")}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exporter.external_weights.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(finished, checkpoint.read(copy_of_digits).tensors, copy_of_digits / "model.onnx", lambda _: [])
    assert {path.name: sha256_of(path) for path in copy_of_digits.glob("*.*")} == before


def test_a_graph_whose_weights_the_checkpoint_lacks_is_refused(finished: ir.Model, quantized_digits: Path) -> None:
    tensors = dict(checkpoint.read(quantized_digits).tensors)
    del tensors["proj_out.bias"]
    with pytest.raises(BadGraph, match=r"proj_out\.bias"):
        external_weights.bind(finished, tensors, quantized_digits)


def test_linears_whose_scales_differ_lead_themselves(copy_of_digits: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy_of_digits / checkpoint.WEIGHTS)
    tensors["transformer_blocks.0.attn.to_k.weight_scale_2"] *= 2
    save_file(tensors, copy_of_digits / checkpoint.WEIGHTS)
    leaders = group_leaders(checkpoint.read(copy_of_digits))
    for name in ("to_q", "to_k", "to_v"):
        path = f"transformer_blocks.0.attn.{name}"
        assert leaders[path] == path
        assert leaders[f"single_transformer_blocks.0.attn.{name}"] == "single_transformer_blocks.0.attn.to_q"


def test_schnell_has_no_guidance_input(tiny_flux: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    from calibration.inputs.captured import save_inputs
    from calibration.quantization import quantize
    from fp4trt.families import family_of
    from fp4trt.json_file import load_json

    source = tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    config = load_json(source / "config.json")
    save_inputs(
        tmp_path / "inputs.safetensors", [family_of(config).example_inputs(config, (1, 4, 4), 0, torch.bfloat16)]
    )
    quantize(source, tmp_path / "fp4", recipe="nvfp4-ptq", calibration=tmp_path / "inputs.safetensors")
    export(tmp_path / "fp4")
    assert lint(tmp_path / "fp4").findings == ()
    model = onnx.load(tmp_path / "fp4" / "model.onnx", load_external_data=False)
    assert [value.name for value in model.graph.input][-1] == "txt_ids"
    assert "Gemm" not in {node.op_type for node in model.graph.node}
