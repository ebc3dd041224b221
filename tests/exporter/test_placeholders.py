"""A graph of other origin whose weights are marked for FP4 leaves with FP4 weights, and is otherwise what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import fp4trt
from calibration.formats import nvfp4
from exporter import export, export_graph
from fp4trt.errors import OutputExists
from onnx_functions.linting import lint
from onnx_functions.simulation.reference_ops import reference_evaluator
from trt_build import build

BF16, FP16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
DTYPES = {BF16: torch.bfloat16, FP16: torch.float16, FP32: torch.float32}
Maker = Callable[..., Any]


def _stored(path: Path) -> dict[str, bytes]:
    """Return every initializer's bytes, from wherever they lie."""
    return {tensor.name: tensor.raw_data for tensor in onnx.load(path).graph.initializer}


def _expected(weight: np.ndarray) -> tuple[bytes, bytes, np.float32]:
    """Return what the slow reference packs: codes two a byte, block scales, global scale."""
    scale = np.float32(np.abs(weight).max()) / np.float32(6 * 448)
    codes, scales = nvfp4.quantize_reference(weight, scale)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).tobytes(), scales.tobytes(), scale


def _ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.mark.parametrize(("opset", "dtype"), [(17, BF16), (20, BF16), (20, FP16), (20, FP32)])
def test_modelopts_export_becomes_an_engine_with_fp4_gemms(
    opset: int, dtype: int, modelopt_export: Maker, tmp_path: Path
) -> None:
    theirs, _ = modelopt_export("two linears", opset, DTYPES[dtype])
    export_graph(theirs, tmp_path)
    result = build(tmp_path, gpu="rtx5090", shapes=("B=1:1:4", "L=32:64:128"))
    assert result["fp4_gemms"] == result["fp4_linears"] == result["quantized_linears"] == 2


@pytest.mark.parametrize("model", ["two linears", "odd and shared"])
def test_the_lint_finds_nothing_in_what_is_made_of_modelopts_export(
    model: str, modelopt_export: Maker, tmp_path: Path
) -> None:
    theirs, _ = modelopt_export(model, 20)
    export_graph(theirs, tmp_path)
    assert lint(tmp_path).findings == ()


def test_codes_and_scales_are_those_of_modelopts_own_exporter(modelopt_export: Maker, tmp_path: Path) -> None:
    from modelopt.onnx.export import NVFP4QuantExporter

    theirs, _ = modelopt_export("two linears", 20)
    export_graph(theirs, tmp_path)
    ours = _stored(tmp_path / "model.onnx")
    model = NVFP4QuantExporter.process_model(onnx.load(theirs))
    wanted = {tensor.name: tensor.raw_data for tensor in model.graph.initializer}
    for name in ("up.weight", "down.weight"):
        assert ours[f"{name}_scale"] == wanted[f"{name}_f8_scale"]
        assert ours[f"{name}_scale_2"] == wanted[f"{name}_f8_scale_f32_scale"]
        assert ours[name] == wanted[f"{name}_f4"]


# In BF16 an activation may fall on the other side of a rounding step and move everything after it.
@pytest.mark.parametrize(("dtype", "limit"), [(FP32, 1e-5), (BF16, 0.05)])
def test_modelopts_graph_computes_what_its_torch_model_computes(
    dtype: int, limit: float, modelopt_export: Maker, foreign_graph: Maker, tmp_path: Path
) -> None:
    theirs, net = modelopt_export("two linears", 20, DTYPES[dtype])
    export_graph(theirs, tmp_path)
    x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    with torch.no_grad():
        expected = net(x).float().numpy()
    fed = {"x": x.float().numpy().astype(foreign_graph(dtype).numpy)}
    found = np.asarray(reference_evaluator(tmp_path / "model.onnx").run(None, fed)[0], np.float32)
    assert np.linalg.norm(found - expected) < limit * np.linalg.norm(expected)


def test_a_weight_that_is_used_twice_is_stored_once_and_rows_may_be_odd(modelopt_export: Maker, tmp_path: Path) -> None:
    theirs, net = modelopt_export("odd and shared", 20)
    assert _ops(theirs).count("TRT_FP4QDQ") == 3
    result = export_graph(theirs, tmp_path)
    assert result["quantized_weights"] == ["shared.weight", "odd.weight"]
    assert result["activation_quantizers"] == 3
    ours = _stored(tmp_path / "model.onnx")
    for path in ("shared", "odd"):
        codes, scales, scale = _expected(net.get_parameter(f"{path}.weight").detach().float().numpy())
        assert ours[f"{path}.weight"] == codes
        assert ours[f"{path}.weight_scale"] == scales
        assert ours[f"{path}.weight_scale_2"] == scale.tobytes()
    engine = build(tmp_path, gpu="rtx5090", shapes=("B=1:1:4", "L=32:64:128"))
    assert engine["fp4_linears"] == engine["quantized_linears"] == 3


