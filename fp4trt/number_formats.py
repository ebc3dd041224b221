"""The number formats of linears, as data: what each stores, what the graph and the engine call it, what it costs.

All that another package has to know of a format stands here; what a format *computes* is one module,
:attr:`NumberFormat.arithmetic`, and how the exporter writes it one pass, :attr:`NumberFormat.rewrite`. To add a format,
add an entry to :data:`FORMATS` and these modules: no other file names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "BF16",
    "FORMATS",
    "FP8",
    "FP32",
    "MXFP8",
    "NAMES",
    "NVFP4",
    "PLAIN",
    "NumberFormat",
    "StoredScale",
    "counted_by_format",
    "formats_of",
    "linears_in_words",
    "stored_format",
]

BF16: Final = "bf16"
"""Name of what a linear has that is not quantized."""

FP32: Final = "fp32"
"""Name of what one has that is not, and that the model computes with in FP32."""


@dataclass(frozen=True)
class StoredScale:
    """A scale tensor beside the codes of a linear.

    Attributes:
        leaf: last part of its name.
        dtype: as safetensors names it.
        block: how many weights of a row share one; None for one scalar.
        of_input: whether it is of the activation; else of the weight.
    """

    leaf: str
    dtype: str = "F32"
    block: int | None = None
    of_input: bool = False

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return its shape for a weight [rows, columns]."""
        return () if self.block is None else (rows, columns // self.block)


@dataclass(frozen=True)
class NumberFormat:
    """A number format that weight and activation of a linear have.

    Attributes:
        name: what recipes, manifests and metadata call it.
        title: what people call it.
        codes: dtype of the stored codes, as safetensors names it.
        codes_per_byte: how many codes a byte holds.
        scales: what is stored beside the codes, in the order of its use.
        block: how many weights along K share a scale; K is a multiple of it. None for one scale a tensor.
        shared: leaves of the scales of which a graph has one for the linears that it can run as one GEMM.
        bits: of a weight, with its share of the block scales.
        relative_time: of a FLOP, where NVFP4 takes 1 (Blackwell, dense); None for one that a search leaves out.
        amax_factor: what the largest magnitude of a tensor is divided by for its scale; None without such a scale.
        modelopt: in the quantization_config of ModelOpt's unified export ``algorithm`` (its ``quant_algo``),
            ``operands`` (in ``config_groups``) and ``layer`` (in ``quantized_layers``); and the attributes of its
            ``quantizer``.
        arithmetic: module that computes it (see :mod:`calibration.formats.arithmetic`).
        rewrite: the exporter's pass, ``module:function``, (graph, linear to leader, dtype of scales) to nothing.
        graph: module that says what its operators are in ONNX (see :mod:`onnx_functions.formats`).
        onnx_codes: ONNX type of the codes.
        onnx_scales: of the block scales, or of the only scale.
        quantizer: domain and name of the operator that quantizes an activation.
        dequantizer: the same of the one that reads the codes.
        engine: what the builder's layer information calls the type of the operands of its GEMM.
        gemm: what a GEMM of it is called, such as ``FP4``.
        gpus: the architectures whose engines have such GEMMs.
        elsewhere: what an engine for another GPU makes of it; None where it cannot be built.
    """

    name: str
    title: str
    codes: str
    codes_per_byte: int
    scales: tuple[StoredScale, ...]
    block: int | None
    shared: tuple[str, ...]
    bits: float
    relative_time: float | None
    amax_factor: float | None
    modelopt: Mapping[str, Any]
    arithmetic: str
    rewrite: str
    graph: str
    onnx_codes: str
    onnx_scales: str
    quantizer: tuple[str, str]
    dequantizer: tuple[str, str]
    engine: str
    gemm: str
    gpus: frozenset[str]
    elsewhere: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """Last parts of the names of its scales."""
        return tuple(scale.leaf for scale in self.scales)

    @property
    def scalars(self) -> tuple[str, ...]:
        """Those of the scales of a whole tensor."""
        return tuple(scale.leaf for scale in self.scales if scale.block is None)

    @property
    def needs_input_amax(self) -> bool:
        """Whether the activation has a scale that calibration gives."""
        return any(scale.of_input for scale in self.scales)

    @property
    def weight_scale(self) -> str | None:
        """Leaf of the scalar that is the weight's scale; None without one."""
        return next((scale.leaf for scale in self.scales if scale.block is None and not scale.of_input), None)

    @property
    def shares_weight_scale(self) -> bool:
        """Whether linears that read one input are quantized with one scale of their weights."""
        return self.weight_scale is not None

    @property
    def needs_shared_weight_scale(self) -> bool:
        """Whether a graph has no group of linears whose weights have scales of their own."""
        return self.weight_scale in self.shared

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the stored codes of a weight [rows, columns]."""
        return rows, columns // self.codes_per_byte


NVFP4: Final = NumberFormat(
    name="nvfp4",
    title="NVFP4",
    codes="U8",
    codes_per_byte=2,
    scales=(
        StoredScale("weight_scale", "F8_E4M3", 16),
        StoredScale("weight_scale_2"),
        StoredScale("input_scale", of_input=True),
    ),
    block=16,
    shared=("weight_scale_2", "input_scale"),
    bits=4.5,
    relative_time=1.0,
    amax_factor=6.0 * 448.0,
    modelopt={
        "algorithm": "NVFP4",
        "operands": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
        "layer": {"quant_algo": "NVFP4", "group_size": 16},
        "quantizer": {
            "num_bits": (2, 1),
            "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
            "backend": "fp4trt_nvfp4",
        },
    },
    arithmetic="calibration.formats.nvfp4",
    rewrite="exporter.passes.double_dequantize:double_dequantize",
    graph="onnx_functions.formats.nvfp4",
    onnx_codes="FLOAT4E2M1",
    onnx_scales="FLOAT8E4M3FN",
    quantizer=("trt", "TRT_FP4DynamicQuantize"),
    dequantizer=("", "DequantizeLinear"),
    engine="FP4E2M1",
    gemm="FP4",
    gpus=frozenset(("SM100", "SM103", "SM120", "SM121")),
)

FP8: Final = NumberFormat(
    name="fp8",
    title="FP8",
    codes="F8_E4M3",
    codes_per_byte=1,
    scales=(StoredScale("weight_scale"), StoredScale("input_scale", of_input=True)),
    block=None,
    shared=("input_scale",),
    bits=8.0,
    relative_time=2.0,
    amax_factor=448.0,
    modelopt={
        "algorithm": "FP8",
        "operands": {"dynamic": False, "num_bits": 8, "type": "float"},
        "layer": {"quant_algo": "FP8"},
        "quantizer": {"num_bits": (4, 3), "axis": None},
    },
    arithmetic="calibration.formats.fp8",
    rewrite="exporter.passes.fp8_quantize:fp8_quantize",
    graph="onnx_functions.formats.fp8",
    onnx_codes="FLOAT8E4M3FN",
    onnx_scales="FLOAT",
    quantizer=("", "QuantizeLinear"),
    dequantizer=("", "DequantizeLinear"),
    engine="FP8",
    gemm="FP8",
    gpus=frozenset(("SM89", "SM90", "SM100", "SM103", "SM120", "SM121")),
)

MXFP8: Final = NumberFormat(
    name="mxfp8",
    title="MXFP8",
    codes="F8_E4M3",
    codes_per_byte=1,
    scales=(StoredScale("weight_scale", "U8", 32),),
    block=32,
    shared=(),
    bits=8.25,
    relative_time=None,
    amax_factor=None,
    modelopt={
        "algorithm": "MXFP8",
        "operands": {"dynamic": False, "num_bits": 8, "type": "float", "group_size": 32},
        "layer": {"quant_algo": "MXFP8", "group_size": 32},
        "quantizer": {
            "num_bits": (4, 3),
            "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)},
            "backend": "fp4trt_mxfp8",
        },
    },
    arithmetic="calibration.formats.mxfp8",
    rewrite="exporter.passes.mxfp8_quantize:mxfp8_quantize",
    graph="onnx_functions.formats.mxfp8",
    onnx_codes="FLOAT8E4M3FN",
    onnx_scales="UINT8",
    quantizer=("trt", "TRT_MXFP8DynamicQuantize"),
    dequantizer=("trt", "TRT_MXFP8DequantizeLinear"),
    engine="MXFP8",
    gemm="MXFP8",
    gpus=frozenset(("SM100", "SM103")),
    elsewhere="stored in 8 bits, unpacked and multiplied in BF16",
)

FORMATS: Final[Mapping[str, NumberFormat]] = {format.name: format for format in (NVFP4, FP8, MXFP8)}
"""Quantized formats by name, the cheapest first."""

PLAIN: Final[Mapping[str, str]] = {"BF16": "BF16", "F16": "FP16", "F32": "FP32"}
"""Dtypes of a linear that is not quantized, by safetensors' name, and what people call them."""

NAMES: Final = (*FORMATS, BF16)
"""What a recipe may give a linear."""


def stored_format(codes: str, scale: str | None) -> NumberFormat | None:
    """Return the format that a linear is stored in, None where no format of ours has such codes.

    Args:
        codes: dtype of its weight.
        scale: dtype of its ``weight_scale``, None without one.
    """
    found = [format for format in FORMATS.values() if format.codes == codes]
    exact = (format for format in found if format.scales[0].dtype == scale)
    return next(exact, found[0] if found else None)


def counted_by_format(linears: Mapping[str, str]) -> dict[str, int]:
    """Return how many linears have each quantized format that any has, in the order of :data:`FORMATS`.

    Args:
        linears: module path to format.
    """
    counts = {name: sum(kind == name for kind in linears.values()) for name in FORMATS}
    return {name: count for name, count in counts.items() if count}


def linears_in_words(counts: Mapping[str, int]) -> str:
    """Return counts by format for people, such as ``15 linears in NVFP4, 8 in FP8``."""
    first, *others = [(count, FORMATS[name].title) for name, count in counts.items()] or [(0, "a quantized format")]
    words = f"{first[0]} linear{'' if first[0] == 1 else 's'} in {first[1]}"
    return ", ".join([words, *(f"{count} in {title}" for count, title in others)])


def formats_of(names: Collection[str]) -> tuple[NumberFormat, ...]:
    """Return the formats among some names, in the order of :data:`FORMATS`."""
    return tuple(format for name, format in FORMATS.items() if name in names)
