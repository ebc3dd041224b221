"""Replace the FP4 placeholders by what TensorRT reads: codes and scales through two DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import onnx_ir as ir

from exporter.naming import FreeNames, name_of
from exporter.trt_ops import ACTIVATION_PLACEHOLDER, DOMAIN, QUANTIZER, WEIGHT_PLACEHOLDER
from fp4trt.errors import BadGraph

__all__ = ["BLOCK_SIZE", "QuantizedWeight", "ScaleDtype", "double_dequantize"]

ScaleDtype = Literal["float32", "bfloat16"]

BLOCK_SIZE: Final = 16

_STORED: Final = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [..., K] in 16 or 32 bit, and the names of the initializers that stand for it in FP4."""

    weight: ir.Value
    codes: str
    block_scales: str
    global_scale: str


def double_dequantize(
    model: ir.Model, leaders: Mapping[str, str], scale_dtype: ScaleDtype
) -> tuple[QuantizedWeight, ...]:
    """Rewrite in place, a graph that we traced or a third-party one.

    1. ``TRT_FP4QDQ(X.weight)`` becomes DequantizeLinear(E4M3 block scales, global scale), then
       DequantizeLinear(FP4 codes, that): initializers ``X.weight``, ``X.weight_scale`` and a ``X.weight_scale_2``. A
       weight that two placeholders read is dequantized once; one that is read in 16 bit too keeps its name.
    2. ``TRT_FP4DynamicQDQ(x)`` becomes ``trt::TRT_FP4DynamicQuantize(x, input_scale)`` and the same two
       DequantizeLinear on its outputs.
    3. Linears with the same leader read one activation and one pair of global scales: the leader's. So TensorRT sees
       that they can be one GEMM.
    4. ``float32``: both products in FP32, then a Cast to the weight's type, which is what fake quantization computes,
       bit for bit. ``bfloat16``: ``output_dtype`` on both, no Cast; the scale is rounded to BF16 once more.

    Args:
        model: with placeholders; the new initializers have no values yet.
        leaders: module path of each quantized linear to the first member of its group; one that is absent leads itself.
        scale_dtype: see 4.

    Returns:
        The weights that were replaced, in graph order.

    Raises:
        BadGraph: a placeholder is not where it can be replaced, or its weight cannot be stored in FP4.
    """
    rewrite = _Rewrite(model.graph, leaders, scale_dtype)
    for node in list(model.graph):
        if node.op_type == WEIGHT_PLACEHOLDER:
            rewrite.weight(node)
        elif node.domain == DOMAIN and node.op_type == ACTIVATION_PLACEHOLDER:
            rewrite.activation(node)
    rewrite.drop_replaced()
    _declare_domain(model.graph)
    return tuple(weight for weight, _ in rewrite.weights.values())


def _declare_domain(graph: ir.Graph) -> None:
    """Declare TensorRT's domain where the graph has its operators, and only there."""
    if any(node.domain == DOMAIN for node in graph.all_nodes()):
        graph.opset_imports[DOMAIN] = 1
    else:
        graph.opset_imports.pop(DOMAIN, None)