def test_names_stay_but_those_of_the_placeholders(modelopt_export: Maker, tmp_path: Path) -> None:
    theirs, _ = modelopt_export("two linears", 20)
    export_graph(theirs, tmp_path)
    before = onnx.load(theirs).graph
    after = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in after.opset_import} == {"": 23, "trt": 1}
    gone = {"TRT_FP4QDQ", "Constant"}
    kept = [(node.name, node.op_type, list(node.output)) for node in before.node if node.op_type not in gone]
    found = [(node.name, node.op_type, list(node.output)) for node in after.graph.node]
    assert [entry for entry in found if entry in kept] == kept
    assert [value.name for value in (*after.graph.input, *after.graph.output)] == ["x", "y"]
    assert {tensor.name for tensor in before.initializer} <= {tensor.name for tensor in after.graph.initializer}
    assert {value.type.tensor_type.elem_type for value in after.graph.value_info}.isdisjoint({TensorProto.UNDEFINED})


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("stored", ["inline", "external", "constant", "external constant", "graph input"])
def test_weights_are_found_wherever_they_lie(
    stored: str, dtype: int, foreign_graph: Maker, normal: Maker, tmp_path: Path
) -> None:
    weight, graph = normal(32, 64), foreign_graph(dtype)
    if "constant" in stored:
        graph.node("Constant", out="w", value=graph.tensor("w", weight))
    else:
        graph.weight("w", weight)
    if stored == "graph input":
        graph.inputs.append(helper.make_tensor_value_info("w", dtype, [32, 64]))
    graph.product(graph.marked("w"))
    theirs = graph.save(tmp_path / "theirs" / "graph.onnx", external="external" in stored)
    export_graph(theirs, tmp_path / "ours.onnx")
    ours = _stored(tmp_path / "ours.onnx")
    codes, scales, scale = _expected(weight)
    assert (ours["w"], ours["w_scale"], ours["w_scale_2"]) == (codes, scales, scale.tobytes())
    model = onnx.load(tmp_path / "ours.onnx", load_external_data=False)
    assert [value.name for value in model.graph.input] == ["x"]
    cast = [] if dtype == FP32 else ["Cast"]
    assert _ops(tmp_path / "ours.onnx") == ["DequantizeLinear", "DequantizeLinear", *cast, "Transpose", "MatMul"]
    assert sorted(path.name for path in tmp_path.glob("ours*")) == ["ours.onnx", "ours.onnx.data"]
    x = normal(3, 64, seed=1)
    found = reference_evaluator(tmp_path / "ours.onnx").run(None, {"x": x.astype(graph.numpy)})[0]
    np.testing.assert_allclose(np.asarray(found, np.float32), x @ _dequantized(weight).T, rtol=0.02, atol=0.3)


def _dequantized(weight: np.ndarray) -> np.ndarray:
    scale = np.float32(np.abs(weight).max()) / np.float32(6 * 448)
    return nvfp4.dequantize_reference(*nvfp4.quantize_reference(weight, scale), scale)


def test_a_weight_stored_transposed_or_narrower_is_packed_as_the_placeholder_reads_it(
    foreign_graph: Maker, normal: Maker, tmp_path: Path
) -> None:
    weight, graph = normal(32, 64), foreign_graph(BF16)
    graph.weight("w", weight.T, FP16)
    graph.node("Transpose", "w", out="turned", perm=[1, 0])
    graph.node("Cast", "turned", out="wide", to=BF16)
    graph.product(graph.marked(graph.node("Identity", "wide", out="same")))
    export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    assert _ops(tmp_path / "ours.onnx") == ["DequantizeLinear", "DequantizeLinear", "Cast", "Transpose", "MatMul"]
    stored = _stored(tmp_path / "ours.onnx")
    codes, scales, scale = _expected(weight)
    assert sorted(map(len, stored.values())) == [4, 32 * 4, 32 * 32]
    assert set(stored.values()) == {codes, scales, scale.tobytes()}


