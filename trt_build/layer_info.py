"""The engine's layers, read from the verbose build log: with no GPU, an engine cannot be loaded and asked.

Of an engine that is loaded TensorRT's inspector tells them as JSON, in another schema since TensorRT 11
(:func:`layers_in_json`).


With DETAILED profiling verbosity the builder logs one message "Layers:" with a line per kernel:
    Name: block.to_q/MatMul_myl0_3, LayerType: gemm, Inputs: [ { Name: ..., Datatype: FP4E2M1, ... }, ... ],
    Constants: [ ... ], Outputs: [ ... ], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer: X/MatMul]...
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

from fp4trt.number_formats import FORMATS, NVFP4

__all__ = ["Gemm", "Layer", "find_gemms", "is_layer_message", "layers_in_json", "layers_of_profiles", "parse_layers"]

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], "
    r"Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], "
    r"TacticName: .*, Metadata:(?P<metadata>.*)$"
)
_DATA_TYPE = re.compile(r"Datatype: (\w+)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_FORMATS = {kind.engine: name for name, kind in FORMATS.items()}
"""TensorRT's data types of which both operands of a product may be."""
_PRODUCT_KINDS = ("gemm", "runtime_fusion")
_TYPE_KEYS: Final = ("Format/Datatype", "Datatype", "DataType")
"""Where the inspector's JSON has the type of a tensor: before TensorRT 11 in one text with the format."""
_TYPE_NAMES: Final = {
    **{kind.engine: kind.engine for kind in FORMATS.values()},
    "FP4": "FP4E2M1",
    **dict.fromkeys(("BFloat16", "BF16"), "BFloat16"),
    **dict.fromkeys(("Half", "FP16"), "Half"),
    **dict.fromkeys(("Float", "FP32"), "Float"),
}
"""A word of that text to the type as the build log has it."""


@dataclass(frozen=True)
class Layer:
    """One kernel: data types as TensorRT writes them, and the names of the ONNX nodes that it serves."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]

    @property
    def gemm_format(self) -> str | None:
        """The number format that both operands are in; None for any other kernel.

        One with such a type only among its constants unpacks weights to 16 bit; so does a fused kernel with both
        operands in FP8 (measured with scales along the sum), which is why in FP8 only a plain GEMM counts.
        """
        for kind, name in _FORMATS.items():
            if kind in self.inputs and (kind in self.constants or self.inputs.count(kind) > 1):
                return name if name == NVFP4.name or self.kind == "gemm" else None
        return None


@dataclass(frozen=True)
class Gemm:
    """A kernel that computes linears: `format` is that of its operands, or TensorRT's name of the activation's type."""

    kernel: str
    format: str
    linears: tuple[str, ...]


def is_layer_message(message: str) -> bool:
    """Whether a message of the build log is the layer information."""
    return message.startswith(("Layers:", "Engine Layer Information:"))


def parse_layers(message: str) -> tuple[Layer, ...]:
    """Return the layers of a layer information message; empty where its form is unknown."""
    found = (_LAYER.match(line.strip()) for line in message.splitlines())
    return tuple(_layer(match) for match in found if match)


def layers_of_profiles(message: str, profiles: int) -> tuple[tuple[Layer, ...], ...]:
    """Return the layers of each optimization profile; none of one that the message says nothing of.

    From the second profile on TensorRT marks names with [profile N], and not those of every kernel; but a kernel's name
    ends with the number of its subgraph, which is of one profile, and at whose ends there are such names.
    """
    if profiles == 1:
        return (parse_layers(message),)
    lines = [line.strip() for line in message.splitlines()]
    found = [(line, match) for line in lines if (match := _LAYER.match(line))]
    marked = {_subgraph(match["name"]): int(mark[1]) for line, match in found if (mark := _PROFILE.search(line))}
    numbers = [marked.get(_subgraph(match["name"]), 0) for _, match in found]
    return tuple(
        tuple(_layer(match) for (_, match), number in zip(found, numbers, strict=True) if number == profile)
        for profile in range(profiles)
    )


def layers_in_json(text: str) -> tuple[Layer, ...]:
    """Return the layers that ``IEngineInspector.get_engine_information`` tells as JSON, of either schema.

    Empty for an engine that was built without DETAILED profiling verbosity, of which it tells names alone.

    Raises:
        ValueError: it is no such JSON.
    """
    told = json.loads(text)
    if not isinstance(told, dict) or not isinstance(told.get("Layers"), list):
        raise ValueError("the inspector's JSON has no list of Layers")
    return tuple(_layer_of(entry) for entry in told["Layers"] if isinstance(entry, dict))


def _layer_of(entry: dict[str, Any]) -> Layer:
    inputs, constants, outputs = (
        tuple(_type_of(tensor) for tensor in entry.get(part) or ()) for part in ("Inputs", "Constants", "Outputs")
    )
    nodes = tuple(_ONNX_NODE.findall(str(entry.get("Metadata", ""))))
    return Layer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), inputs, constants, outputs, nodes)


def _type_of(tensor: dict[str, Any]) -> str:
    """Return a tensor's type as the build log has it; a type that is not known, as the inspector has it."""
    text = str(next((tensor[key] for key in _TYPE_KEYS if key in tensor), ""))
    return next((_TYPE_NAMES[word] for word in re.findall(r"\w+", text) if word in _TYPE_NAMES), text)


def _subgraph(name: str) -> str:
    """Return what the kernels of one of the builder's subgraphs have in common; of another layer its name."""
    found = _SUBGRAPH.search(name)
    return found[1] if found else name


def find_gemms(layers: Iterable[Layer], products: Collection[str]) -> tuple[Gemm, ...]:
    """Return the kernels that compute the given products, in execution order.

    Args:
        layers: the engine's layers.
        products: names of ONNX nodes, "LINEAR/MatMul".

    The kernel that rearranges an activation's block scales also carries the product's name in its metadata;
    it computes nothing and is left out, as is the one that unpacks FP4 weights to 16 bit.
    """
    return tuple(
        Gemm(layer.name, layer.gemm_format or _sixteen_bit(layer), names)
        for layer in layers
        if (layer.gemm_format == NVFP4.name or (layer.kind in _PRODUCT_KINDS and layer.inputs))
        and (names := tuple(node for node in layer.onnx_nodes if node in products))
    )


def _sixteen_bit(layer: Layer) -> str:
    """Return what a kernel that is no GEMM of FP4 or FP8 computes in: what it reads, or what it unpacks that to."""
    return (layer.outputs[0] if layer.inputs[0] in _FORMATS and layer.outputs else layer.inputs[0]).lower()


def _layer(match: re.Match[str]) -> Layer:
    inputs, constants, outputs = (tuple(_DATA_TYPE.findall(match[part])) for part in ("inputs", "constants", "outputs"))
    return Layer(match["name"], match["kind"], inputs, constants, outputs, tuple(_ONNX_NODE.findall(match["metadata"])))
