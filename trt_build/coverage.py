"""Did every linear that the graph promises in FP4 or FP8 get such a GEMM, and if not, why?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx

from fp4trt.errors import CoverageError
from fp4trt.number_formats import FORMATS, FP8, NVFP4
from onnx_functions.graph.element_types import attributes_of, integer
from trt_build.graph import Graph
from trt_build.layer_info import Gemm, Layer, find_gemms

__all__ = ["Coverage", "SixteenBit", "measure_coverage", "require_coverage"]

_NAMES: Final = {name: kind.gemm for name, kind in FORMATS.items()}


@dataclass(frozen=True)
class SixteenBit:
    """A linear that no GEMM of its format computes, the kernel that does (None where none was found), and why.

    `promised` is that format, also where the GPU has no such GEMMs; None for a linear that nothing promises.
    """

    linear: str
    kernel: str | None
    reason: str
    promised: str | None = None


@dataclass(frozen=True)
class Coverage:
    """The kernels of an engine's linears; `lost` are promised in FP4 or FP8 and run in something else.

    `promised` is by format.
    """

    gemms: tuple[Gemm, ...]
    promised: Mapping[str, tuple[str, ...]]
    lost: tuple[SixteenBit, ...]
    kept: tuple[SixteenBit, ...]

    @property
    def fp4_gemms(self) -> int:
        """Kernels that multiply FP4."""
        return self._gemms(NVFP4.name)

    @property
    def fp4_linears(self) -> int:
        """Promised linears that run in them."""
        return self._covered(NVFP4.name)

    @property
    def quantized_linears(self) -> int:
        """Linears that are promised in FP4 or FP8."""
        return sum(map(len, self.promised.values()))

    def _gemms(self, kind: str) -> int:
        return sum(gemm.format == kind for gemm in self.gemms)

    def _covered(self, kind: str) -> int:
        return len(self.promised.get(kind, ())) - sum(item.promised == kind for item in self.lost)

    def summary(self) -> dict[str, Any]:
        """Return the JSON form that the engine's manifest holds."""
        return {
            "fp4_gemms": self.fp4_gemms,
            "fp4_linears": self.fp4_linears,
            "fp8_gemms": self._gemms(FP8.name),
            "fp8_linears": self._covered(FP8.name),
            "coverage": {
                kind: {"gemms": self._gemms(kind), "linears": self._covered(kind)}
                for kind, paths in self.promised.items()
                if paths
            },
            "quantized_linears": self.quantized_linears,
            "gemms": [{"kernel": g.kernel, "format": g.format, "linears": list(g.linears)} for g in self.gemms],
            "lost": [vars(item) for item in self.lost],
            "sixteen_bit": [vars(item) for item in self.kept],
        }


def measure_coverage(graph: Graph, layers: Iterable[Layer], formats: Collection[str] = tuple(FORMATS)) -> Coverage:
    """Match the engine's layers with the graph's linears.

    Args:
        graph: what was built.
        layers: of the engine.
        formats: those that the engine's GPU has GEMMs of.

    Raises:
        CoverageError: there are no layers, so that nothing can be said.
    """
    layers = tuple(layers)
    if not layers:
        raise CoverageError(
            "the build log holds no layer information that fp4trt can read, so FP4 coverage is unknown; "
            "use a tested TensorRT version"
        )
    linears = {node.name: path for path, node in graph.products.items()}
    order = list(graph.products)
    gemms = tuple(
        Gemm(gemm.kernel, gemm.format, tuple(sorted((linears[name] for name in gemm.linears), key=order.index)))
        for gemm in find_gemms(layers, linears.keys())
    )
    covered = {(linear, gemm.format) for gemm in gemms for linear in gemm.linears}
    kernels = {linear: gemm for gemm in gemms for linear in gemm.linears}
    promised = {kind: paths for kind, paths in graph.promised.items() if kind in formats}
    stored = {path: kind for kind, paths in graph.promised.items() if kind not in formats for path in paths}
    return Coverage(
        gemms,
        promised,
        tuple(
            SixteenBit(path, _kernel(kernels.get(path)), _why_lost(graph, path, kind), kind)
            for kind, paths in promised.items()
            for path in paths
            if (path, kind) not in covered
        ),
        tuple(
            SixteenBit(path, _kernel(kernels.get(path)), _why_kept(graph, path), stored.get(path))
            for path in (*graph.other_linears, *stored)
            if not covered & {(path, kind) for kind in promised}
        ),
    )


def require_coverage(lost: Iterable[SixteenBit], promised: int) -> None:
    """Raise CoverageError, naming the lost linears and the reason of the first, unless there is none."""
    lost = tuple(lost)
    if not lost:
        return
    names = ", ".join(item.linear for item in lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    formats = " and ".join(name for kind, name in _NAMES.items() if any(item.promised == kind for item in lost))
    raise CoverageError(
        f"{len(lost)} of {promised} linears promised in {formats or 'FP4'} would run in 16 bit: {names} "
        f"({lost[0].reason}); repair the graph, or pass --allow-slow"
    )


def _kernel(gemm: Gemm | None) -> str | None:
    return gemm.kernel if gemm else None


def _why_kept(graph: Graph, path: str) -> str:
    for kind, paths in graph.promised.items():
        if path in paths:
            return f"{FORMATS[kind].title}: {FORMATS[kind].elsewhere}"
    if path in graph.fp4_weights:
        return "weight-only: FP4 weight, input not quantized"
    if path in graph.fp8_weights:
        return "weight-only: FP8 weight, input not quantized"
    return "not quantized in the graph"


def _why_lost(graph: Graph, path: str, kind: str) -> str:
    product = graph.products.get(path)
    if product is None:
        return f"the graph has no node {path}/MatMul"
    maker = graph.index.producer.get(graph.index.to_source(product.input[0]))
    quantizer = FORMATS[kind].quantizer[1]
    if maker is None or maker.op_type != quantizer:
        return f"its input comes from {_origin(graph, product.input[0])}, not from a {quantizer}"
    return _weight_fault(graph, product, kind) or "the builder chose another kernel"


def _weight_fault(graph: Graph, product: onnx.NodeProto, kind: str) -> str | None:
    index, weight = graph.index, product.input[1]
    stored = index.stored(weight)
    if stored is None:
        return f"{_origin(graph, weight)} stands between its weight and the product"
    if kind != NVFP4.name:
        is_stored = onnx.TensorProto.DataType.Name(stored.data_type) == FORMATS[kind].onnx_codes
        return None if is_stored else f"its weight is not stored in {FORMATS[kind].title}"
    dequantize = index.producer.get(index.through_moves(weight))
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return "its weight is not dequantized from FP4"
    if integer(attributes_of(dequantize), "axis", 1) == 0:
        return f"{dequantize.name!r} dequantizes along axis 0, not along the last axis"
    scale = index.producer.get(index.through_casts(dequantize.input[1]))
    if scale is None or scale.op_type != "DequantizeLinear":
        return f"the block scales of {dequantize.name!r} are not FP8 with a global scale"
    return None


def _origin(graph: Graph, tensor: str) -> str:
    """Say which node computes what a tensor is a cast, moved or dequantized form of, or which input that is."""
    source = graph.index.to_source(tensor)
    maker = graph.index.producer.get(source)
    return repr(source) if maker is None else f"{maker.op_type} {maker.name!r}"
