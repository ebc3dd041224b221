"""Engines that ONNX Runtime computes: a module ``tensorrt_rtx``, or ``tensorrt``, for sessions without a GPU.

Its enumerations are TensorRT-RTX's own, and its classes have no member that those of TensorRT-RTX do not have
(test_engine_session.py holds them against each other). It is strict: what the manuals forbid fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from onnx_functions.graph.external_data import load_graph
from onnx_functions.simulation import runtime_session, simulate
from tests.trt_build.stand_in_card import ALIGNMENT, HostCard
from trt_build.runtime.dlpack import CPU, DTYPES, View, array_at
from trt_build.signature import signature_of

HEADER = 64

Profile = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
PROFILES = (
    {"hidden_states": ((1, 16, 128), (1, 16, 128), (1, 16, 128))},
    {"hidden_states": ((1, 8, 128), (2, 32, 128), (2, 64, 128))},
)
"""Of engines of conftest's attention graph."""

Opens = Callable[..., tuple[Any, "StandIn"]]
"""The fixture ``opens``."""


def write_engine(path: Path, capability: str = "SM120", size: int = 4096) -> Path:
    """Write what begins as an engine of TensorRT-RTX does, without JSON beside it."""
    header = bytearray(HEADER)
    header[:4], header[32] = b"vtrt", 1 << Runtime.bits[capability]
    path.write_bytes(bytes(header) + bytes(size - HEADER))
    return path


class Runtime:
    """Reads the header as TensorRT-RTX 1.7.1 writes it: its magic, and a bit for each compute capability."""

    stand_in: StandIn
    bits: ClassVar = {"SM75": 0, "SM80": 1, "SM86": 2, "SM89": 3, "SM120": 4, "SM121": 5}

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.engine_header_size = HEADER

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        trt = self.stand_in
        trt.looked_at.append(bytes(header))
        diagnostics = trt.EngineInvalidityDiagnostics
        if trt.validity is not None:
            return trt.validity
        if len(header) < HEADER or not header.startswith(b"vtrt"):
            return trt.EngineValidity.INVALID, diagnostics.MALFORMED_ENGINE.value
        if not header[32] >> self.bits[trt.card.compute_capability] & 1:
            return trt.EngineValidity.INVALID, diagnostics.UNSUPPORTED_CC.value
        return trt.EngineValidity.VALID, 0

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        trt = self.stand_in
        trt.loaded += 1
        trt.log = lambda text: self._logger.log(trt.ILogger.Severity.ERROR, text)
        if not len(serialized_engine) or trt.broken:
            self._logger.log(
                trt.ILogger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: the plan\nis broken"
            )
            return None
        return ICudaEngine(trt)


class ICudaEngine:
    def __init__(self, trt: StandIn) -> None:
        self.trt = trt
        self.num_io_tensors = len(trt.ports)
        self.num_optimization_profiles = len(trt.profiles)
        self.streamable_weights_size = trt.streamable
        self._budget = trt.streamable

    def get_tensor_name(self, index: int) -> str:
        return list(self.trt.ports)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.trt.DataType, NAMES[self.trt.ports[name].dtype])

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.trt.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.trt.ports[name].dims)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.trt.profiles[profile_index][name]]

    def get_weight_streaming_automatic_budget(self) -> int:
        return self.streamable_weights_size // 2

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        assert not self.trt.contexts, "the budget is set while there is a context"
        self._budget = value

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self.trt)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self.trt)

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> IExecutionContext:
        return IExecutionContext(self.trt, runtime_config)


class EngineInspector:
    def __init__(self, trt: StandIn) -> None:
        self.trt = trt
        self.execution_context: IExecutionContext | None = None

    def get_engine_information(self, format: Any) -> str:
        assert format == self.trt.LayerInformationFormat.JSON
        assert self.execution_context in self.trt.contexts
        return self.trt.inspected


class IRuntimeCache:
    def __init__(self, trt: StandIn) -> None:
        self.trt = trt
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        first, *kernels = blob.decode().split("\n")
        if first != self.trt.driver:
            return False
        self.kernels.update(kernels)
        return True

    def serialize(self) -> bytes:
        return "\n".join([self.trt.driver, *sorted(self.kernels)]).encode()


class IRuntimeConfig:
    def __init__(self, trt: StandIn) -> None:
        self.trt = trt
        self.cuda_graph_strategy = trt.real.CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = trt.real.DynamicShapesKernelSpecializationStrategy.LAZY
        self._cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self.trt)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache


