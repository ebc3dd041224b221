"""A session over ONNX Runtime on the CPU: an exported graph, with the numerics that its engine should have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadCall, BadGraph, CannotRun
from onnx_functions.graph.external_data import load_graph
from onnx_functions.simulation import runtime_session, simulate
from onnx_functions.validation.verdict import runtime_errors
from trt_build.runtime.arrays import DeviceArray, on_host
from trt_build.runtime.calls import views_of
from trt_build.runtime.dlpack import DTYPES, View, array_at
from trt_build.runtime.lora_factors import factors_for, split_slots
from trt_build.signature import Port, signature_of

__all__ = ["GraphSession"]


class GraphSession:
    """An exported graph in ONNX Runtime; its weights stay where they are.

    Args:
        path: what ``fp4trt export`` wrote.
        lora: what ``fp4trt lora`` wrote, for the slots of a graph that has some; without it they are left empty.

    Raises:
        BadGraph: it is no such graph.
        BadLora: the factors are not those of its slots.
        BadCheckpoint: their file is missing or damaged.
    """

    device = "cpu"

    def __init__(self, path: Path, lora: Path | None = None) -> None:
        model = load_graph(path)
        signature = signature_of(model)
        inputs, slots = split_slots({port.name: port for port in signature.inputs})
        self.inputs: Mapping[str, Port] = MappingProxyType(inputs)
        self.outputs: Mapping[str, Port] = MappingProxyType({port.name: port for port in signature.outputs})
        for port in (*signature.inputs, *signature.outputs):
            if port.dtype not in DTYPES:
                raise BadGraph(f"{path}: {port.name} is {port.dtype}; a session serves {', '.join(DTYPES).lower()}")
        self._path = path
        self._factors = {name: _wide(values) for name, values in factors_for(slots, lora).items()}
        try:
            self._session: Any = runtime_session(simulate(model), path.parent)
        except runtime_errors() as error:
            raise BadGraph(f"{path}: ONNX Runtime does not open it: {_first_line(error)}") from None

    def run(self, inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """Return the outputs, each in its own type.

        Raises:
            BadCall: an input is missing, unknown, or not of its type and shape; or the session is closed.
            CannotRun: ONNX Runtime failed.
        """
        if self._session is None:
            raise BadCall("the session is closed; open another")
        given = {name: _wide(_on_cpu(name, view)) for name, view in views_of(self.inputs, inputs).items()}
        try:
            found = self._session.run(list(self.outputs), {**given, **self._factors})
        except runtime_errors() as error:
            empty = ", ".join(name for name, values in given.items() if not values.size)
            told = f" with nothing in {empty}" if empty else ""
            raise CannotRun(f"ONNX Runtime does not run {self._path}{told}: {_first_line(error)}") from None
        return {
            name: on_host(values, port.dtype) for (name, port), values in zip(self.outputs.items(), found, strict=True)
        }

    def close(self) -> None:
        """Give the graph's memory back."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _on_cpu(name: str, view: View) -> npt.NDArray[Any]:
    if view.on_card:
        raise BadCall(f"the input {name} lies on a GPU, and a graph runs on the CPU; move it there")
    return array_at(view)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


def _wide(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return values as a simulation takes them: small floats as FP32."""
    return values.astype(np.float32) if values.dtype.kind == "V" or values.dtype == "bfloat16" else values
