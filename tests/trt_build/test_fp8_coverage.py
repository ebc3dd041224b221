"""FP8 GEMMs counted as promised, and every way to lose one without a word from the builder, with the reason given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

import trt_build
from calibration.checkpoints.quantized import WEIGHTS, read
from calibration.quantization import Quantized, quantize
from exporter.onnx_export import export, group_leaders
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.errors import CoverageError, UnsupportedFormatError
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from onnx_functions.linting import lint
from onnx_functions.validation.run_gates import validate
from trt_build import builder
from trt_build.coverage import SixteenBit, measure_coverage, require_coverage
from trt_build.graph import read_graph
from trt_build.layer_info import Layer

pytest.importorskip("tensorrt_rtx")

WIDTH, RANDOM = 128, np.random.default_rng(0)


class FP8Graph:
    """Two linears, `up` and `down`, over x [B, L, 128]."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.metadata = {"fp4trt.linears": '{"fp8": ["up", "down"]}'}

    def store(self, name: str, values: Any, dtype: Any, kind: int) -> str:
        array = np.asarray(values, np.float32).astype(dtype)
        self.initializers.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
        return name

    def node(self, name: str, op: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}:y"], name, **attributes))
        return f"{name}:y"

    def linear(self, path: str, x: str) -> str:
        weight = self.store(
            f"{path}.weight",
            RANDOM.standard_normal((WIDTH, WIDTH)),
            ml_dtypes.float8_e4m3fn,
            TensorProto.FLOAT8E4M3FN,
        )
        scales = [self.store(f"{path}.{kind}", 0.01, np.float32, TensorProto.FLOAT) for kind in ("ws", "xs")]
        codes = self.node(
            f"{path}/input/QuantizeLinear", "QuantizeLinear", x, scales[1], output_dtype=int(TensorProto.FLOAT8E4M3FN)
        )
        kind = int(TensorProto.BFLOAT16)
        read = self.node(f"{path}/input/DequantizeLinear", "DequantizeLinear", codes, scales[1], output_dtype=kind)
        wide = self.node(f"{path}/weight/DequantizeLinear", "DequantizeLinear", weight, scales[0], output_dtype=kind)
        turned = self.node(f"{path}/Transpose", "Transpose", wide, perm=[1, 0])
        return self.node(f"{path}/MatMul", "MatMul", read, turned)

    def find(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.nodes if node.name == name)

    def save(self, path: Path) -> Path:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [value("x", TensorProto.BFLOAT16, ["B", "L", WIDTH])],
            [value(self.nodes[-1].output[0], TensorProto.BFLOAT16, ["B", "L", WIDTH])],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
        helper.set_model_props(model, self.metadata)
        onnx.save(model, path)
        return path


@pytest.fixture
def graph() -> FP8Graph:
    made = FP8Graph()
    hidden = made.node("act", "Gelu", made.linear("up", "x"), approximate="tanh")
    made.linear("down", hidden)
    return made


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[FP8Graph], dict[str, Any]]:
    """Return what builds a graph that the lint is not asked about."""
    monkeypatch.setattr(builder, "lint_notes", lambda *_, **__: iter(()))

    def build(graph: FP8Graph, gpu: str = "rtx5090") -> dict[str, Any]:
        shapes = ["x=1x16x128:1x64x128:2x128x128"]
        return trt_build.build(graph.save(tmp_path / "model.onnx"), gpu=gpu, shapes=shapes, allow_slow=True)

    return build


def leave_the_activation_in_16_bit(graph: FP8Graph) -> None:
    graph.find("up/MatMul").input[0] = "x"


def scale_the_weight_along_the_sum(graph: FP8Graph) -> None:
    scales = numpy_helper.from_array(np.linspace(0.01, 0.02, WIDTH, dtype=np.float32), "wide")
    graph.initializers.append(scales)
    graph.find("up/weight/DequantizeLinear").input[1] = "wide"


def multiply_the_weight_by_a_vector(graph: FP8Graph) -> None:
    factors = graph.store("factors", np.linspace(0.5, 1, WIDTH), ml_dtypes.bfloat16, TensorProto.BFLOAT16)
    turned = graph.find("up/Transpose")
    at = graph.nodes.index(turned)
    graph.nodes.insert(at, helper.make_node("Mul", [turned.input[0], factors], ["scaled"], "smooth"))
    turned.input[0] = "scaled"


def store_the_weight_in_16_bit(graph: FP8Graph) -> None:
    graph.store("sixteen", np.ones((WIDTH, WIDTH)), ml_dtypes.bfloat16, TensorProto.BFLOAT16)
    graph.find("up/Transpose").input[0] = "sixteen"


