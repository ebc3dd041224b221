"""An NVIDIA GPU by its driver alone: memory, streams and CUDA graphs, without the CUDA toolkit and without torch.

The driver's library is there wherever a GPU is, which is true of no other: the CUDA runtime comes with a toolkit, a
wheel or torch, in as many places and versions. Memory is of the device's primary context, which torch uses too, so that
pointers go either way. :class:`Card` is all that a session needs of a GPU. Source: CUDA driver API, cuda.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from fp4trt.errors import CannotRun
from trt_build.runtime.dlpack import CUDA

__all__ = ["Card", "NvidiaCard", "open_card"]

_THREAD_LOCAL: Final = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate while this one captures."""

_NON_BLOCKING: Final = 1
"""CU_STREAM_NON_BLOCKING: does not wait for the default stream."""

_MAJOR: Final = 75
_MINOR: Final = 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

_OUT_OF_MEMORY: Final = 2
_NO_DEVICE: Final = 100


class Card(Protocol):
    """What a session asks of a GPU. Pointers, streams and graphs are numbers; sizes are bytes.

    Attributes:
        device: its kind and number, as DLPack counts.
        name: for people.
        compute_capability: as TensorRT-RTX writes it, such as SM120.
    """

    device: tuple[int, int]
    name: str
    compute_capability: str

    def current(self) -> contextlib.AbstractContextManager[None]:
        """Make it the one that this thread uses, for what is called within."""
        ...

    def memory(self) -> tuple[int, int]:
        """Return how much is free, and how much there is."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Return memory, 256 bytes aligned."""
        ...

    def free(self, pointer: int) -> None:
        """Give memory back, once all work on the device is done."""
        ...

    def stream(self) -> int:
        """Return a new stream."""
        ...

    def end_stream(self, stream: int) -> None:
        """Destroy a stream."""
        ...

    def wait(self, stream: int) -> None:
        """Return when all work of a stream is done."""
        ...

    def copy_in(self, pointer: int, host: int, nbytes: int, stream: int) -> None:
        """Copy from host memory, which may change when this returns."""
        ...

    def copy_out(self, host: int, pointer: int, nbytes: int, stream: int) -> None:
        """Copy to host memory, which holds it after :meth:`wait`."""
        ...

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy on the device."""
        ...

    def capture(self, stream: int, enqueue: Callable[[], bool]) -> int:
        """Return the CUDA graph of what a function enqueues on a stream; nothing of it runs.

        Raises:
            CannotRun: the function returned False, or did what cannot be captured.
        """
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        ...

    def end_graph(self, graph: int) -> None:
        """Destroy a captured graph."""
        ...


class NvidiaCard:
    """A GPU by NVIDIA's driver.

    Args:
        driver: the driver's library.
        number: of the GPU, as CUDA counts, which CUDA_VISIBLE_DEVICES changes.

    Raises:
        CannotRun: there is no such GPU, or the driver says why not.
    """

    def __init__(self, driver: Any, number: int = 0) -> None:
        self._driver = driver
        self._call("cuInit", 0)
        count, device = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= number < count.value:
            raise CannotRun(f"there is no GPU {number}; expected one of {count.value}, from 0")
        self._call("cuDeviceGet", ctypes.byref(device), number)
        self.device = (CUDA, number)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode(errors="replace")
        self.compute_capability = "SM" + "".join(str(self._attribute(which, device)) for which in (_MAJOR, _MINOR))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def _attribute(self, which: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        """Call the driver.

        Raises:
            CannotRun: it answers with an error.
        """
        status = getattr(self._driver, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown error").decode(errors="replace")
            advice = "; free memory, or give a weight streaming budget" if status == _OUT_OF_MEMORY else ""
            raise CannotRun(f"NVIDIA's driver says of {function}: {said} ({status}){advice}")

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make its primary context this thread's, and what was before it again."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def memory(self) -> tuple[int, int]:
        """Return how much is free, and how much there is."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self.current():
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, nbytes: int) -> int:
        """Return memory; the driver aligns it to 256 bytes at least."""
        pointer = ctypes.c_uint64()
        with self.current():
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give memory back; other streams, such as torch's, may still read it, and are waited for."""
        with self.current():
            self._call("cuCtxSynchronize")
            self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def stream(self) -> int:
        """Return a new stream."""
        stream = ctypes.c_void_p()
        with self.current():
            self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return int(stream.value or 0)

    def end_stream(self, stream: int) -> None:
        """Destroy a stream."""
        with self.current():
            self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def wait(self, stream: int) -> None:
        """Return when all work of a stream is done."""
        with self.current():
            self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def copy_in(self, pointer: int, host: int, nbytes: int, stream: int) -> None:
        """Copy from host memory; from memory that is not pinned the driver has read when it returns."""
        self._copy("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(pointer), ctypes.c_void_p(host), nbytes, stream)

    def copy_out(self, host: int, pointer: int, nbytes: int, stream: int) -> None:
        """Copy to host memory, which holds it after :meth:`wait`."""
        self._copy("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(host), ctypes.c_uint64(pointer), nbytes, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy on the device."""
        self._copy("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source), nbytes, stream)

    def _copy(self, function: str, target: Any, source: Any, nbytes: int, stream: int) -> None:
        if nbytes:
            with self.current():
                self._call(function, target, source, ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))

    def capture(self, stream: int, enqueue: Callable[[], bool]) -> int:
        """Return the CUDA graph of what a function enqueues on a stream; nothing of it runs."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        with self.current():
            self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)
            try:
                enqueued = enqueue()
            finally:  # a stream that still captures is of no more use
                self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
            try:
                if not enqueued:
                    raise CannotRun("TensorRT enqueued nothing")
                self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
            finally:
                self._call("cuGraphDestroy", graph)
        return int(ready.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a captured graph."""
        with self.current():
            self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def end_graph(self, graph: int) -> None:
        """Destroy a captured graph."""
        with self.current():
            self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))


def open_card(number: int = 0) -> Card:
    """Return a GPU of this machine.

    Raises:
        CannotRun: there is none, with the reason.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        raise CannotRun(f"no NVIDIA GPU is here: {name}, a part of its driver, cannot be loaded") from None
    try:
        return NvidiaCard(driver, number)
    except AttributeError as error:
        raise CannotRun(f"NVIDIA's driver here is too old: {error}; install a newer one") from None
    except CannotRun as error:
        if f"({_NO_DEVICE})" in str(error):
            raise CannotRun(f"no NVIDIA GPU is here: {error}") from None
        raise
