"""What each form of a transformer's weights needs on a GPU: the rows of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fp4trt.number_formats import FORMATS, counted_by_format
from fp4trt.targets import Target
from generation.planning.call import Call
from generation.planning.components import Component
from generation.planning.peaks import MODES, RUNTIME, VAE_MAPS, Loaded, Mode, Peak, peak_of
from generation.planning.roofline import HOST_BANDWIDTH, call_seconds
from generation.planning.source import Source
from generation.planning.weights import Weights
from trt_build.memory import GIB, build_memory

__all__ = ["FP16", "Row", "decoding_bytes", "engine_file_bytes", "make_row", "parts_of", "verdict"]

FP16: Final = "fp16"
"""Name of the row of a pipeline in FP16, whose VAE and ``wo`` of T5 are in FP32."""

_MARGIN: Final = 0.1
"""How far the formula may be off (docs/planning.md): nearer to the GPU's memory than this nobody knows before."""

_ENGINE_OVER_WEIGHTS: Final = 1.015
_ENGINE_OF_NOTHING: Final = 14_000_000
"""Bytes: engines of FLUX.1-dev, klein-4B and the built-in model over their weights (benchmarks/README.md)."""


@dataclass(frozen=True)
class Row:
    """What a form of the weights needs.

    Attributes:
        weights: the form.
        activation_bytes: of the transformer's engine while it runs.
        peaks: of each mode; nothing where the GPU cannot run it.
        loaded_bytes: of all weights, which loading on demand keeps in the host's memory and loads for every picture.
        seconds: least, of a call; None where the GPU cannot run it.
        streamed_seconds: the same where weights are streamed, but for those that there is room for.
        why_not: why there is no such engine for the GPU.
    """

    weights: Weights
    activation_bytes: int
    peaks: Mapping[Mode, Peak]
    loaded_bytes: int
    seconds: float | None
    streamed_seconds: float | None
    why_not: str | None = None

    def as_dict(self, memory: int) -> dict[str, Any]:
        """Return what JSON holds of it."""
        modes = {
            mode: {
                "peak_bytes": peak.nbytes,
                "stage": peak.stage,
                "weights_bytes": peak.weights,
                "workspace_bytes": peak.workspace,
                "runtime_bytes": RUNTIME,
                "fits": peak.nbytes <= memory,
                "verdict": verdict(peak.nbytes, memory),
            }
            for mode, peak in self.peaks.items()
        }
        return {
            "name": self.weights.name,
            "linears": counted_by_format(self.weights.formats),
            "branched_linears": len(self.weights.ranks),
            "fp8_attention": self.weights.fp8_attention,
            "checkpoint_bytes": self.weights.checkpoint_bytes,
            "weights_bytes": self.weights.engine_bytes,
            "activation_bytes": self.activation_bytes,
            "modes": modes,
            "loaded_bytes": self.loaded_bytes,
            "least_seconds_of_loading": self.loaded_bytes / HOST_BANDWIDTH,
            "least_seconds_of_a_call": self.seconds,
            "least_seconds_streaming": self.streamed_seconds,
            "engine_file_bytes": engine_file_bytes(self.weights),
            "build_memory_bytes": build_memory(self.weights.engine_bytes),
            "why_not": self.why_not,
        }


def verdict(peak: int, memory: int) -> str:
    """Return ``fits`` or ``no``, or ``close`` where the formula's error decides."""
    if abs(peak - memory) <= _MARGIN * peak:
        return "close"
    return "fits" if peak < memory else "no"


def engine_file_bytes(weights: Weights) -> int:
    """Return about how large an engine's file is."""
    return int(_ENGINE_OVER_WEIGHTS * weights.engine_bytes) + _ENGINE_OF_NOTHING


def make_row(source: Source, weights: Weights, call: Call, target: Target) -> Row:
    """Return what a form of the weights needs on a GPU."""
    lacking = [kind for kind in weights.kinds if kind not in target.formats and FORMATS[kind].elsewhere is None]
    plain = weights.name if not weights.kinds else ""
    if lacking or (plain and plain not in target.tflops):
        titles = " and ".join(FORMATS[kind].title for kind in lacking) or plain.upper()
        return Row(weights, 0, {}, 0, None, None, f"no {titles} on {target.compute_capability}")
    parts = parts_of(source, weights, call, target)
    peaks = {mode: peak_of(mode, parts) for mode in MODES}
    workspace = next(part.workspace for part in parts if part.streamed is not None)
    room = target.memory_gib * GIB - RUNTIME - workspace
    streamed = max(0, weights.engine_bytes - max(0, room))
    loaded = sum(part.weights for part in parts)
    seconds, streamed_seconds = (call_seconds(call, weights, target, nbytes) for nbytes in (0, streamed))
    return Row(weights, workspace, peaks, loaded, seconds, streamed_seconds)


def parts_of(source: Source, weights: Weights, call: Call, target: Target) -> Sequence[Loaded]:
    """Return what a pipeline holds on the GPU: its transformers, and the components beside them of known size."""
    fp16 = weights.name == FP16 and not weights.kinds
    unpacked = any(kind not in target.formats for kind in weights.kinds)
    workspace = call.activation_bytes() + (2 * weights.largest_linear if unpacked else 0)
    streamed = min(weights.engine_bytes, 2 * weights.largest_bytes)
    transformers = [
        Loaded(f"denoise {number}" if number > 1 else "denoise", weights.engine_bytes, workspace, streamed)
        for number in range(1, source.transformers + 1)
    ]
    beside = [
        Loaded(
            component.stage,
            component.nbytes(fp16) or 0,
            decoding_bytes(component, call, fp16),
        )
        for component in source.components
    ]
    return [*transformers, *beside]


def decoding_bytes(component: Component, call: Call, fp16: bool = False) -> int:
    """Return the workspace of a VAE's decoder, and of the pictures that it gives; 0 for another component."""
    if component.decoder is None:
        return 0
    pixels, width = call.width * call.height, 4 if fp16 else 2
    elements = component.decoder.elements(pixels, call.frames)
    return int(call.pictures * width * (VAE_MAPS * elements + 3 * pixels * call.frames))