def test_a_weight_that_is_read_in_16_bit_too_keeps_its_name_and_bytes(
    foreign_graph: Maker, normal: Maker, tmp_path: Path
) -> None:
    weight, graph = normal(32, 64), foreign_graph(BF16)
    graph.product(graph.marked(graph.weight("w", weight)))
    graph.product("w", "plain")
    export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    ours = _stored(tmp_path / "ours.onnx")
    assert ours["w"] == weight.astype(ml_dtypes.bfloat16).tobytes()
    assert ours["w_fp4"] == _expected(weight)[0]


def test_activations_without_quantizers_stay_as_they_are(foreign_graph: Maker, normal: Maker, tmp_path: Path) -> None:
    graph = foreign_graph(BF16)
    graph.product(graph.marked(graph.weight("w", normal(32, 64))))
    result = export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    assert result["activation_quantizers"] == 0
    product = onnx.load(tmp_path / "ours.onnx").graph.node[-1]
    assert (product.op_type, product.input[0]) == ("MatMul", "x")


def test_a_weight_of_zeros_gets_the_global_scale_1_and_zero_codes(foreign_graph: Maker, tmp_path: Path) -> None:
    graph = foreign_graph(BF16)
    graph.product(graph.marked(graph.weight("w", np.zeros((32, 64), np.float32))))
    export_graph(graph.save(tmp_path / "theirs.onnx"), tmp_path / "ours.onnx")
    ours = _stored(tmp_path / "ours.onnx")
    assert (ours["w_scale_2"], set(ours["w"])) == (np.float32(1).tobytes(), {0})