@dataclass
class _Rewrite:
    """One graph while it is rewritten; remembers the chains that later linears share."""

    graph: ir.Graph
    leaders: Mapping[str, str]
    scale_dtype: ScaleDtype
    chains: dict[tuple[str, int], ir.Value] = field(default_factory=dict)
    weights: dict[ir.Value, tuple[QuantizedWeight, ir.Value]] = field(default_factory=dict)
    made: dict[str, ir.Value] = field(default_factory=dict)
    names: FreeNames = field(init=False)

    def __post_init__(self) -> None:
        self.names = FreeNames(self.graph)

    def weight(self, node: ir.Node) -> None:
        """Replace a weight's placeholder, by a chain that exists already where another one reads the same weight."""
        weight = node.inputs[0] if node.inputs else None
        if weight is None or weight not in self.weights:
            weight = _stored_weight(node)
            self.weights[weight] = self._weight_chain(node, weight)
        self._replace(node, self.weights[weight][1])

    def _weight_chain(self, node: ir.Node, weight: ir.Value) -> tuple[QuantizedWeight, ir.Value]:
        assert weight.name is not None
        assert weight.dtype is not None
        name = weight.name
        if all(user.op_type == WEIGHT_PLACEHOLDER for user, _ in weight.uses()) and not weight.is_graph_output():
            del self.graph.initializers[name]
            self.names.give_back(name)
        else:
            name = f"{name}_fp4"
        path = name.removesuffix(".weight")
        leader = self.leaders.get(path, path)
        overall = f"{leader}.weight_scale_2" if path != name else f"{name}_scale_2"
        *rows, columns = (int(size) for size in weight.shape)  # type: ignore[union-attr, arg-type]
        codes = self._initializer(name, ir.DataType.FLOAT4E2M1, (*rows, columns))
        scales = self._initializer(f"{name}_scale", ir.DataType.FLOAT8E4M3FN, (*rows, columns // BLOCK_SIZE))
        shared = self._initializer(overall, ir.DataType.FLOAT, ())
        quantized = QuantizedWeight(weight, str(codes.name), str(scales.name), str(shared.name))
        stem = f"{path}/weight" if path != name else name
        return quantized, self._dequantize(node, codes, scales, shared, stem, weight.dtype)

    def activation(self, node: ir.Node) -> None:
        """Replace an activation's placeholder, by a chain that exists already where the group has one."""
        x = node.inputs[0]
        assert x is not None
        leader = self.leaders[node.attributes["linear"].as_string()]
        key = (leader, id(x))
        if key not in self.chains:
            self.chains[key] = self._dynamic_quantize(node, x, leader)
        self._replace(node, self.chains[key])

    def _dynamic_quantize(self, node: ir.Node, x: ir.Value, path: str) -> ir.Value:
        if x.shape is None:
            raise BadGraph(f"the input of {path} has no shape; expected [..., K] with a known K")
        overall = self._initializer(f"{path}.input_scale", ir.DataType.FLOAT, ())
        *outer, columns = x.shape
        assert isinstance(columns, int)
        quantize = ir.node(
            QUANTIZER,
            [x, overall],
            {"axis": -1, "block_size": BLOCK_SIZE, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
            domain=DOMAIN,
            num_outputs=2,
            name=f"{path}/TRT_FP4DynamicQuantize",
        )
        codes, scales = quantize.outputs
        _describe(codes, f"{path}/input_codes", ir.DataType.FLOAT4E2M1, x.shape)
        _describe(
            scales, f"{path}/input_block_scales", ir.DataType.FLOAT8E4M3FN, ir.Shape([*outer, columns // BLOCK_SIZE])
        )
        self.graph.insert_before(node, quantize)
        return self._dequantize(node, codes, scales, overall, f"{path}/input", ir.DataType.BFLOAT16)

    def _dequantize(
        self, before: ir.Node, codes: ir.Value, scales: ir.Value, overall: ir.Value, name: str, result: ir.DataType
    ) -> ir.Value:
        """Insert the two DequantizeLinear (and after FP32 ones the Cast to ``result``); return what comes out."""
        wide = self.scale_dtype == "float32"
        dtype = ir.DataType.FLOAT if wide else ir.DataType.BFLOAT16
        attributes = {} if wide else {"output_dtype": int(dtype)}
        first = ir.node("DequantizeLinear", [scales, overall], attributes, name=f"{name}_scale/DequantizeLinear")
        _describe(first.outputs[0], f"{name}_scale/DequantizeLinear_output_0", dtype, scales.shape)
        second = ir.node(
            "DequantizeLinear",
            [codes, first.outputs[0]],
            {"axis": -1, "block_size": BLOCK_SIZE, **attributes},
            name=f"{name}/DequantizeLinear",
        )
        _describe(second.outputs[0], f"{name}/DequantizeLinear_output_0", dtype, codes.shape)
        nodes = [first, second]
        if dtype != result:
            cast = ir.node("Cast", second.outputs, {"to": int(result)}, name=f"{name}/Cast")
            _describe(cast.outputs[0], f"{name}/Cast_output_0", result, codes.shape)
            nodes.append(cast)
        self.graph.insert_before(before, nodes)
        return nodes[-1].outputs[0]

    def _initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """Return the initializer that this pass made for that name, without a value where it is new.

        A tensor of somebody else's that has the name already keeps it: ours then gets another.
        """
        if name not in self.made:
            value = ir.Value(name=self.names.take(name), type=ir.TensorType(dtype), shape=ir.Shape(shape))
            self.graph.initializers[str(value.name)] = value
            self.made[name] = value
        return self.made[name]

    def drop_replaced(self) -> None:
        """Take weights that are FP4 now from the graph's inputs, where some exporters list initializers too."""
        gone = {id(weight) for weight in self.weights if not weight.uses()}
        self.graph.inputs[:] = [value for value in self.graph.inputs if id(value) not in gone]

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        if node.outputs[0].is_graph_output():
            raise BadGraph(f"{name_of(node)} is an output of the graph; expected a linear to read it")
        node.outputs[0].replace_all_uses_with(value)
        self.graph.remove(node, safe=True)


def _stored_weight(node: ir.Node) -> ir.Value:
    """Return the weight that a placeholder reads.

    Raises:
        BadGraph: it is computed, or cannot be stored in blocks of 16 along its last axis.
    """
    name, weight = name_of(node), node.inputs[0] if node.inputs else None
    if weight is None or weight.name is None or not weight.is_initializer() or weight.shape is None:
        raise BadGraph(
            f"{name} quantizes {weight and weight.name}, which is not an initializer{_computed(weight)}; "
            "expected a stored weight, through Identity, Transpose or Cast at most"
        )
    shape = [size if isinstance(size, int) else 0 for size in weight.shape]
    _refuse_attributes(node, len(shape))
    if len(shape) < 2 or min(shape) < 1 or shape[-1] % BLOCK_SIZE:
        raise BadGraph(
            f"{name} quantizes {weight.name} of shape {shape}; expected [..., N, K] with K a multiple of "
            f"{BLOCK_SIZE}: leave it in 16 bit"
        )
    if weight.dtype not in _STORED:
        raise BadGraph(f"{name} quantizes {weight.name}, which is {weight.dtype}; expected BF16, FP16 or FP32")
    return weight


def _computed(value: ir.Value | None) -> str:
    producer = value.producer() if value is not None else None
    return f" but the result of {name_of(producer)} ({producer.op_type})" if producer is not None else ""


def _refuse_attributes(node: ir.Node, rank: int) -> None:
    """Refuse blocks of another size, or along another axis, than TensorRT has them."""
    size, axis = (
        node.attributes[key].value if key in node.attributes else default
        for key, default in (("block_size", BLOCK_SIZE), ("axis", -1))
    )
    if type(size) is not int or size != BLOCK_SIZE:
        raise BadGraph(f"{name_of(node)} asks for blocks of {size!r}; TensorRT has FP4 in blocks of {BLOCK_SIZE} only")
    if type(axis) is not int or axis not in (-1, rank - 1):
        raise BadGraph(
            f"{name_of(node)} asks for blocks along axis {axis!r}; TensorRT has them along the last one only, "
            f"-1 or {rank - 1}: mark the weight as [N, K]"
        )


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = shape