def test_each_promised_linear_that_gets_an_fp8_gemm_is_counted(
    graph: FP8Graph, built: Callable[..., dict[str, Any]]
) -> None:
    result = built(graph)
    assert (result["fp8_gemms"], result["fp8_linears"], result["quantized_linears"]) == (2, 2, 2)
    assert (result["fp4_gemms"], result["fp4_linears"], result["lost"]) == (0, 0, [])
    assert {gemm["format"] for gemm in result["gemms"]} == {"fp8"}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (leave_the_activation_in_16_bit, "its input comes from 'x', not from a QuantizeLinear"),
        (scale_the_weight_along_the_sum, "the builder chose another kernel"),
        (multiply_the_weight_by_a_vector, "Mul 'smooth' stands between its weight and the product"),
        (store_the_weight_in_16_bit, "its weight is not stored in FP8"),
    ],
)
def test_a_lost_fp8_gemm_is_found_and_the_reason_given(
    graph: FP8Graph,
    built: Callable[..., dict[str, Any]],
    spoil: Callable[[FP8Graph], None],
    reason: str,
) -> None:
    spoil(graph)
    result = built(graph)
    assert result["fp8_linears"] == 1
    (lost,) = result["lost"]
    assert (lost["linear"], lost["promised"], lost["reason"]) == ("up", "fp8", reason)
    with pytest.raises(CoverageError, match=r"^1 of 2 linears promised in FP8 would run in 16 bit: up \("):
        require_coverage([SixteenBit(**lost)], result["quantized_linears"])


def test_without_a_promise_fp8_weights_count_only_where_their_activation_is_quantized(
    graph: FP8Graph, built: Callable[..., dict[str, Any]]
) -> None:
    graph.metadata = {}
    leave_the_activation_in_16_bit(graph)
    result = built(graph)
    assert (result["fp8_linears"], result["quantized_linears"], result["lost"]) == (1, 1, [])
    (kept,) = result["sixteen_bit"]
    assert (kept["linear"], kept["reason"]) == ("up", "weight-only: FP8 weight, input not quantized")


def test_a_gpu_without_fp8_is_refused_and_an_ada_one_is_not(
    graph: FP8Graph, built: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"the graph is FP8, which rtx3090 \(SM86\) cannot compute"):
        built(graph, gpu="rtx3090")
    assert built(graph, gpu="rtx4090")["fp8_linears"] == 2


@pytest.fixture
def flux_in_fp8(tiny_flux: Callable[..., Path], tmp_path: Path) -> Quantized:
    """A tiny FLUX, in whose groups the weights are unlike in size, rounded to FP8."""
    source = tiny_flux(tmp_path / "flux")
    tensors, config = load_file(source / WEIGHTS), load_json(source / "config.json")
    paths = family_of(config).quantized(config)
    for index, path in enumerate(paths):
        tensors[f"{path}.weight"] *= 1 + index % 4 / 4
    save_file(tensors, source / WEIGHTS)
    (tmp_path / "amax.json").write_text(json.dumps(dict.fromkeys(paths, 4.0)), encoding="utf-8")
    return quantize(source, tmp_path / "fp8", recipe="fp8-ptq", calibration=tmp_path / "amax.json")


@pytest.mark.slow
def test_linears_of_one_input_are_one_gemm_on_sm89_whose_weight_scale_they_share(flux_in_fp8: Quantized) -> None:
    folder = Path(flux_in_fp8.checkpoint)
    export(folder)
    result = trt_build.build(folder, gpu="rtx4090", resolution=256, text=32, batch=1)
    checkpoint, merged = read(folder), {frozenset(gemm["linears"]) for gemm in result["gemms"]}
    groups = [group for group in checkpoint.groups_of(checkpoint.fp8) if len(group) > 1]
    assert [len(group) for group in groups] == [3, 3, 4]
    assert merged.issuperset(map(frozenset, groups))
    assert result["lost"] == []
    for group in groups:
        assert len({float(checkpoint.raw(f"{path}.weight_scale")) for path in group}) == 1


def test_weights_in_fp8_with_scales_of_their_own_are_read_exported_and_validated_as_before(
    flux_in_fp8: Quantized,
) -> None:
    """As earlier versions, and ModelOpt's states, have them."""
    cost, folder = flux_in_fp8.sharing_cost, Path(flux_in_fp8.checkpoint)
    assert (flux_in_fp8.groups, flux_in_fp8.fp8_linears) == (13, 20)
    assert cost is not None
    assert 0.02 < cost["weight_own"] != cost["weight_shared"] < 0.03
    leaders, tensors = group_leaders(read(folder)), load_file(folder / WEIGHTS)
    tensors["transformer_blocks.0.attn.to_k.weight_scale"] *= 2
    save_file(tensors, folder / WEIGHTS)
    (folder / MANIFEST).unlink()  # whose hashes are of other files
    assert group_leaders(read(folder)) == leaders
    assert leaders["transformer_blocks.0.attn.to_k"] == "transformer_blocks.0.attn.to_q"
    export(folder)
    assert lint(folder).findings == ()
    report = validate(folder)
    assert report.passed, [gate.line for gate in report.failures]


def test_a_linear_promised_in_fp8_that_runs_in_fp4_is_lost_too(graph: FP8Graph, tmp_path: Path) -> None:
    other = Layer("k", "gemm", ("FP4E2M1",), ("FP4E2M1",), ("BFloat16",), ("up/MatMul", "down/MatMul"))
    found = measure_coverage(read_graph(graph.save(tmp_path / "model.onnx")), [other])
    assert [item.linear for item in found.lost] == ["up", "down"]