def test_writing_twice_gives_identical_bytes(modelopt_export: Maker, tmp_path: Path) -> None:
    theirs, _ = modelopt_export("two linears", 20)
    for name in ("one", "two"):
        export_graph(theirs, tmp_path / name)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def _command(theirs: Path, output: Path, capfd: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Run the command; return its one line of error, having checked that nothing was left behind."""
    before = sorted(theirs.parent.rglob("*"))
    assert fp4trt.run(["export", str(theirs), "-o", str(output)]) == status
    progress, _, error = capfd.readouterr().err.rstrip("\n").rpartition("\n")
    assert progress in ("", "exporting")
    assert error.startswith("fp4trt export: error: ")
    assert sorted(theirs.parent.rglob("*")) == before
    return error


def test_bad_weights_are_named_in_one_line(
    foreign_graph: Maker, normal: Maker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def error(weight: np.ndarray, block_size: int = 16) -> str:
        graph = foreign_graph(BF16)
        graph.product(graph.marked(graph.weight("w", weight), block_size))
        return _command(graph.save(tmp_path / "theirs.onnx"), tmp_path / "new" / "folder", capfd)

    assert "w of shape [32, 60]; expected [..., N, K] with K a multiple of 16" in error(normal(32, 60))
    assert "blocks of 32" in error(normal(32, 64), 32)
    for value in (np.nan, np.inf, -np.inf):
        broken = normal(32, 64)
        broken[7, 9] = value
        assert "weight w holds NaN or infinite values" in error(broken)


def test_bad_graphs_are_refused_in_one_line(
    foreign_graph: Maker, normal: Maker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs.onnx", tmp_path / "ours.onnx"

    def graph() -> Any:
        made = foreign_graph(BF16)
        made.product(made.marked(made.weight("w", normal(32, 64))))
        return made

    plain = foreign_graph(BF16)
    plain.product(plain.weight("w", normal(32, 64)))
    assert "no TRT_FP4QDQ node" in _command(plain.save(theirs), ours, capfd)
    computed = foreign_graph(BF16)
    computed.product(computed.marked(computed.node("Relu", computed.weight("w", normal(32, 64)), out="r")))
    assert "quantizes r, which is not an initializer" in _command(computed.save(theirs), ours, capfd)
    across = foreign_graph(BF16)
    across.outputs.append(helper.make_tensor_value_info("y", BF16, ["B", 32]))
    across.node("MatMul", "x", across.marked(across.weight("w", normal(64, 32))), out="y")
    assert "node of y reads the weight of node of w_marked as [K, N]" in _command(across.save(theirs), ours, capfd)
    assert "declares opset 13; expected 17 to 23" in _command(graph().save(theirs, opset=13), ours, capfd)
    graph().save(theirs, external=True)
    (tmp_path / "theirs.bin").write_bytes(b"short")
    assert "w needs 4096 bytes from byte 0 of" in _command(theirs, ours, capfd)
    (tmp_path / "theirs.bin").unlink()
    assert "which does not exist" in _command(theirs, ours, capfd)
    theirs.write_bytes(b"no graph at all")
    assert "is not an ONNX model" in _command(theirs, ours, capfd)
    theirs.unlink()
    assert "does not exist" in _command(theirs, ours, capfd)


def test_nothing_that_exists_or_is_read_is_replaced(foreign_graph: Maker, normal: Maker, tmp_path: Path) -> None:
    graph = foreign_graph(BF16)
    graph.product(graph.marked(graph.weight("w", normal(32, 64))))
    theirs = graph.save(tmp_path / "theirs.onnx")
    (tmp_path / "ours.onnx").write_text("mine")
    with pytest.raises(OutputExists, match="--force"):
        export_graph(theirs, tmp_path / "ours.onnx")
    assert (tmp_path / "ours.onnx").read_text() == "mine"
    with pytest.raises(OutputExists, match="is what the graph is read from"):
        export_graph(theirs, theirs, force=True)


@pytest.mark.parametrize("beside", ["nothing", "their graph", "our graph, whose data lie elsewhere", "no graph"])
def test_data_that_are_not_of_a_graph_of_ours_are_not_replaced(
    beside: str, foreign_graph: Maker, normal: Maker, quantized_digits: Path, tmp_path: Path
) -> None:
    graph = foreign_graph(BF16)
    graph.product(graph.marked(graph.weight("w", normal(32, 64))))
    theirs = graph.save(tmp_path / "theirs.onnx")
    model, data = tmp_path / "out" / "model.onnx", tmp_path / "out" / "model.onnx.data"
    model.parent.mkdir()
    data.write_text("mine")
    if beside == "their graph":
        onnx.save(onnx.load(theirs), model, save_as_external_data=True, location=data.name, size_threshold=0)
    elif beside == "our graph, whose data lie elsewhere":
        shutil.copy(quantized_digits / "model.onnx", model)
    elif beside == "no graph":
        model.write_text("mine too")
    before = {path.name: path.read_bytes() for path in model.parent.iterdir()}
    for run in (lambda: export_graph(theirs, model, force=True), lambda: export(quantized_digits, model, force=True)):
        with pytest.raises(OutputExists, match=r"model\.onnx\.data is not the data of a graph that fp4trt wrote"):
            run()
    assert {path.name: path.read_bytes() for path in model.parent.iterdir()} == before


def test_force_replaces_what_an_export_wrote(
    foreign_graph: Maker, normal: Maker, quantized_digits: Path, tmp_path: Path
) -> None:
    graph, model = foreign_graph(BF16), tmp_path / "out" / "model.onnx"
    graph.product(graph.marked(graph.weight("w", normal(32, 64))))
    theirs = graph.save(tmp_path / "theirs.onnx")
    export_graph(theirs, model)
    export_graph(theirs, model, force=True)
    export(quantized_digits, model, force=True)
    export_graph(theirs, model, force=True)
    assert _stored(model)["w"] == _expected(normal(32, 64))[0]


def test_a_weight_that_is_too_small_for_fp4_is_refused_and_zeros_are_not(
    foreign_graph: Maker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def theirs(value: float) -> Path:
        graph = foreign_graph(FP32)
        graph.product(graph.marked(graph.weight("w", np.full((32, 64), value, np.float32))))
        path: Path = graph.save(tmp_path / "theirs.onnx")
        return path

    line = _command(theirs(1e-42), tmp_path / "ours.onnx", capfd)
    assert "weight w is at most 1e-42, too small for FP4" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.onnx"]
    export_graph(theirs(0.0), tmp_path / "ours.onnx")
    assert not any(_stored(tmp_path / "ours.onnx")["w"])


def test_the_command_says_what_it_packed_and_refuses_options_of_checkpoints(
    modelopt_export: Maker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs, _ = modelopt_export("two linears", 17)
    capfd.readouterr()
    assert fp4trt.run(["export", str(theirs), "-o", str(tmp_path / "ours"), "--json"]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["onnx"] == str((tmp_path / "ours" / "model.onnx").resolve())
    assert "raised opset 17 to 23" in printed.err
    assert "packed 2 weights to NVFP4; 2 activation quantizers kept" in printed.err
    assert fp4trt.run(["export", str(theirs), "-o", str(tmp_path / "two"), "--precision", "bf16"]) == 2
    assert fp4trt.run(["export", str(theirs)]) == 2
    assert "--output" in capfd.readouterr().err
