"""A graph in ONNX Runtime, or an engine on its GPU: arrays by name in, arrays by name out. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from fp4trt.errors import UnknownArtifact
from trt_build.runtime.arrays import DeviceArray
from trt_build.signature import Port

__all__ = ["DeviceArray", "Session", "open_session"]


class Session(Protocol):
    """Something that runs: a graph or an engine.

    Attributes:
        inputs: of a call, by name, in order; without the slots for LoRAs, which are filled when the session is opened.
        outputs: likewise.
        device: where it runs: ``cpu``, or a GPU such as ``cuda:0``, which takes arrays in host memory too.
    """

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    device: str

    def run(self, inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """Compute the outputs of one call, and return when they are there.

        Args:
            inputs: name to an array: numpy's, with ml_dtypes' BF16, or any with ``__dlpack__``, such as torch's.

        Raises:
            BadCall: an input is missing, unknown, or not of its type and shape.
        """
        ...

    def close(self) -> None:
        """Give memory back; results that were returned stay valid."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_session(
    path: str | Path,
    *,
    lora: str | Path | None = None,
    runtime_cache: str | Path | Literal[False] | None = None,
    weight_streaming_budget: int | Literal["auto"] | None = None,
    cuda_graph: bool = True,
    device: int = 0,
) -> Session:
    """Open a graph (``.onnx``) in ONNX Runtime on the CPU, or an engine (``.engine``) on its GPU.

    Args:
        path: what ``fp4trt export`` or ``fp4trt build`` wrote; an engine's JSON beside it, where there is one.
        lora: what ``fp4trt lora`` wrote, for the slots of an artifact that has some; without it they are left empty.
        runtime_cache: the file that keeps the kernels which TensorRT-RTX compiles for the card; by default one in
            FP4TRT_CACHE by the engine's hash, and none if False.
        weight_streaming_budget: bytes of weights that stay on the card, of an engine that was built with
            --weight-streaming; "auto" lets TensorRT choose, and by default all of them stay.
        cuda_graph: launch the engine as one CUDA graph. Inputs on the card are then copied to where the graph reads
            them; without it the engine reads them where they lie.
        device: the number of the GPU.

    The last four are an engine's, and say nothing to a graph.

    Raises:
        UnknownArtifact, BadGraph, BadLora, BadCheckpoint: a file is neither, damaged, or not made for the other.
        BadEngine: the engine is damaged, or not for the installed version or this GPU; told before it is loaded.
        BackendMissingError, CannotRun: what runs the engine is not installed, or there is no such GPU.
        BadOption: a budget for an engine that streams no weights.
    """
    path = Path(path)
    factors = None if lora is None else Path(lora)
    if path.suffix == ".onnx":
        from trt_build.runtime.graph import GraphSession

        return GraphSession(path, factors)
    if path.suffix == ".engine":
        from trt_build.runtime.engine import open_engine

        return open_engine(
            path,
            lora=factors,
            cache=Path(runtime_cache) if isinstance(runtime_cache, str | Path) else runtime_cache,
            budget=weight_streaming_budget,
            cuda_graph=cuda_graph,
            device=device,
        )
    raise UnknownArtifact(f"{path} is neither a graph (.onnx) nor an engine (.engine); expected one of these")
