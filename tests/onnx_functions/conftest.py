"""The smallest deployable graph: three FP4 linears, two of them one group, on a .safetensors of its own."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.formats import nvfp4
from onnx_functions.graph.cut import cut
from onnx_functions.graph.linears import Graph
from onnx_functions.simulation.simulate import runtime_session, simulate
from tests.onnx_functions.linting.damage import Damaged

GROUPS = (("first", "second"), ("third",))
WIDTH = 32
OUTPUTS = 16


@dataclass(frozen=True)
class SmallGraph:
    """A model on disk, and the values that its linears were made of."""

    path: Path
    scale_dtype: str
    weights: dict[str, np.ndarray]
    global_scales: dict[str, np.float32]
    input_scales: dict[str, np.float32]
    biases: dict[str, np.ndarray]


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round FP32 to BF16 values, held as FP32."""
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> dict[str, tuple[int, int]]:
    """Write tensors as (dtype name, bytes array); return (offset, length) of each."""
    header, position = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for _, a in tensors.values()))
    start = 8 + len(text)
    return {name: (start + header[name]["data_offsets"][0], array.nbytes) for name, (_, array) in tensors.items()}


def external(name: str, data_type: int, shape: tuple[int, ...], file: str, span: tuple[int, int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", str(span[0])), ("length", str(span[1]))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _chain(source: str, path: str, codes: str, scales: str, scale: str, bf16: bool) -> list[onnx.NodeProto]:
    kind = {"output_dtype": TensorProto.BFLOAT16} if bf16 else {}
    scale_node = f"{path}/{source}_scale/DequantizeLinear"
    node = f"{path}/{source}/DequantizeLinear"
    nodes = [
        helper.make_node("DequantizeLinear", [scales, scale], [f"{scale_node}:y"], scale_node, **kind),
        helper.make_node(
            "DequantizeLinear", [codes, f"{scale_node}:y"], [f"{node}:y"], node, axis=-1, block_size=16, **kind
        ),
    ]
    if not bf16:
        cast = f"{path}/{source}/Cast"
        nodes.append(helper.make_node("Cast", [f"{node}:y"], [f"{cast}:y"], cast, to=TensorProto.BFLOAT16))
    return nodes


def _group(group: tuple[str, ...], x: str, bf16: bool) -> list[onnx.NodeProto]:
    head = group[0]
    nodes = [
        helper.make_node(
            "TRT_FP4DynamicQuantize",
            [x, f"{head}.input_scale"],
            [f"{head}/input_codes", f"{head}/input_block_scales"],
            f"{head}/TRT_FP4DynamicQuantize",
            domain="trt",
            axis=-1,
            block_size=16,
            scale_type=17,
        )
    ]
    nodes += _chain("input", head, f"{head}/input_codes", f"{head}/input_block_scales", f"{head}.input_scale", bf16)
    activation = nodes[-1].output[0]
    for path in group:
        nodes += _chain("weight", path, f"{path}.weight", f"{path}.weight_scale", f"{head}.weight_scale_2", bf16)
        weight = nodes[-1].output[0]
        nodes += [
            helper.make_node("Transpose", [weight], [f"{path}/weight_t"], f"{path}/weight/Transpose", perm=[1, 0]),
            helper.make_node("MatMul", [activation, f"{path}/weight_t"], [f"{path}/product"], f"{path}/MatMul"),
            helper.make_node("Add", [f"{path}/product", f"{path}.bias"], [f"{path}/output"], f"{path}/Add"),
        ]
    return nodes


def make_small_graph(directory: Path, scale_dtype: str) -> SmallGraph:
    """Write `small.onnx` and its data: output = third(concat(first(x), second(x)))."""
    rng = np.random.default_rng(7)
    paths = [path for group in GROUPS for path in group]
    global_scales, input_scales, weights, biases, stored = {}, {}, {}, {}, {}
    for group in GROUPS:
        raw = {path: rng.standard_normal((OUTPUTS, WIDTH)).astype(np.float32) for path in group}
        g = np.float32(max(np.abs(w).max() for w in raw.values()) / (6 * 448))
        for path, w in raw.items():
            codes, scales = nvfp4.quantize_reference(w, g)
            stored[f"{path}.weight"] = ("U8", (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))
            stored[f"{path}.weight_scale"] = ("F8_E4M3", scales)
            weights[path] = nvfp4.dequantize_reference(codes, scales, g)
            global_scales[path], input_scales[path] = g, np.float32(4 / (6 * 448))
            stored[f"{path}.weight_scale_2"] = ("F32", np.array(g))
            stored[f"{path}.input_scale"] = ("F32", np.array(input_scales[path]))
            biases[path] = bfloat16(rng.standard_normal(OUTPUTS))
            stored[f"{path}.bias"] = ("BF16", biases[path].astype(ml_dtypes.bfloat16).view(np.uint16))
    spans = write_safetensors(directory / "small.safetensors", stored)
    nodes = _group(GROUPS[0], "x", scale_dtype == "bfloat16")
    nodes.append(helper.make_node("Concat", ["first/output", "second/output"], ["joined"], "concat", axis=-1))
    nodes += _group(GROUPS[1], "joined", scale_dtype == "bfloat16")
    read = {name for node in nodes for name in node.input}
    onnx_types = {"U8": 23, "F8_E4M3": 17, "F32": 1, "BF16": 16}
    initializers = [
        external(name, onnx_types[dtype], _logical(dtype, array), "small.safetensors", spans[name])
        for name, (dtype, array) in stored.items()
        if name in read
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["B", WIDTH])],
        [helper.make_tensor_value_info("third/output", TensorProto.BFLOAT16, ["B", OUTPUTS])],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)], ir_version=11
    )
    helper.set_model_props(
        model,
        {
            "fp4trt.scale_dtype": scale_dtype,
            "fp4trt.linears": json.dumps({"nvfp4": paths, "bf16": []}),
            "fp4trt.groups": json.dumps(GROUPS),
        },
    )
    onnx.save(model, directory / "small.onnx")
    return SmallGraph(directory / "small.onnx", scale_dtype, weights, global_scales, input_scales, biases)


