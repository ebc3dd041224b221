"""Quantize in one pass: every byte of the source is read, hashed and checked in order, and packed while it is at hand.

A weight can be packed as soon as the largest weights of all the linears that it shares its scale with are known. They
lie close together in any usual checkpoint, so that the second reading comes from the system's cache. Where they do not,
it comes from the disk, and nothing else changes. The bytes of the result do not depend on the order of the work.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from calibration.checkpoints.file_reader import FileReader
from calibration.checkpoints.layout import Groups, ShardFiles, seal
from calibration.formats import input_quantizers, shared_scales
from calibration.formats.arithmetic import Pack, arithmetic_of
from calibration.formats.bfloat16 import bits_of, fp32_pieces_of, pieces_of
from fp4trt.number_formats import FORMATS, NVFP4, NumberFormat
from fp4trt.safetensors_file import DTYPE_BYTES, StoredTensor

__all__ = ["MEMORY", "Done", "Work", "estimated_seconds", "is_large", "quantize_in_one_pass"]

_PIECE: Final = 1 << 21
"""Weights that one job packs: 4 MiB in BF16."""

_BEHIND: Final = 64
"""Pieces that wait to be packed, before no file is read on."""

NOTE_EVERY: Final = 5.0
"""Seconds after which what has been done is brought to disk and noted."""


def _workers() -> int:
    """Return how many threads share the work: one a processor, at most 8."""
    return min(os.cpu_count() or 1, 8)


MEMORY: Final = 2 * _workers() * 3 * _PIECE
"""Bytes, about: what the jobs read and make."""


@dataclass
class Done:
    """What is finished, as the next run is told of it.

    Attributes:
        sha256: name of each file of the source that was read to its end, to its hash.
        amax: name of each tensor of the source that was read, to its largest magnitude in BF16.
        written: tensors of the source whose results are on disk, and prepared ones that are.
        files: name of each file of the result that is whole, to its hash.
        errors: name of each packed weight that shares its scale, to what that costs it.
        tensors: name of each tensor of the source that was read in another order than the file's, to its hash.
    """

    sha256: dict[str, str] = field(default_factory=dict)
    amax: dict[str, float] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    errors: dict[str, shared_scales.Errors] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a copy as JSON holds it; ``Done(**d)`` undoes this, because JSON keeps every float."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        sources: files to read.
        stored: name to tensor of the plain checkpoint.
        groups: the quantized linears that read the same input, and share what their format says.
        formats: module path of each of them to its format.
        input_amax: module path to the largest magnitude of its input, alike in a group; of those that are packed here.
        prepared: tensors of the result that are made already; they are copied.
        device: where to pack, ``cpu`` or ``cuda``.
    """

    sources: Sequence[Path]
    stored: Mapping[str, StoredTensor]
    groups: Groups
    formats: Mapping[str, str]
    input_amax: Mapping[str, float]
    prepared: Mapping[str, StoredTensor] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes that are read in all: of what is packed or copied twice, as it were."""
        made = [tensor.nbytes for name, tensor in self.stored.items() if name not in self.prepared]
        copied = (tensor.nbytes for tensor in self.prepared.values())
        return sum(tensor.nbytes for tensor in self.stored.values()) + sum(made) + sum(copied)


Job = Callable[[], Any]
Then = Callable[[Any], None]
"""What is done with a job's result, on the thread that hands out the jobs."""


def quantize_in_one_pass(
    work: Work, files: ShardFiles, done: Done, note: Callable[[dict[str, Any]], None], progress: Callable[[int], object]
) -> None:
    """Read, pack and write what is not done yet.

    Args:
        work: what is to be done.
        files: of the result; what ``done`` calls written is in them.
        done: what is finished, which grows to everything.
        note: called, every few seconds and on another thread, with what is on disk by then.
        progress: called as bytes of the source are read, and again as they are packed; first with those that need
            neither.

    Raises:
        BadCheckpoint: a tensor of the source is not finite, not floating-point, or overlaps another.
        BadAmax: a weight has no global scale.
    """
    with ThreadPoolExecutor(2 * _workers()) as pool, ThreadPoolExecutor(1) as beside:
        try:
            _Pass(work, files, done, progress).run(pool, beside, note)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            beside.shutdown(cancel_futures=True)
            raise


