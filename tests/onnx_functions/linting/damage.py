"""Changing one thing in an exported graph, on disk, for the tests of the lint and for its benchmark."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from fp4trt.safetensors_file import tensors_in_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
_NUMPY = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.FLOAT8E4M3FN: np.dtype(np.uint8),
    TensorProto.FLOAT4E2M1: np.dtype(np.uint8),
}
_SAFETENSORS = {TensorProto.FLOAT: "F32", TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT8E4M3FN: "F8_E4M3"}


@dataclass
class Damaged:
    """A copy of an exported graph and its weights in a folder of its own."""

    path: Path
    model: onnx.ModelProto

    @classmethod
    def copy(cls, source: Path, folder: Path) -> Damaged:
        """Copy model.onnx and its safetensors from `source` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
        return cls(folder / "model.onnx", onnx.load(source / "model.onnx", load_external_data=False))

    def save(self) -> Path:
        self.path.write_bytes(self.model.SerializeToString())
        return self.path

    @property
    def weights(self) -> Path:
        return self.path.parent / WEIGHTS

    def node(self, name: str) -> NodeProto:
        return next(node for node in self.model.graph.node if node.name == name)

    def tensor(self, name: str) -> TensorProto:
        return next(tensor for tensor in self.model.graph.initializer if tensor.name == name)

    def set(self, node: str, **attributes: Any) -> None:
        """Set attributes of a node; None removes one."""
        found = self.node(node)
        for name, value in attributes.items():
            kept = [attribute for attribute in found.attribute if attribute.name != name]
            del found.attribute[:]
            found.attribute.extend(kept)
            if value is not None:
                found.attribute.append(helper.make_attribute(name, value))

    def values(self, name: str) -> np.ndarray:
        """Read an initializer's bytes: FP8 and FP4 as uint8."""
        tensor = self.tensor(name)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = self.path.parent / entries["location"]
        raw = np.fromfile(file, np.uint8, int(entries["length"]), offset=int(entries["offset"]))
        return raw.view(_NUMPY[tensor.data_type]).copy()

    def put(self, name: str, values: Any, dims: tuple[int, ...] | None = None, data_type: int | None = None) -> None:
        """Give an initializer other values; make it, inside the model, where there is none.

        Those of a stored one lie in a safetensors file of its own then, as if the checkpoint had been written so.
        """
        names = [tensor.name for tensor in self.model.graph.initializer]
        tensor = self.tensor(name) if name in names else self.model.graph.initializer.add(name=name)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor.data_type = data_type or tensor.data_type
        if dims is not None:
            del tensor.dims[:]
            tensor.dims.extend(dims)
        tensor.raw_data = np.ascontiguousarray(values).tobytes()
        if name in tensors_in_file(self.weights):
            self._store(tensor)

    def _store(self, tensor: TensorProto) -> None:
        data, file = tensor.raw_data, f"{tensor.name}.safetensors"
        kind, shape = _SAFETENSORS.get(tensor.data_type, "U8"), list(tensor.dims)
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            shape[-1] //= 2
        header = json.dumps({tensor.name: {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
        (self.path.parent / file).write_bytes(struct.pack("<Q", len(header)) + header + data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", 8 + len(header)), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))

    def scalar(self, name: str, value: float) -> None:
        self.put(name, np.float32(value), (), TensorProto.FLOAT)

    def entry(self, tensor: str, key: str, value: object) -> None:
        """Set an entry of an initializer's external data."""
        found = next(entry for entry in self.tensor(tensor).external_data if entry.key == key)
        found.value = str(value)

    def exchange_bytes(self, one: str, other: str) -> None:
        """Let two initializers of one length point at each other's bytes."""
        offsets = self.offset(one), self.offset(other)
        self.entry(one, "offset", offsets[1])
        self.entry(other, "offset", offsets[0])

    def exchange_inputs(self, one: str, other: str, index: int) -> None:
        """Let two nodes read each other's input."""
        left, right = self.node(one), self.node(other)
        left.input[index], right.input[index] = right.input[index], left.input[index]

    def offset(self, tensor: str) -> int:
        return int(next(entry.value for entry in self.tensor(tensor).external_data if entry.key == "offset"))

    def between(self, node: str, index: int, op: str, *others: str, **attributes: Any) -> NodeProto:
        """Put a node of its own before one input of a node; return it."""
        reader = self.node(node)
        name = f"{node}/inserted_{index}"
        made = helper.make_node(op, [reader.input[index], *others], [f"{name}_output"], name, **attributes)
        reader.input[index] = f"{name}_output"
        position = next(i for i, found in enumerate(self.model.graph.node) if found.name == node)
        self.model.graph.node.insert(position, made)
        return self.node(name)

    def remove(self, *nodes: str) -> None:
        kept = [node for node in self.model.graph.node if node.name not in nodes]
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)

    def rename(self, old: str, new: str) -> None:
        """Give a graph input, output or initializer another name."""
        for value in (*self.model.graph.input, *self.model.graph.output, *self.model.graph.initializer):
            value.name = new if value.name == old else value.name
        for node in self.model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
            node.output[:] = [new if name == old else name for name in node.output]

    def metadata(self, key: str, value: str | None) -> None:
        """Set an entry of the metadata; None removes it."""
        entries = {entry.key: entry.value for entry in self.model.metadata_props}
        entries.pop(key, None)
        if value is not None:
            entries[key] = value
        del self.model.metadata_props[:]
        helper.set_model_props(self.model, entries)
