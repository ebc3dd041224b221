"""Builders of the smallest double-dequantize graphs that show one behaviour of the engine builder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

WIDTH = 128
WEIGHTS_FILE = "weights.bin"
SYMBOLS = {
    "B": {"kind": "batch", "min": 1, "max": 4, "default": 1},
    "L": {
        "kind": "image_tokens",
        "pixels_per_token": 16,
        "min_resolution": 256,
        "max_resolution": 1360,
        "default_resolution": 1024,
    },
}
GraphWriter = Callable[..., Path]


class DoubleDequantizeGraph:
    """A BF16 graph over [B, L, WIDTH] whose NVFP4 weights lie in one external file."""

    def __init__(self, seed: int, scale_dtype: str) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.data = bytearray()
        self.scale_dtype = scale_dtype

    def initializer(self, name: str, data_type: int, shape: Sequence[int], raw: bytes) -> str:
        tensor = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", len(self.data)), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
        self.data += raw
        self.initializers.append(tensor)
        return name

    def scalar(self, name: str, value: float) -> str:
        return self.initializer(name, TensorProto.FLOAT, [], np.float32(value).tobytes())

    def node(self, name: str, op: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> str:
        domain = "trt" if op.startswith("TRT_") else ""
        results = outputs or [f"{name}_out"]
        self.nodes.append(helper.make_node(op, inputs, results, name=name, domain=domain, **attributes))
        return results[0]

    def quantized_activation(self, path: str, source: str) -> str:
        scale = self.scalar(f"{path}.input_scale", 0.002)
        codes, blocks = f"{path}/input_codes", f"{path}/input_block_scales"
        self.node(
            f"{path}/TRT_FP4DynamicQuantize",
            "TRT_FP4DynamicQuantize",
            [source, scale],
            [codes, blocks],
            axis=-1,
            block_size=16,
            scale_type=TensorProto.FLOAT8E4M3FN,
        )
        return self.dequantize(f"{path}/input_scale", f"{path}/input", codes, blocks, scale)

    def dequantize(self, scale_path: str, path: str, codes: str, blocks: str, global_scale: str) -> str:
        """Both DequantizeLinears, to BF16 at the end (float32) or all through (bfloat16)."""
        dtype = {} if self.scale_dtype == "float32" else {"output_dtype": int(TensorProto.BFLOAT16)}
        wide = self.node(f"{scale_path}/DequantizeLinear", "DequantizeLinear", [blocks, global_scale], **dtype)
        full = self.node(f"{path}/DequantizeLinear", "DequantizeLinear", [codes, wide], axis=-1, block_size=16, **dtype)
        return full if dtype else self.node(f"{path}/Cast", "Cast", [full], to=TensorProto.BFLOAT16)

    def linear(self, path: str, source: str, global_scale: str) -> str:
        codes = self.random.integers(0, 256, WIDTH * WIDTH // 2, dtype=np.uint8).tobytes()
        blocks = self.random.integers(0x30, 0x60, WIDTH * WIDTH // 16, dtype=np.uint8).tobytes()
        weight = self.initializer(f"{path}.weight", TensorProto.FLOAT4E2M1, [WIDTH, WIDTH], codes)
        scale = self.initializer(f"{path}.weight_scale", TensorProto.FLOAT8E4M3FN, [WIDTH, WIDTH // 16], blocks)
        full = self.dequantize(f"{path}/weight_scale", f"{path}/weight", weight, scale, global_scale)
        return self.product(path, source, full)

    def product(self, path: str, source: str, weight: str) -> str:
        turned = self.node(f"{path}/weight/Transpose", "Transpose", [weight], perm=[1, 0])
        product = self.node(f"{path}/MatMul", "MatMul", [source, turned])
        bias = self.initializer(f"{path}.bias", TensorProto.BFLOAT16, [WIDTH], bytes(2 * WIDTH))
        return self.node(f"{path}/Add", "Add", [product, bias])

    def plain_linear(self, path: str, source: str) -> str:
        raw = (self.random.standard_normal((WIDTH, WIDTH)).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        weight = self.initializer(f"{path}.weight", TensorProto.BFLOAT16, [WIDTH, WIDTH], raw)
        return self.product(path, source, weight)

    def save(self, path: Path, output: str, metadata: dict[str, Any] | None) -> Path:
        shape = ["B", "L", WIDTH]
        self.node("latent", "Identity", [output], ["latent"])
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("hidden_states", TensorProto.BFLOAT16, shape)],
            [helper.make_tensor_value_info("latent", TensorProto.BFLOAT16, shape)],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        if metadata is not None:
            helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / WEIGHTS_FILE).write_bytes(self.data)
        onnx.save(model, path)
        return path


def write_attention_graph(
    directory: Path,
    *,
    merged: bool = True,
    unquantized_input: bool = False,
    metadata: bool = True,
    scale_dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write q, k, v, out (NVFP4) and head (BF16).

    `merged` shares one weight global scale in q/k/v; `unquantized_input` leaves out the activation
    quantizer of to_out, which makes the builder lose FP4 there without a word.
    """
    graph = DoubleDequantizeGraph(seed, scale_dtype)
    shared = graph.quantized_activation("block.to_q", "hidden_states")
    q, k, v = (
        graph.linear(path, shared, graph.scalar(f"{path}.weight_scale_2", 1e-4 if merged else 1e-4 * (index + 1)))
        if index == 0 or not merged
        else graph.linear(path, shared, "block.to_q.weight_scale_2")
        for index, path in enumerate(("block.to_q", "block.to_k", "block.to_v"))
    )
    mixed = graph.node("block/Add", "Add", [graph.node("block/Mul", "Mul", [q, k]), v])
    mixed = graph.node("block/Tanh", "Tanh", [mixed])
    out_input = mixed if unquantized_input else graph.quantized_activation("block.to_out", mixed)
    out = graph.linear("block.to_out", out_input, graph.scalar("block.to_out.weight_scale_2", 1e-4))
    latent = graph.plain_linear("head", out)
    linears = ["block.to_q", "block.to_k", "block.to_v", "block.to_out"]
    properties = {
        "fp4trt.family": "test",
        "fp4trt.recipe": "nvfp4-ptq",
        "fp4trt.scale_dtype": scale_dtype,
        "fp4trt.linears": {"nvfp4": linears, "bf16": ["head"]},
        "fp4trt.groups": [linears[:3]] if merged else [],
        "fp4trt.symbols": SYMBOLS,
    }
    return graph.save(directory / "model.onnx", latent, properties if metadata else None)