def is_large(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether tensors would fill so much of the system's cache that it had better forget what was read."""
    return sum(tensor.nbytes for tensor in stored.values()) > _memory() // 2


def estimated_seconds(read: int, written: int) -> float:
    """Return about how long hashing and packing take here, from doing a little of both.

    Args:
        read: bytes of the source.
        written: bytes of the result.
    """
    bits = np.random.default_rng(0).integers(0x3800, 0x3F00, (1024, 4096), np.uint16)
    arithmetic = arithmetic_of(NVFP4.name)
    pack = arithmetic.packer(arithmetic.tensor_scale(1.0), "cpu")
    pack(bits)
    start = time.perf_counter()
    pack(bits)
    packed = time.perf_counter()
    hashlib.sha256(bits.data)
    hashed = time.perf_counter()
    return (read * (hashed - start) + written * (hashed - packed)) / bits.nbytes / _workers()


class _Pass:
    """Hands out the jobs; all of its state belongs to one thread."""

    def __init__(self, work: Work, files: ShardFiles, done: Done, progress: Callable[[int], object]) -> None:
        self._work, self._files, self._done, self._progress = work, files, done, progress
        self._readers = deque(
            FileReader(file, work.stored, progress) for file in work.sources if file.name not in done.sha256
        )
        self._ready: deque[tuple[Job, Then]] = deque()
        self._group_of = {f"{path}.weight": group for group in work.groups for path in group}
        self._written = set(done.written)
        self._missing: dict[str, int] = {}  # tensor to how many of its jobs are not done
        self._sealed = {path for path in files.whole() if path.name in done.files}
        self._forgets = is_large(work.stored)
        self._reading = 0  # files
        self._noted, self._noted_at = len(done.written), time.monotonic()

    def run(self, pool: ThreadPoolExecutor, beside: ThreadPoolExecutor, note: Callable[[dict[str, Any]], None]) -> None:
        unread = {reader.file for reader in self._readers}
        for name, stored in self._work.stored.items():
            packed = name in self._written and name not in self._work.prepared
            self._progress(stored.nbytes * ((stored.file not in unread) + packed))
            if name in self._done.amax or stored.file not in unread:
                self._seen(name)
        for name, stored in self._work.prepared.items():
            if name in self._written:
                self._progress(stored.nbytes)
            else:
                self._add(name, [functools.partial(self._transfer, name)])
        working: dict[Future[Any], Then] = {}
        saving: dict[Future[Any], Then] = {}
        while True:
            while len(working) < 2 * _workers() and (task := self._next()):
                working[pool.submit(task[0])] = task[1]
            for path in set(self._files.whole()) - self._sealed:
                self._sealed.add(path)
                saving[beside.submit(seal, path)] = functools.partial(self._done.files.__setitem__, path.name)
            if not saving and self._is_worth_noting():
                saving[beside.submit(self._save, note, self._done.as_dict())] = _nothing
                self._noted, self._noted_at = len(self._done.written), time.monotonic()
            if not working and not saving:
                return
            for future in wait([*working, *saving], return_when=FIRST_COMPLETED).done:
                then = working.pop(future, None) or saving.pop(future)
                then(future.result())

    def _is_worth_noting(self) -> bool:
        return len(self._done.written) > self._noted and time.monotonic() - self._noted_at >= NOTE_EVERY

    def _next(self) -> tuple[Job, Then] | None:
        """Return a job: some read on, so that the disk is never idle, unless packing lags behind them."""
        behind = len(self._ready) >= _BEHIND or (self._ready and self._reading >= _workers())
        if self._readers and not behind:
            reader = self._readers.popleft()
            self._reading += 1
            return reader.advance, functools.partial(self._read, reader)
        return self._ready.popleft() if self._ready else None

    def _read(self, reader: FileReader, found: tuple[str, float] | None) -> None:
        self._reading -= 1
        if found is None:
            self._done.sha256[reader.file.name] = reader.sha256
            return
        self._readers.appendleft(reader)
        name, amax = found
        self._done.amax[name] = amax
        self._seen(name)

    def _seen(self, name: str) -> None:
        """Make the jobs that the maximum of a tensor was the last to wait for."""
        if name in self._written or name in self._missing or name in self._work.prepared:
            return
        group = self._group_of.get(name)
        if group is None:
            self._add(name, [functools.partial(self._copy, name)])
            return
        kind = FORMATS[self._work.formats[group[0]]]
        together = group if kind.shares_weight_scale else (name.removesuffix(".weight"),)
        if all(f"{path}.weight" in self._done.amax for path in together):
            own = input_quantizers.checked_weights({path: self._done.amax[f"{path}.weight"] for path in together})
            arithmetic = arithmetic_of(kind.name)
            common = max(own.values())
            scale = arithmetic.tensor_scale(common)
            pack = arithmetic.packer(scale, self._work.device)
            for path in together:
                if f"{path}.weight" not in self._written:
                    jobs = self._packing(path, kind, pack, scale)
                    if kind.shares_weight_scale:
                        weight = self._work.stored[f"{path}.weight"]
                        jobs.append(
                            functools.partial(shared_scales.measure_errors, weight, kind.name, own[path], common)
                        )
                    self._add(f"{path}.weight", jobs)

    def _add(self, name: str, jobs: Sequence[Job]) -> None:
        self._missing[name] = len(jobs)
        self._ready.extend((job, functools.partial(self._did, name)) for job in jobs)

    def _did(self, name: str, errors: shared_scales.Errors | None) -> None:
        """Count a job as done; the one that measures errors returns them."""
        if errors is not None:
            self._done.errors[name] = errors
        self._missing[name] -= 1
        if not self._missing[name]:
            self._written.add(name)
            self._done.written.append(name)
            if self._forgets:
                (self._work.prepared.get(name) or self._work.stored[name]).forget()

    def _packing(self, path: str, kind: NumberFormat, pack: Pack, scale: torch.Tensor) -> list[Job]:
        rows, columns = self._work.stored[f"{path}.weight"].shape
        together = max(1, _PIECE // columns)
        jobs: list[Job] = [functools.partial(self._put_scales, path, kind, scale)]
        jobs += [
            functools.partial(self._pack, path, pack, begin, min(begin + together, rows))
            for begin in range(0, rows, together)
        ]
        return jobs

    def _put_scales(self, path: str, kind: NumberFormat, weight_scale: torch.Tensor) -> None:
        if kind.weight_scale is not None:
            self._files.put(f"{path}.{kind.weight_scale}", 0, weight_scale.numpy())
        for leaf in (scale.leaf for scale in kind.scales if scale.of_input):
            scale = arithmetic_of(kind.name).tensor_scale(self._work.input_amax[path])
            self._files.put(f"{path}.{leaf}", 0, scale.numpy())

    def _pack(self, path: str, pack: Pack, begin: int, end: int) -> None:
        stored = self._work.stored[f"{path}.weight"]
        columns = stored.shape[1]
        for leaf, data in pack(bits_of(stored, begin * columns, end * columns).reshape(-1, columns)).items():
            row = data.nbytes // (end - begin)
            self._files.put(f"{path}.{leaf}", begin * row, data)
        self._progress((end - begin) * columns * DTYPE_BYTES[stored.dtype])

    def _copy(self, name: str) -> None:
        begin, stored = 0, self._work.stored[name]
        pieces: Iterator[npt.NDArray[Any]]
        pieces = fp32_pieces_of(stored) if self._files.dtype(name) == "F32" else pieces_of(stored)
        for piece in pieces:
            self._files.put(name, begin, piece)
            begin += piece.nbytes
        self._progress(stored.nbytes)

    def _transfer(self, name: str) -> None:
        """Copy what is prepared, whatever its type."""
        begin = 0
        for piece in self._work.prepared[name].pieces():
            self._files.put(name, begin, piece)
            begin += piece.nbytes
        self._progress(begin)

    def _save(self, note: Callable[[dict[str, Any]], None], snapshot: dict[str, Any]) -> None:
        self._files.sync()
        note(snapshot)


def _memory() -> int:
    """Return the bytes of memory that the machine has; where the system does not say, more than any checkpoint."""
    ask: Callable[[str], int] | None = getattr(os, "sysconf", None)  # Windows has none, nor a hint to drop anything
    return ask("SC_PAGE_SIZE") * ask("SC_PHYS_PAGES") if ask else sys.maxsize


def _nothing(_: object) -> None:
    pass