class IExecutionContext:
    def __init__(self, trt: StandIn, config: IRuntimeConfig | None) -> None:
        self.trt = trt
        self._config = config
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._ran = False
        trt.contexts.append(self)

    def get_runtime_config(self) -> IRuntimeConfig | None:
        return self._config

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self.trt.profiles):
            return False
        self._profile, self._shapes = profile_index, {}
        self.trt.profiles_used.append(profile_index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self.trt.refused:
            self.trt.log(f"{name} is refused\nfor a test")
            return False
        low, _, high = self.trt.profiles[self._profile][name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        self._ran = False
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.trt.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        sizes: dict[Any, int] = {}
        for port in self.trt.inputs.values():
            sizes.update(zip(port.dims, self._shapes.get(port.name, [-1] * len(port.dims)), strict=True))
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.trt.ports[name].dims)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not memory or memory % ALIGNMENT:
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt, card = self.trt, self.trt.card
        if self.infer_shapes() or set(self._addresses) != set(trt.ports):
            return False
        if card.capturing is not None and not self._ran:
            raise AssertionError("captured before a first call with these shapes")
        self._ran = True
        cache = self._config.get_runtime_cache() if self._config else None
        if cache is not None:
            trt.compiled += (key := f"{self._profile}{sorted(self._shapes.items())}") not in cache.kernels
            cache.kernels.add(key)
        shapes, addresses = dict(self._shapes), dict(self._addresses)  # a graph holds those of its capture
        outputs = {name: self.get_tensor_shape(name) for name in trt.outputs}
        trt.enqueued.append(addresses)

        def compute() -> None:
            given = {name: _values(trt, name, addresses[name], shape) for name, shape in shapes.items()}
            wide = {
                name: value.astype(np.float32) if value.dtype == DTYPES["BFLOAT16"] else value
                for name, value in given.items()
            }
            found = trt.session.run(list(outputs), wide)
            for (name, shape), value in zip(outputs.items(), found, strict=True):
                assert card.holds(addresses[name], value.size * DTYPES[trt.ports[name].dtype].itemsize)
                target = _values(trt, name, addresses[name], shape)
                target[...] = value.astype(target.dtype)

        card.enqueue(stream_handle, compute)
        return True


def _values(trt: StandIn, name: str, pointer: int, shape: tuple[int, ...]) -> np.ndarray:
    return array_at(View(pointer, shape, trt.ports[name].dtype, (CPU, 0), None, None))


NAMES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64", "INT32": "INT32", "BOOL": "BOOL"}
REPLACED = (Runtime, ICudaEngine, EngineInspector, IRuntimeCache, IRuntimeConfig, IExecutionContext)
"""Classes that the module has in the place of TensorRT-RTX's."""

OURS = {"trt", "stand_in", "bits", "kernels"}
"""Their members that are the stand-in's own."""


class StandIn:
    """A module that loads any engine as the given graph.

    Args:
        graph: what computes.
        profiles: of the engine: input to its least, best and largest shape.
        card: where it runs.
        generation: ``tensorrt_rtx``; or ``tensorrt``, which has no CUDA graphs of its own, no runtime cache, and is not
            asked whether an engine is valid.
    """

    def __init__(
        self,
        graph: Path,
        profiles: Sequence[Profile],
        card: HostCard,
        generation: str = "tensorrt_rtx",
        streamable: int = 0,
    ) -> None:
        import tensorrt_rtx

        model = load_graph(graph)
        signature = signature_of(model)
        self.real, self.card, self.profiles, self.streamable = tensorrt_rtx, card, profiles, streamable
        self.inputs = {port.name: port for port in signature.inputs}
        self.outputs = {port.name: port for port in signature.outputs}
        self.ports = self.inputs | self.outputs
        self.session = runtime_session(simulate(model), graph.parent)
        self.driver, self.broken, self.validity = "driver 1", False, None
        self.inspected = '{"Layers": []}'
        self.refused: set[str] = set()
        self.log: Any = None
        self.loaded = self.compiled = 0
        self.contexts: list[IExecutionContext] = []
        self.enqueued: list[dict[str, int]] = []
        self.profiles_used: list[int] = []
        self.looked_at: list[bytes] = []
        self.__version__ = tensorrt_rtx.__version__
        members: dict[str, Any] = {"stand_in": self}
        if generation == "tensorrt":
            members["get_engine_validity"] = property(_absent)
        else:
            self.CudaGraphStrategy = tensorrt_rtx.CudaGraphStrategy
        self.Runtime = type("Runtime", (Runtime,), members)

    def __getattr__(self, name: str) -> Any:
        if name in ("CudaGraphStrategy",):
            raise AttributeError(name)
        return getattr(self.real, name)


def _absent(_: object) -> Any:
    raise AttributeError("get_engine_validity")
