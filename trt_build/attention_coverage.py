"""Did every attention that the graph promises in FP8 become one fused kernel, and if not, why?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from fp4trt.errors import CoverageError
from onnx_functions.graph.attentions import Attention
from trt_build.graph import Graph
from trt_build.layer_info import Layer

__all__ = ["AttentionCoverage", "LostAttention", "measure_attentions", "require_attentions"]

_FP8: Final = "FP8"
_OPERANDS: Final = 3
"""Query, key and value; the probabilities never leave the kernel."""


@dataclass(frozen=True)
class LostAttention:
    """An attention that no one FP8 kernel computes, the kernels that do, and why."""

    attention: str
    kernels: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class AttentionCoverage:
    """The fused FP8 kernels, by the attention that each computes, and what was promised and is not among them."""

    fused: dict[str, str]
    promised: tuple[str, ...]
    lost: tuple[LostAttention, ...]

    def summary(self) -> dict[str, Any]:
        """Return the JSON form that the engine's manifest holds."""
        return {
            "fp8_attentions": len(self.fused),
            "quantized_attentions": len(self.promised),
            "lost_attentions": [{**vars(item), "kernels": list(item.kernels)} for item in self.lost],
        }


def measure_attentions(graph: Graph, layers: Iterable[Layer]) -> AttentionCoverage:
    """Match the engine's layers with the graph's attentions."""
    layers = tuple(layers)
    fused: dict[str, str] = {}
    for path, attention in graph.attentions.items():
        both = {attention.scores.name, attention.output.name}
        kernels = (layer for layer in layers if both.issubset(layer.onnx_nodes))
        one = next((layer for layer in kernels if layer.inputs.count(_FP8) == _OPERANDS), None)
        if one is not None:
            fused[path] = one.name
    lost = (path for path in graph.promised_attentions if path not in fused)
    return AttentionCoverage(fused, graph.promised_attentions, tuple(_lost(graph, layers, path) for path in lost))


def require_attentions(lost: Iterable[LostAttention], promised: int) -> None:
    """Raise CoverageError, naming the lost attentions and the reason of the first, unless there is none."""
    lost = tuple(lost)
    if not lost:
        return
    names = ", ".join(item.attention for item in lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    raise CoverageError(
        f"{len(lost)} of {promised} attentions promised in FP8 would not run as one kernel: {names} "
        f"({lost[0].reason}); repair the graph, or pass --allow-slow"
    )


def _lost(graph: Graph, layers: Iterable[Layer], path: str) -> LostAttention:
    attention = graph.attentions.get(path)
    if attention is None:
        operator = next((node.name for node in graph.model.graph.node if node.name == f"{path}/Attention"), None)
        reason = f"{operator} is one operator, which runs in 16 bit" if operator else "the graph does not have it"
        return LostAttention(path, (), reason)
    both = {attention.scores.name, attention.output.name}
    kernels = tuple(layer.name for layer in layers if both & set(layer.onnx_nodes))
    return LostAttention(path, kernels, _why(attention))


def _why(attention: Attention) -> str:
    if attention.missing:
        return f"its {' and '.join(attention.missing)} {'is' if len(attention.missing) == 1 else 'are'} not in FP8"
    return "the builder took it apart, as it does where a profile allows fewer than 32 tokens"
