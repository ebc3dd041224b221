"""A session over TensorRT-RTX or TensorRT: an engine on its GPU."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadCall, BadEngine, BadOption, CannotRun
from fp4trt.progress import note
from trt_build.callbacks import LogRecord, make_logger
from trt_build.layer_info import Layer, layers_in_json
from trt_build.runtime.arrays import DeviceArray
from trt_build.runtime.buffers import Allocation, Buffers
from trt_build.runtime.calls import views_of
from trt_build.runtime.card import Card, open_card
from trt_build.runtime.dlpack import CPU, DTYPES, View, array_at
from trt_build.runtime.engine_file import EngineFile, backend_of, require_fit, require_valid
from trt_build.runtime.engine_ports import ports_of
from trt_build.runtime.lora_factors import Factors, factors_for, split_slots
from trt_build.runtime.profile_choice import profile_for, served_by
from trt_build.runtime.runtime_cache import RuntimeCache, cache_path
from trt_build.signature import Port

__all__ = ["Budget", "Cache", "EngineSession", "open_engine"]

Budget = int | Literal["auto"] | None
"""Bytes of weights that stay on the card; all of them by default."""

Cache = Path | Literal[False] | None
"""Where kernels are kept that were compiled here; in fp4trt's cache by default, nowhere if False."""

_ALIGNMENT: Final = 256
"""Bytes to which TensorRT wants its tensors aligned."""

_Key = tuple[Any, ...]


def open_engine(
    path: Path, *, lora: Path | None, cache: Cache, budget: Budget, cuda_graph: bool, device: int
) -> EngineSession:
    """Open an engine on a GPU of this machine.

    Raises:
        BadEngine: it is damaged, or not for the installed version or this GPU.
        BackendMissingError: what runs it is not installed.
        CannotRun: there is no such GPU.
    """
    file = EngineFile.at(path)
    try:
        card = open_card(device)
    except CannotRun as error:
        needed = " or ".join(file.compute_capabilities) or "an NVIDIA GPU"
        raise CannotRun(
            f"{path} needs {needed}, and {error}; run its graph, the .onnx, in ONNX Runtime instead"
        ) from None
    return EngineSession(file, backend_of(file), card, lora=lora, cache=cache, budget=budget, cuda_graph=cuda_graph)


