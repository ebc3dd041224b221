"""The most memory that a pipeline holds on the GPU, by the mode in which its components are loaded.

``docs/planning.md`` has the formula, where the two fitted constants come from, and what they predict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from trt_build.memory import GIB

__all__ = ["MODES", "RUNTIME", "VAE_MAPS", "Loaded", "Mode", "Peak", "peak_of"]

RUNTIME: Final = int(2.09 * GIB)
"""Bytes that are taken whatever the model: CUDA's context, TensorRT, its kernels, buffers of inputs and outputs, text
encoders' activations. Fitted (docs/planning.md)."""

VAE_MAPS: Final = 4.2
"""How many of its largest feature map a VAE's decoder takes. Fitted (docs/planning.md)."""

Mode = Literal["resident", "on_demand", "streaming"]

MODES: Final[tuple[Mode, ...]] = ("resident", "on_demand", "streaming")
"""All components stay on the GPU; each is loaded for its stage, and freed; likewise, and the transformer's weights are
streamed from the host's memory as they are used."""


@dataclass(frozen=True)
class Loaded:
    """A component as it lies on the GPU.

    Attributes:
        stage: components of one are loaded together.
        weights: bytes.
        workspace: bytes that its engine takes while it runs; engines share the largest.
        streamed: bytes of weights that are enough where they are streamed; None for one that is not.
    """

    stage: str
    weights: int
    workspace: int = 0
    streamed: int | None = None


@dataclass(frozen=True)
class Peak:
    """The most that lies on the GPU at once: bytes of weights and of the workspace, and in which stage."""

    stage: str
    weights: int
    workspace: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights + self.workspace + RUNTIME


def peak_of(mode: Mode, parts: Sequence[Loaded]) -> Peak:
    """Return the peak of a pipeline."""
    if mode == "resident":
        return _together("all", parts)
    if mode == "streaming":
        parts = [part if part.streamed is None else replace(part, weights=part.streamed) for part in parts]
    stages = dict.fromkeys(part.stage for part in parts)
    each = (_together(stage, [part for part in parts if part.stage == stage]) for stage in stages)
    return max(each, key=lambda peak: peak.nbytes)


def _together(stage: str, parts: Iterable[Loaded]) -> Peak:
    parts = list(parts)
    return Peak(stage, sum(part.weights for part in parts), max((part.workspace for part in parts), default=0))
