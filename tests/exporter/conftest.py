"""Graphs of other origin: ModelOpt's own export, and small ones that store their weights as other exporters do.

And the graph of a small FLUX, of a config alone.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from calibration.checkpoints.quantized import Checkpoint
from exporter.onnx_export import graph_of
from fp4trt.account import Account, StoredForm
from fp4trt.families import family_of

BF16, FP16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT
NUMPY = {BF16: ml_dtypes.bfloat16, FP16: np.float16, FP32: np.float32}


class TwoLinears(nn.Module):
    """A norm and a feed-forward pair, as a transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


class OddAndShared(nn.Module):
    """A weight that two products read, and one with an odd number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.odd = nn.Linear(64, 64), nn.Linear(64, 33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(nn.functional.silu(self.shared(nn.functional.silu(self.shared(x)))))


MODELS = {"two linears": TwoLinears, "odd and shared": OddAndShared}


@pytest.fixture(scope="session")
def modelopt_export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Path, nn.Module]]]:
    """Return a maker of what ModelOpt's TorchScript export gives: (graph with placeholders, quantized torch model).

    ModelOpt's kernel for NVFP4 wants CUDA, so ours stands in for it while the model runs; the graph holds none of it.
    LayerNorm's inputs are not quantized: TensorRT refuses that.
    """
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.export_onnx import configure_linear_module_onnx_quantizers

    from calibration.formats import nvfp4
    from calibration.formats.modelopt_backend import mtq

    def fake_quantize(x: torch.Tensor, block_size: int, amax: torch.Tensor, *_: object) -> torch.Tensor:
        return nvfp4.fake_quantize(x, nvfp4.global_scale(amax.float()))

    def make(model: str, opset: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, nn.Module]:
        torch.manual_seed(0)
        x = torch.randn(2, 8, 64, dtype=dtype)
        settings = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
        settings["quant_cfg"].append({"quantizer_name": "*norm*", "enable": False})
        net = mtq.quantize(MODELS[model]().to(dtype).eval(), settings, lambda m: m(x))
        path = tmp_path_factory.mktemp("modelopt") / "theirs.onnx"
        with torch.inference_mode(), configure_linear_module_onnx_quantizers(net), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net,
                (x,),
                path,
                input_names=["x"],
                output_names=["y"],
                opset_version=opset,
                dynamo=False,
                dynamic_axes={"x": {0: "B", 1: "L"}},
            )
        return path, net

    patch = pytest.MonkeyPatch()
    patch.setattr(tensor_quant, "dynamic_block_quantize_op", fake_quantize)
    yield make
    patch.undo()


class ForeignGraph:
    """One product ``x [B, 64] @ W^T`` of a weight that is marked for FP4, written node by node."""

    def __init__(self, dtype: int = BF16) -> None:
        self.dtype, self.numpy = dtype, NUMPY[dtype]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", dtype, ["B", 64])]
        self.outputs: list[onnx.ValueInfoProto] = []

    def tensor(self, name: str, array: np.ndarray, dtype: int | None = None) -> onnx.TensorProto:
        kind = dtype or self.dtype
        return helper.make_tensor(name, kind, array.shape, array.astype(NUMPY[kind]).tobytes(), raw=True)

    def weight(self, name: str, array: np.ndarray, dtype: int | None = None) -> str:
        self.initializers.append(self.tensor(name, array, dtype))
        return name

    def node(self, op: str, *inputs: str, out: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"node of {out}", domain=domain, **attributes))
        return out

    def marked(self, weight: str, block_size: int = 16) -> str:
        return self.node("TRT_FP4QDQ", weight, out=f"{weight}_marked", domain="trt", block_size=block_size)

    def product(self, weight: str, out: str = "y", columns: int = 32) -> str:
        turned = self.node("Transpose", weight, out=f"{out}_turned", perm=[1, 0])
        self.outputs.append(helper.make_tensor_value_info(out, self.dtype, ["B", columns]))
        return self.node("MatMul", "x", turned, out=out)

    def save(self, path: Path, opset: int = 20, external: bool = False) -> Path:
        graph = helper.make_graph(self.nodes, "theirs", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="theirs")
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"location": "theirs.bin", "size_threshold": 0, "convert_attribute": True}
        onnx.save(model, path, save_as_external_data=external, **(options if external else {}))
        return path


@pytest.fixture
def foreign_graph() -> Callable[..., ForeignGraph]:
    return ForeignGraph


@pytest.fixture
def normal() -> Callable[..., np.ndarray]:
    """Return seeded normal FP32 values that BF16 and FP16 hold exactly."""

    def make(*shape: int, seed: int = 0) -> np.ndarray:
        values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        return values.astype(ml_dtypes.bfloat16).astype(np.float32).astype(np.float16).astype(np.float32)

    return make


FLUX_CONFIG: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 5,
    "num_single_layers": 6, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip


def _traced_graph(
    keep: Callable[[str], bool], fp8: Callable[[str], bool] = lambda path: False, **changes: int
) -> onnx.ModelProto:
    """Return the graph of a model whose checkpoint has the linears in FP4 that ``keep`` says, and some in FP8.

    Attentions are in FP8 where either says so.
    """
    config = {**FLUX_CONFIG, **changes}
    family = family_of(config)
    formats = {path: "nvfp4" if keep(path) else "fp8" if fp8(path) else "16-bit" for path in family.quantized(config)}
    attentions = {path: {} for path in family.attentions(config) if keep(path) or fp8(path)}
    forms = {path: StoredForm(kind, family.linears(config)[path], 0, False) for path, kind in formats.items()}
    checkpoint = Checkpoint(Path(), config, {}, {}, Account(family, config, (), (), forms, attentions, {}))
    groups = (*checkpoint.groups, *checkpoint.groups_of(checkpoint.fp8))
    leaders = {path: group[0] for group in groups for path in group}
    model = graph_of(checkpoint, leaders, "float32", lambda hundredths: None)
    for value in model.graph.initializers.values():
        if "." in str(value.name):  # weights on the meta device
            value.const_value = None
    logging.getLogger("onnx_ir.serde").setLevel(logging.ERROR)
    return ir.to_proto(model)


@pytest.fixture(scope="session")
def traced_graph() -> Callable[..., onnx.ModelProto]:
    """Give the graph of a small FLUX whose config has some changes; what is in FP4 and FP8 in it is told by path."""
    return _traced_graph
