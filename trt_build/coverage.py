"""Did every linear that the graph promises in FP4 get an FP4 GEMM, and if not, why?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx

from trt_build.errors import CoverageError
from trt_build.graph import Graph
from trt_build.layer_info import Gemm, Layer, find_gemms

__all__ = ["Coverage", "SixteenBit", "measure_coverage", "require_coverage"]


@dataclass(frozen=True)
class SixteenBit:
    """A linear that no FP4 GEMM computes, the kernel that does (None where none was found), and why."""

    linear: str
    kernel: str | None
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The kernels of an engine's linears; `lost` are promised in FP4 and run in 16 bit."""

    gemms: tuple[Gemm, ...]
    promised: tuple[str, ...]
    lost: tuple[SixteenBit, ...]
    kept: tuple[SixteenBit, ...]

    @property
    def fp4_gemms(self) -> int:
        """Kernels that multiply FP4."""
        return sum(gemm.format == "nvfp4" for gemm in self.gemms)

    @property
    def fp4_linears(self) -> int:
        """Promised linears that run in them."""
        return len(self.promised) - len(self.lost)

    def summary(self) -> dict[str, Any]:
        """Return the JSON form that the engine's manifest holds."""
        return {
            "fp4_gemms": self.fp4_gemms,
            "fp4_linears": self.fp4_linears,
            "quantized_linears": len(self.promised),
            "gemms": [{"kernel": g.kernel, "format": g.format, "linears": list(g.linears)} for g in self.gemms],
            "lost": [vars(item) for item in self.lost],
            "sixteen_bit": [vars(item) for item in self.kept],
        }


def measure_coverage(graph: Graph, layers: Iterable[Layer]) -> Coverage:
    """Match the engine's layers with the graph's linears.

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
    covered = {linear for gemm in gemms if gemm.format == "nvfp4" for linear in gemm.linears}
    kernels = {linear: gemm for gemm in gemms for linear in gemm.linears}
    lost = (path for path in graph.promised_fp4 if path not in covered)
    return Coverage(
        gemms,
        graph.promised_fp4,
        tuple(SixteenBit(path, _kernel(kernels.get(path)), _why_lost(graph, path)) for path in lost),
        tuple(
            SixteenBit(path, _kernel(kernels.get(path)), _why_kept(graph, path))
            for path in graph.other_linears
            if path not in covered
        ),
    )


def require_coverage(lost: Iterable[SixteenBit], promised: int) -> None:
    """Raise CoverageError, naming the lost linears and the reason of the first, unless there is none."""
    lost = tuple(lost)
    if not lost:
        return
    names = ", ".join(item.linear for item in lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    raise CoverageError(
        f"{len(lost)} of {promised} linears promised in FP4 would run in 16 bit: {names} ({lost[0].reason}); "
        "repair the graph, or pass --allow-slow"
    )


def _kernel(gemm: Gemm | None) -> str | None:
    return gemm.kernel if gemm else None


def _why_kept(graph: Graph, path: str) -> str:
    if path in graph.fp4_weights:
        return "weight-only: its weight is FP4, its input is not quantized"
    return "the graph does not quantize it"


def _why_lost(graph: Graph, path: str) -> str:
    product = graph.products.get(path)
    if product is None:
        return f"the graph has no node {path}/MatMul"
    activation = graph.chain(product.input[0])
    if not activation or activation[-1].op_type != "TRT_FP4DynamicQuantize":
        source = f"{activation[-1].op_type} {activation[-1].name!r}" if activation else repr(product.input[0])
        return f"its input comes from {source}, not from a TRT_FP4DynamicQuantize"
    return _weight_fault(graph, product) or "the builder chose another kernel"


def _weight_fault(graph: Graph, product: onnx.NodeProto) -> str | None:
    weight = graph.chain(product.input[1])
    if graph.stored(product.input[1]) is None:
        source = f"{weight[-1].op_type} {weight[-1].name!r}" if weight else repr(product.input[1])
        return f"{source} stands between its weight and the product"
    dequantize = next((node for node in weight if node.op_type == "DequantizeLinear"), None)
    if dequantize is None:
        return "its weight is not dequantized from FP4"
    axis = next((attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1)
    if axis == 0:
        return f"{dequantize.name!r} dequantizes along axis 0, not along the last axis"
    scale = graph.producers.get(dequantize.input[1])
    if scale is None or scale.op_type != "DequantizeLinear":
        return f"the block scales of {dequantize.name!r} are not FP8 with a global scale"
    return None