class EngineSession:
    """An engine that is loaded.

    Args:
        file: of the engine.
        trt: its backend, ``tensorrt_rtx`` or ``tensorrt``.
        card: where it runs.
        lora, cache, budget, cuda_graph: see :func:`trt_build.session.open_session`.

    Raises:
        BadEngine, BadLora, BadCheckpoint, BadOption: it, or what is given with it, does not fit.
    """

    def __init__(
        self,
        file: EngineFile,
        trt: Any,
        card: Card,
        *,
        lora: Path | None,
        cache: Cache,
        budget: Budget,
        cuda_graph: bool,
    ) -> None:
        self._lock = threading.RLock()
        self._file, self._trt, self._card, self._record = file, trt, card, LogRecord()
        self._cuda_graph, self._graph = cuda_graph, 0
        self._bound: _Key | None = None
        self._seen: _Key | None = None
        self._opened = contextlib.ExitStack()
        require_fit(file, str(trt.__version__), card)
        if budget is not None:
            _check_budget(file, budget, streams=file.streams_weights is not False)
        try:
            with card.current():
                self._open(lora, cache, budget)
        except BaseException:
            self._opened.close()
            raise

    def _open(self, lora: Path | None, cache: Cache, budget: Budget) -> None:
        """Load the engine and all that lies around it; each step says how it is undone."""
        self._cache: RuntimeCache | None = None
        logger = make_logger(self._trt, self._record)
        runtime = self._trt.Runtime(logger)
        self._held: list[Any] = [logger, runtime]  # what TensorRT refers to as long as there is an engine
        require_valid(self._file, self._trt, runtime, self._card, streaming=budget is not None)
        self._engine = self._loaded(runtime)
        inputs, outputs = ports_of(self._engine, self._trt, self._file)
        called, slots = split_slots(inputs)
        self.inputs: Mapping[str, Port] = MappingProxyType(called)
        self.outputs: Mapping[str, Port] = MappingProxyType(outputs)
        kind, number = self._card.device
        self.device = "cpu" if kind == CPU else f"cuda:{number}"
        self._profiles = served_by(self._engine, list(inputs))
        self._stream_weights(budget)
        self._context = self._made_context(cache)
        self._profile = 0
        self._stream = self._card.stream()
        self._opened.callback(self._card.end_stream, self._stream)
        self._buffers = Buffers(self._card)
        self._opened.callback(self._buffers.close)
        self._factors = self._uploaded(factors_for(slots, lora))

    def _loaded(self, runtime: Any) -> Any:
        with self._file.path.open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BadEngine(f"{self._file.path} cannot be loaded: {self._said()}")
        self._opened.callback(self._forget)
        return engine

    def _said(self) -> str:
        """Return what TensorRT logged as its first error."""
        return " ".join(self._record.errors[0].split())[:400] if self._record.errors else "no reason given"

    def _forget(self) -> None:
        """Let go of TensorRT's objects, each before what it was made by."""
        self._context = None
        if self._cache is not None:
            self._cache.release()
        del self._held[2:]
        self._engine = None
        while self._held:
            self._held.pop()

    def _stream_weights(self, budget: Budget) -> None:
        """Say how many bytes of weights stay on the card; before there is a context."""
        if budget is None:
            return
        most = int(self._engine.streamable_weights_size)
        _check_budget(self._file, budget, streams=most > 0)
        wanted = int(self._engine.get_weight_streaming_automatic_budget()) if budget == "auto" else budget
        self._engine.weight_streaming_budget_v2 = min(wanted, most)
        if int(self._engine.weight_streaming_budget_v2) != min(wanted, most):
            raise BadEngine(f"{self._file.path} does not take a weight streaming budget of {wanted}: {self._said()}")

    def _made_context(self, cache: Cache) -> Any:
        """Return an execution context; of TensorRT-RTX with its own CUDA graphs and the kernels compiled before."""
        if not hasattr(self._trt, "CudaGraphStrategy"):  # TensorRT, which compiled all kernels in the build
            context = self._engine.create_execution_context()
        else:
            config = self._engine.create_runtime_config()
            self._held.append(config)
            strategies = self._trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self._cuda_graph else strategies.DISABLED
            # At once, not beside the first calls: a call then gives the same bits as the one before it.
            config.dynamic_shapes_kernel_specialization_strategy = (
                self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            if cache is not False:
                path = cache or cache_path(self._file.identity, self._card.compute_capability)
                version = str(self._trt.__version__)
                self._cache = RuntimeCache(path, self._file.identity, version, self._card.name, config)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise BadEngine(f"{self._file.path} cannot be started: {self._said()}")
        return context

    def _uploaded(self, factors: Factors) -> dict[str, View]:
        """Return factors of a LoRA on the card, where they stay."""
        views = {}
        for name, values in factors.items():
            pointer = self._buffers.of(name, values.nbytes)
            self._card.copy_in(pointer, values.ctypes.data, values.nbytes, self._stream)
            dtype = next(dtype for dtype, known in DTYPES.items() if known == values.dtype)
            views[name] = View(pointer, values.shape, dtype, self._card.device, None, values)
        self._card.wait(self._stream)
        return views

    def _require_open(self) -> None:
        if self._engine is None:
            raise BadCall("the session is closed; open another")

    def layers(self) -> tuple[Layer, ...]:
        """Return the engine's kernels, as TensorRT tells them of the engine that is loaded."""
        self._require_open()
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return layers_in_json(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    @property
    def cache_was_used(self) -> bool:
        """Whether kernels came from the runtime cache on disk."""
        return self._cache is not None and self._cache.was_used

    def run(self, inputs: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """Return the outputs of one call, on the card, each in its own type.

        Raises:
            BadCall: an input is missing, unknown, not of its type, or of a shape that no profile serves.
            CannotRun: the card's memory does not suffice, or TensorRT failed.
        """
        with self._lock, self._card.current():
            self._require_open()
            self._record.errors.clear()  # what is said of this call is not that of an earlier one
            views = views_of(self.inputs, inputs, self._stream)
            new_shapes = self._set_shapes({name: view.shape for name, view in (views | self._factors).items()})
            addresses = {name: self._address(name, view) for name, view in views.items()}
            addresses |= {name: view.pointer for name, view in self._factors.items()}
            results = self._results()
            fixed = self._cuda_graph
            for name, result in results.items():
                addresses[name] = self._buffers.of(name, result.nbytes) if fixed else result.pointer
            self._enqueue(addresses)
            if fixed:
                for name, result in results.items():
                    self._card.copy(result.pointer, addresses[name], result.nbytes, self._stream)
            self._card.wait(self._stream)
            if new_shapes and self._cache is not None:
                self._cache.save()
            return {name: DeviceArray(view, self._read_back) for name, view in results.items()}

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Tell the context the shapes of a call, and the profile that serves them; return whether they are new."""
        profile = profile_for(self._profiles, shapes)
        key = (profile, tuple(shapes.items()))
        if key == self._bound:
            return False
        self._bound = None
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._stream):
                raise CannotRun(f"TensorRT does not change to profile {profile}: {self._said()}")
            self._card.wait(self._stream)
            self._profile = profile
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise CannotRun(f"TensorRT does not take {name} as {list(shape)}: {self._said()}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise CannotRun(f"TensorRT cannot tell the shapes of its outputs: {error}; {self._said()}") from None
        if missing:
            raise CannotRun(f"TensorRT cannot tell the shapes of its outputs without {', '.join(missing)}")
        self._bound = key
        return True

    def _address(self, name: str, view: View) -> int:
        """Return where the engine reads an input: where it lies, or, copied there, in a buffer that stays in place.

        A CUDA graph holds addresses, so that with one every input is copied, on the card where it lies there.
        """
        if not view.on_card:
            host = np.ascontiguousarray(array_at(view))
            pointer = self._buffers.of(name, view.nbytes)
            self._card.copy_in(pointer, host.ctypes.data, view.nbytes, self._stream)
            return pointer
        if view.device != self._card.device:
            raise BadCall(
                f"the input {name} lies on cuda:{view.device[1]}, and the engine runs on {self.device}; move it"
            )
        if view.strides is not None:
            raise BadCall(f"the input {name} does not lie in row-major order; make it contiguous")
        if not self._cuda_graph and view.pointer and view.pointer % _ALIGNMENT == 0:
            return view.pointer
        pointer = self._buffers.of(name, view.nbytes)
        self._card.copy(pointer, view.pointer, view.nbytes, self._stream)
        return pointer

    def _results(self) -> dict[str, View]:
        """Return memory for the outputs of the shapes that the context was told."""
        views = {}
        for name, port in self.outputs.items():
            shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise CannotRun(f"the size of the output {name} depends on values, which a session does not run")
            size = int(np.prod(shape, dtype=np.int64)) * DTYPES[port.dtype].itemsize
            owner = Allocation(self._card, size)
            views[name] = View(owner.pointer, shape, port.dtype, self._card.device, None, owner)
        return views

    def _enqueue(self, addresses: Mapping[str, int]) -> None:
        """Let the engine compute; with TensorRT, whose context captures nothing itself, by a CUDA graph of ours."""
        key = (self._bound, tuple(addresses.items()))
        if key != self._seen:
            self._drop_graph()
            for name, address in addresses.items():
                if not self._context.set_tensor_address(name, address):
                    raise CannotRun(f"TensorRT does not take an address for {name}: {self._said()}")
        captures = self._cuda_graph and not hasattr(self._trt, "CudaGraphStrategy")
        if captures and key == self._seen and not self._graph:  # the call before made all that has to be made once
            self._capture()
        self._seen = key
        if self._graph:
            self._card.launch(self._graph, self._stream)
        elif not self._context.execute_async_v3(self._stream):
            raise CannotRun(f"TensorRT does not run {self._file.path}: {self._said()}")

    def _capture(self) -> None:
        try:
            self._graph = self._card.capture(self._stream, lambda: bool(self._context.execute_async_v3(self._stream)))
        except CannotRun as error:
            note(f"{self._file.path} runs without a CUDA graph: {error}")
            self._cuda_graph = False

    def _drop_graph(self) -> None:
        self._seen = None
        if self._graph:
            self._card.end_graph(self._graph)
            self._graph = 0

    def _read_back(self, view: View) -> npt.NDArray[Any]:
        """Return values of the card in host memory; also after the session is closed."""
        found = np.empty(view.shape, DTYPES[view.dtype])
        stream = self._card.stream()
        try:
            self._card.copy_out(found.ctypes.data, view.pointer, view.nbytes, stream)
            self._card.wait(stream)
        finally:
            self._card.end_stream(stream)
        return found

    def close(self) -> None:
        """Keep what was compiled, and give the engine's memory back; results that were returned stay valid."""
        with self._lock, self._card.current():
            if self._engine is None:
                return
            if self._cache is not None:
                self._cache.save()
            self._drop_graph()
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_budget(file: EngineFile, budget: int | Literal["auto"], *, streams: bool) -> None:
    """Refuse a budget that is none, or for an engine that streams no weights.

    Raises:
        BadOption
    """
    if not streams:
        raise BadOption(
            f"{file.path} was built to hold all weights on the GPU, and a weight streaming budget was given; build it "
            "with --weight-streaming, or give none"
        )
    if budget != "auto" and (type(budget) is not int or budget < 0):
        raise BadOption(f"the weight streaming budget is {budget!r}; expected bytes, 0 at least, or 'auto'")