@pytest.fixture
def attention_graph(tmp_path: Path) -> GraphWriter:
    """A function that writes the attention graph under tmp_path and returns the path of its model.onnx."""

    def write(name: str = "checkpoint", **options: Any) -> Path:
        return write_attention_graph(tmp_path / name, **options)

    return write


@pytest.fixture(scope="session")
def attention_engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The attention graph, and an engine of it in another folder; not to be changed."""
    pytest.importorskip("tensorrt_rtx")
    from trt_build import build

    graph = write_attention_graph(tmp_path_factory.mktemp("graph"))
    engine = tmp_path_factory.mktemp("engine") / "rtx5090.engine"
    build(graph, output=engine, resolution=512, batch="1:1:2")
    return graph, engine


@pytest.fixture
def double_dequantize() -> type[DoubleDequantizeGraph]:
    """What a test writes a graph of its own with."""
    return DoubleDequantizeGraph


@pytest.fixture(scope="session")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The attention graph, which ONNX Runtime and stand-ins compute; not to be changed."""
    return write_attention_graph(tmp_path_factory.mktemp("small"))


@pytest.fixture
def opens(small_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what opens an engine of that graph on a stand-in, and gives the session and the stand-in of TensorRT."""
    from tests.trt_build.stand_in_card import HostCard
    from tests.trt_build.stand_in_tensorrt import PROFILES, StandIn, write_engine
    from trt_build.runtime import engine as engines
    from trt_build.session import open_session

    monkeypatch.setenv("FP4TRT_CACHE", str(tmp_path / "cache"))

    def opened(
        path: Path | None = None,
        card: Any = None,
        profiles: Any = PROFILES,
        generation: str = "tensorrt_rtx",
        of: Path = small_graph,
        change: Callable[[Any], None] = lambda _: None,
        streamable: int = 0,
        **options: Any,
    ) -> tuple[Any, Any]:
        card = card or HostCard()
        module = StandIn(of, profiles, card, generation, streamable)
        change(module)
        monkeypatch.setattr(engines, "open_card", lambda _: card)
        monkeypatch.setattr(engines, "backend_of", lambda _: module)
        return open_session(path or write_engine(tmp_path / "x.engine"), **options), module

    return opened
