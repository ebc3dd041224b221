"""The size of every tensor of a graph for given sizes of its inputs, and the first nodes that cannot take them.

Each node is judged by itself with the shape inference of the ONNX standard, its inputs' sizes being numbers; what a
graph computes of sizes is computed. What is not known (operators of other domains, bodies, sizes that values decide) is
left out and judged no further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, TypeProto, defs, helper, numpy_helper, shape_inference
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from onnx_functions.graph.bodies import bodies_of
from onnx_functions.graph.element_types import attributes_of, opset_of
from onnx_functions.graph.external_data import array_of
from onnx_functions.graph.fit import PAIRED, Pair, pairs_of
from onnx_functions.graph.index import name_of
from onnx_functions.library import ACTIVATION_PLACEHOLDER, QUANTIZER, TRT_DOMAIN, WEIGHT_PLACEHOLDER

__all__ = ["Misfit", "Size", "Sizes", "sizes_at", "without_functions"]

Size = tuple[int | None, ...]
"""Sizes of a tensor's axes; None where one is not known."""

_Type = tuple[int, Size]
"""Element type and size."""

_VALUES: Final = 1024
"""Elements of a tensor whose values are followed."""

_FOLLOWED: Final = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT)

_SAME_SIZE: Final = (WEIGHT_PLACEHOLDER, ACTIVATION_PLACEHOLDER, QUANTIZER)

_COMPUTED: Final = frozenset(
    "Abs Add And Cast Ceil Concat ConstantOfShape Div Equal Expand Flatten Floor Gather Greater GreaterOrEqual "
    "Identity Less LessOrEqual Max Min Mod Mul Neg Not Or Pow Range ReduceMax ReduceMin ReduceProd ReduceSum Reshape "
    "ScatterND Slice Split Sqrt Squeeze Sub Tile Transpose Unsqueeze Where".split()
)
"""Operators that graphs compute sizes with."""


@dataclass(frozen=True)
class Misfit:
    """A node that cannot take what it reads.

    Attributes:
        node: it.
        name: its name, or that of its first output where it has none.
        reads: the tensors that it reads.
        message: what it is given, and why that cannot be.
        unequal: numbers that have to be equal are not; otherwise the standard's inference objects, maybe to something
            that no size would mend.
    """

    node: NodeProto
    name: str
    reads: tuple[str, ...]
    message: str
    unequal: bool


@dataclass
class Sizes:
    """Sizes, element types and, of small tensors, values by tensor; and the nodes that do not fit, in graph order."""

    sizes: dict[str, Size] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    values: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    misfits: list[Misfit] = field(default_factory=list)

    def whole(self, tensor: str) -> tuple[int, ...] | None:
        """Return a tensor's size where all of it is known."""
        size = self.sizes.get(tensor)
        known = tuple(n for n in size if n is not None) if size is not None else ()
        return known if size is not None and len(known) == len(size) else None

    def pairs(self, node: NodeProto) -> list[Pair]:
        """Return the numbers that have to be equal in a node of the standard, as far as they are known."""
        if node.op_type not in PAIRED:
            return []
        return pairs_of(node, [self.whole(name) for name in node.input], [self.values.get(name) for name in node.input])


