"""A GPU in host memory.

Its streams do nothing until they are waited for, and its memory is poisoned when it is given back, so that a session
that does not wait, or reads what it freed, gives wrong values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fp4trt.errors import CannotRun
from trt_build.runtime.dlpack import CPU, CUDA, View, array_at, capsule_of

ALIGNMENT = 256
POISON = 0xA5


class HostCard:
    """A card; ``on_gpu`` says whether it tells others that its memory is a GPU's."""

    def __init__(self, compute_capability: str = "SM120", on_gpu: bool = False, limit: int = 1 << 30) -> None:
        self.device = (CUDA if on_gpu else CPU, 0)
        self.name = "a stand-in"
        self.compute_capability = compute_capability
        self.limit = limit
        self.live: dict[int, tuple[int, np.ndarray]] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capturing: int | None = None
        self.can_capture = True
        self.copies = self.captures = self.launches = 0
        self._next = 1

    def _new(self) -> int:
        self._next += 1
        return self._next

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        yield

    def memory(self) -> tuple[int, int]:
        return self.limit - sum(size for size, _ in self.live.values()), self.limit

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.memory()[0]:
            raise CannotRun("NVIDIA's driver says of cuMemAlloc_v2: out of memory (2)")
        block = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        pointer = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.live[pointer] = (nbytes, block)
        return pointer

    def free(self, pointer: int) -> None:
        self.live.pop(pointer)[1].fill(POISON)

    def stream(self) -> int:
        self.streams[stream := self._new()] = []
        return stream

    def end_stream(self, stream: int) -> None:
        assert not self.streams.pop(stream), "a stream was destroyed with work left"

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        self.streams[stream].append(work)

    def wait(self, stream: int) -> None:
        assert self.capturing is None, "a stream is waited for while it captures"
        waiting, self.streams[stream] = self.streams[stream], []
        for work in waiting:
            work()

    def holds(self, pointer: int, nbytes: int) -> bool:
        return any(start <= pointer and pointer + nbytes <= start + size for start, (size, _) in self.live.items())

    def copy_in(self, pointer: int, host: int, nbytes: int, stream: int) -> None:
        self.copies += 1
        assert self.holds(pointer, nbytes), "copied to memory that nobody has"
        read = _bytes(host, nbytes).copy()
        self.enqueue(stream, lambda: np.copyto(_bytes(pointer, nbytes), read))

    def copy_out(self, host: int, pointer: int, nbytes: int, stream: int) -> None:
        assert self.holds(pointer, nbytes), "read back from memory that nobody has"
        self.enqueue(stream, lambda: np.copyto(_bytes(host, nbytes), _bytes(pointer, nbytes)))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.copies += 1
        assert self.holds(target, nbytes), "copied to memory that nobody has"
        self.enqueue(stream, lambda: np.copyto(_bytes(target, nbytes), _bytes(source, nbytes)))

    def capture(self, stream: int, enqueue: Callable[[], bool]) -> int:
        if not self.can_capture:
            raise CannotRun("operation not permitted when stream is capturing (900)")
        waiting, self.streams[stream] = self.streams[stream], []
        self.capturing = stream
        try:
            assert enqueue()
        finally:
            self.capturing = None
            captured, self.streams[stream] = self.streams[stream], waiting
        self.captures += 1
        self.graphs[graph := self._new()] = captured
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self.launches += 1
        self.streams[stream].extend(self.graphs[graph])

    def end_graph(self, graph: int) -> None:
        del self.graphs[graph]


def _bytes(pointer: int, nbytes: int) -> np.ndarray:
    return array_at(View(pointer, (nbytes,), "UINT8", (CPU, 0), None, None))


class OnGpu:
    """Values that say that they lie on a GPU, aligned as torch aligns them; notes which stream was told to wait."""

    def __init__(self, values: np.ndarray, dtype: str, number: int = 0, offset: int = 0) -> None:
        block = np.zeros(values.nbytes + 2 * ALIGNMENT, np.uint8)
        self.pointer = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT + offset
        self._view = View(self.pointer, values.shape, dtype, (CUDA, number), None, block)
        array_at(self._view)[...] = values
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.device

    def __dlpack__(self, *, stream: int | None = None, **_: object) -> object:
        self.streams.append(stream)
        return capsule_of(self._view)