def _logical(dtype: str, array: np.ndarray) -> tuple[int, ...]:
    return (*array.shape[:-1], array.shape[-1] * 2) if dtype == "U8" else array.shape


@pytest.fixture(params=["float32", "bfloat16"])
def small_graph(request: pytest.FixtureRequest, tmp_path: Path) -> SmallGraph:
    return make_small_graph(tmp_path, request.param)


@pytest.fixture
def copied_model(quantized_digits: Path, tmp_path: Path) -> Path:
    """A copy of the built-in model's graph and data with no checkpoint around it, for a test to damage."""
    for name in ("model.onnx", "diffusion_pytorch_model.safetensors"):
        shutil.copyfile(quantized_digits / name, tmp_path / name)
    return tmp_path / "model.onnx"


@dataclass(frozen=True)
class Mutant:
    """Ways to damage a deployable model on disk; each changes one thing."""

    path: Path

    def flip_code(self, tensor: str, byte: int) -> None:
        """Change one E2M1 code by its lowest bit."""
        self._change_bytes(tensor, lambda data: _flipped(data, byte))

    def swap_nibbles(self, tensor: str) -> None:
        self._change_bytes(tensor, lambda data: (data >> 4) | (data << 4))

    def scale(self, tensor: str, factor: float) -> None:
        self._change_bytes(tensor, lambda data: (data.view(np.float32) * np.float32(factor)).view(np.uint8))

    def exchange_pointers(self, one: str, other: str) -> None:
        """Let two initializers point to each other's bytes."""
        model = self._load()
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        spans = [list(tensors[name].external_data) for name in (one, other)]
        for name, span in zip((other, one), spans, strict=True):
            copies = [onnx.StringStringEntryProto(key=entry.key, value=entry.value) for entry in span]
            del tensors[name].external_data[:]
            tensors[name].external_data.extend(copies)
        onnx.save(model, self.path)

    def exchange_wires(self, one: str, other: str) -> None:
        """Let two linears dequantize each other's weight."""
        model = self._load()
        nodes = {node.name: node for node in model.graph.node}
        for kind in ("weight", "weight_scale"):
            left, right = (nodes[f"{path}/{kind}/DequantizeLinear"] for path in (one, other))
            left.input[0], right.input[0] = right.input[0], left.input[0]
        onnx.save(model, self.path)

    def shift(self, tensor: str, count: int) -> None:
        """Move an initializer's offset by some bytes."""
        model = self._load()
        found = next(entry for entry in model.graph.initializer if entry.name == tensor)
        offset = next(entry for entry in found.external_data if entry.key == "offset")
        offset.value = str(int(offset.value) + count)
        onnx.save(model, self.path)

    def negate(self, tensor: str) -> None:
        """Put a Neg behind the node that makes a tensor."""
        model = self._load()
        index, node = next((i, node) for i, node in enumerate(model.graph.node) if tensor in node.output)
        node.output[list(node.output).index(tensor)] = "before_negation"
        model.graph.node.insert(index + 1, helper.make_node("Neg", ["before_negation"], [tensor], "negation"))
        onnx.save(model, self.path)

    def rewire(self, name: str, place: int, tensor: str) -> None:
        """Let a node read another tensor."""
        model = self._load()
        next(node for node in model.graph.node if node.name == name).input[place] = tensor
        onnx.save(model, self.path)

    def bake(self, tensor: str, feeds: dict[str, np.ndarray], as_node: bool) -> None:
        """Replace what computes a tensor by its value for some inputs."""
        model = self._load()
        piece = simulate(cut(model, {value.name: value.name for value in model.graph.input}, [tensor]))
        value = runtime_session(piece, self.path.parent).run(None, feeds)[0].astype(ml_dtypes.bfloat16)
        baked = numpy_helper.from_array(value, "baked")
        index, node = next((i, node) for i, node in enumerate(model.graph.node) if tensor in node.output)
        if as_node:
            node.CopyFrom(helper.make_node("Constant", [], [tensor], node.name, value=baked))
        else:
            model.graph.initializer.append(baked)
            for reader in model.graph.node:
                reader.input[:] = ["baked" if name == tensor else name for name in reader.input]
            del model.graph.node[index]
        onnx.save(model, self.path)

    def bypass_quantizers(self, linears: dict[str, list[str]] | None = None) -> None:
        """Let every product read its activation unquantized; promise `linears` instead where they are given."""
        model = self._load()
        graph = Graph(model)
        sources = {linear.matmul: linear.input for linear in graph.linears() if linear.quantizer}
        for node in model.graph.node:
            node.input[0:1] = [sources.get(node.name, name) for name in node.input[0:1]]
        onnx.save(model, self.path)
        if linears is not None:
            self.describe("fp4trt.linears", json.dumps(linears))

    def describe(self, key: str, text: str) -> None:
        """Set an entry of the metadata."""
        model = self._load()
        next(entry for entry in model.metadata_props if entry.key == key).value = text
        onnx.save(model, self.path)

    def _load(self) -> onnx.ModelProto:
        return onnx.load(self.path, load_external_data=False)

    def _change_bytes(self, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        found = next(entry for entry in self._load().graph.initializer if entry.name == tensor)
        entries = {entry.key: entry.value for entry in found.external_data}
        offset, length = int(entries["offset"]), int(entries["length"])
        with (self.path.parent / entries["location"]).open("r+b") as file:
            file.seek(offset)
            data = np.frombuffer(file.read(length), np.uint8)
            file.seek(offset)
            file.write(change(data).tobytes())


def _flipped(data: np.ndarray, byte: int) -> np.ndarray:
    copy = data.copy()
    copy[byte] ^= 1
    return copy


@pytest.fixture
def mutant(copied_model: Path) -> Mutant:
    return Mutant(copied_model)


@pytest.fixture
def flux2_mutant(flux2_in_mxfp8: Path, tmp_path: Path) -> Mutant:
    """A copy of a tiny FLUX.2's graph, with its checkpoint, for a test to damage."""
    return Mutant(Path(shutil.copytree(flux2_in_mxfp8, tmp_path / "flux2")) / "model.onnx")


@pytest.fixture
def damaged(quantized_digits: Path, tmp_path: Path) -> Damaged:
    return Damaged.copy(quantized_digits, tmp_path / "model")