class _Walk:
    """One graph, whose nodes are asked in order; what has not `changed` since a walk before is taken from there."""

    def __init__(
        self, model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]], directory: Path, base: Sizes | None
    ) -> None:
        self.opset = opset_of(model)
        self.imports = list(model.opset_import)
        self.found = Sizes()
        self.base = base
        self.changed: set[str] = set()
        for tensor in model.graph.initializer:
            if base is None:
                self._store(tensor.name, tensor, directory)
            else:
                self._learn(tensor.name, tensor.data_type, tuple(tensor.dims))
        if base is not None:
            stored = {tensor.name for tensor in model.graph.initializer}
            self.found.values.update((name, found) for name, found in base.values.items() if name in stored)
        for value in model.graph.input:
            if value.name in inputs:
                self._learn(value.name, value.type.tensor_type.elem_type, tuple(inputs[value.name]))
            if base is not None and self.found.sizes.get(value.name) != base.sizes.get(value.name):
                self.changed.add(value.name)

    def _store(self, name: str, tensor: TensorProto, directory: Path) -> None:
        self._learn(name, tensor.data_type, tuple(tensor.dims))
        small = math.prod(tensor.dims) <= _VALUES and tensor.data_type in _FOLLOWED
        # Sizes are integers; a file is not opened for each of a graph's scales.
        if small and not (tensor.data_type == TensorProto.FLOAT and tensor.external_data):
            try:
                self.found.values[name] = array_of(tensor, directory)
            except (ValueError, OSError, TypeError):
                return  # a damaged constant is for the lint to name

    def _learn(self, name: str, kind: int, size: Size) -> None:
        self.found.sizes[name], self.found.kinds[name] = size, kind

    def _type(self, name: str) -> _Type | None:
        return (self.found.kinds[name], self.found.sizes[name]) if name in self.found.sizes else None

    def node(self, node: NodeProto) -> None:
        """Learn what a node's outputs are, or that it does not fit."""
        if self.base is not None and self.changed.isdisjoint(node.input):
            self._take(node, self.base)
            return
        self.changed.update(node.output)
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            self._constant(node)
            return
        read = [name for name in node.input if name]
        if any(name not in self.found.sizes for name in read):
            return
        if node.domain == TRT_DOMAIN:
            self._quantizer(node)
            return
        if node.domain not in ("", "ai.onnx") or any(True for _ in bodies_of(node)):
            return
        unequal = self._fault(node)
        fault = unequal or self._infer(node)
        if fault:
            given = ", ".join(f"{name} {_shown(self.found.sizes.get(name))}" for name in read)
            message = f"the {node.op_type} {name_of(node)} of {given} {fault}"
            self.found.misfits.append(Misfit(node, name_of(node), tuple(read), message, bool(unequal)))
            for output in node.output:
                self.found.sizes.pop(output, None)
        else:
            self._compute(node)

    def _take(self, node: NodeProto, base: Sizes) -> None:
        """Take over what is known of a node whose inputs are as they were."""
        for name in node.output:
            if name in base.sizes:
                self._learn(name, base.kinds[name], base.sizes[name])
            if name in base.values:
                self.found.values[name] = base.values[name]
        if base.misfits:
            self.found.misfits.extend(misfit for misfit in base.misfits if misfit.node is node)

    def _constant(self, node: NodeProto) -> None:
        value = next(iter(attributes_of(node).items()), ("", None))
        if isinstance(value[1], TensorProto):
            self._store(node.output[0], value[1], Path())
        elif value[0] in ("value_int", "value_ints"):
            self._give(node.output[0], np.asarray(value[1], np.int64))
        elif value[0] in ("value_float", "value_floats"):
            self._give(node.output[0], np.asarray(value[1], np.float32))

    def _give(self, name: str, values: npt.NDArray[Any]) -> None:
        self._learn(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
        if values.size <= _VALUES:
            self.found.values[name] = values

    def _quantizer(self, node: NodeProto) -> None:
        size = self.found.sizes.get(node.input[0]) if node.input else None
        if node.op_type not in _SAME_SIZE or size is None:
            return
        kinds = [self.found.kinds[node.input[0]]]
        sizes = [size]
        if node.op_type == QUANTIZER:
            kinds = [TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN]
            sizes.append((*size[:-1], size[-1] // 16 if size[-1] is not None else None) if size else size)
        for name, kind, found in zip(node.output, kinds, sizes, strict=False):
            self._learn(name, kind, found)

    def _infer(self, node: NodeProto) -> str:
        """Learn the outputs' sizes by the standard's inference; return what that objects to, "" for nothing."""
        values = (self.found.values.get(name) for name in node.input)
        found, fault = _inferred(
            node.op_type,
            self.opset if node.op_type not in _NEWER else max(self.opset, OPSET),
            tuple(attribute.SerializeToString(deterministic=True) for attribute in node.attribute),
            tuple(self._type(name) for name in node.input),
            tuple(None if held is None else numpy_helper.from_array(held).SerializeToString() for held in values),
            tuple(bool(name) for name in node.output),
        )
        for name, type_ in zip(node.output, found, strict=False):
            if name and type_ is not None:
                self._learn(name, *type_)
        return fault

    def _fault(self, node: NodeProto) -> str:
        """Return which numbers of a node that have to be equal are not, "" where all are."""
        return next((f"does not fit ({pair})" for pair in self.found.pairs(node) if not pair.fits), "")

    def _compute(self, node: NodeProto) -> None:
        """Learn the values of a node's outputs where they are small and known."""
        if node.op_type in ("Shape", "Size"):
            self._measure(node)
        if node.op_type not in _COMPUTED:
            return
        sizes = [self.found.whole(name) for name in node.output if name]
        small = all(size is not None and math.prod(size) <= _VALUES for size in sizes)
        known = all(name in self.found.values for name in node.input if name)
        if not (node.input and known and small):
            return
        feeds = {name: self.found.values[name] for name in node.input if name}
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(name, self.found.kinds[name], self.found.sizes[name]) for name in feeds],
            [helper.make_value_info(name, TypeProto()) for name in node.output if name],
        )
        model = helper.make_model(graph, opset_imports=self.imports)
        try:
            with np.errstate(all="ignore"):
                results: Any = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # the evaluator raises whatever numpy does; then the values are not known
            return
        for name, values in zip((name for name in node.output if name), results, strict=False):
            if isinstance(values, (np.ndarray, np.generic)):
                self._give(name, np.asarray(values))

    def _measure(self, node: NodeProto) -> None:
        size = self.found.whole(node.input[0])
        if size is None:
            return
        if node.op_type == "Size":
            self._give(node.output[0], np.asarray(math.prod(size), np.int64))
            return
        attributes = attributes_of(node)
        start, end = attributes.get("start", 0), attributes.get("end", len(size))
        if isinstance(start, int) and isinstance(end, int):
            self._give(node.output[0], np.asarray(size[slice(start, end)], np.int64))


_NEWER: Final = ("DequantizeLinear", "QuantizeLinear")
"""Operators that are read as those of opset 23 whatever is declared: FP4 and blocks are in no older one."""

OPSET: Final = 23

_PREFIX: Final = "[ShapeInferenceError] "


@lru_cache(maxsize=1 << 14)
def _inferred(
    operator: str,
    opset: int,
    attributes: tuple[bytes, ...],
    types: tuple[_Type | None, ...],
    data: tuple[bytes | None, ...],
    outputs: tuple[bool, ...],
) -> tuple[tuple[_Type | None, ...], str]:
    """Return type and size of each output of a node, and what ONNX's inference objects to; blocks repeat, so keep it.

    Args:
        operator: of the standard, at `opset`.
        attributes: serialized.
        types: of the inputs; None for one that is left out.
        data: the inputs' values, serialized; None where they are not known.
        outputs: which of them are wanted.
    """
    inputs = [f"i{index}" if found else "" for index, found in enumerate(types)]
    node = helper.make_node(operator, inputs, [f"o{index}" if wanted else "" for index, wanted in enumerate(outputs)])
    node.attribute.extend(onnx.AttributeProto.FromString(text) for text in attributes)
    try:
        results = shape_inference.infer_node_outputs(
            defs.get_schema(operator, opset, ""),
            node,
            {name: helper.make_tensor_type_proto(*found) for name, found in zip(inputs, types, strict=True) if found},
            {name: TensorProto.FromString(held) for name, held in zip(inputs, data, strict=True) if held},
            opset_imports=[helper.make_opsetid("", opset)],
        )
    except shape_inference.InferenceError as error:
        text = " ".join(str(error).split())
        return (), f"does not fit ({text.removeprefix(_PREFIX)})" if text.startswith(_PREFIX) else ""
    except Exception:  # onnx's checker and what lies below it raise many types over a node that is malformed
        return (), ""
    return tuple(_read(results[name].tensor_type) if name in results else None for name in node.output), ""


def _read(tensor: TypeProto.Tensor) -> _Type | None:
    if not tensor.HasField("shape") or any(dim.dim_value < 0 for dim in tensor.shape.dim):  # more than 64 bits hold
        return None
    return tensor.elem_type, tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)


def sizes_at(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]], directory: Path, base: Sizes | None = None
) -> Sizes:
    """Return the sizes of a graph's tensors where its inputs have some sizes.

    Args:
        model: its nodes come in order; external data are not loaded. What local functions do is not known.
        inputs: the size of each input that is no initializer; one that is left out is not known.
        directory: where the external data lie; of small tensors alone they are read.
        base: what was found of the same model at other sizes, which makes it faster.
    """
    walk = _Walk(model, inputs, directory, base)
    for node in model.graph.node:
        walk.node(node)
    return walk.found


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose local functions are laid into the graph, as it is where that cannot be done."""
    if not model.functions:
        return model
    try:
        return inline_local_functions(model)
    except (ValueError, RuntimeError):  # a function that calls itself, or lacks what it reads
        return model


def _shown(size: Size | None) -> str:
    return "?" if size is None else f"[{', '.join('?' if n is None else str(n) for n in size)}]"
