"""Quantize block by block where that needs the model's own activations: each method is one function of a block.

Each block is loaded once, by one of some workers, of which this process may be the only one
(:mod:`calibration.by_block.workers`). What it becomes lies on disk before it counts as finished, in the result itself
or in a file for each block (:class:`Sink`); a run that was killed resumes with its unfinished blocks.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from calibration.by_block.measure_amax import OUTSIDE, identity_of, require_device
from calibration.by_block.one_block import (
    BlockResult,
    BlockTask,
    Job,
    Method,
    OpenReader,
    Order,
    Ran,
    Run,
    held_calls,
)
from calibration.by_block.progress import BlockCheckpoint, Stored, finished_blocks
from calibration.by_block.workers import Crew, Died, OpenCrew, in_this_process
from calibration.checkpoints.file_reader import ReadTensors
from calibration.checkpoints.plain import PlainCheckpoint, open_plain
from calibration.formats.shared_scales import SHARING
from calibration.inputs.captured import Inputs
from fp4trt.errors import BadEnvironment
from fp4trt.number_formats import BF16, FORMATS
from fp4trt.progress import note, tracking
from fp4trt.safetensors_file import StoredTensor, TensorPlan, tensors_in_file, write

__all__ = ["BlockResult", "BlockTask", "Method", "OpenSink", "Prepared", "Run", "Sink", "prepared_by_block"]

DEATHS: Final = 3
"""Workers that one block may cost."""


class Sink(Protocol):
    """Reads the plain checkpoint, and writes what becomes of it."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Where the tensors that were put lie, for a sink that keeps them for others."""
        ...

    @property
    def reader(self) -> OpenReader:
        """Opens what reads the plain checkpoint for a worker; can be pickled."""
        ...

    def put(
        self, block: str, tensors: Mapping[str, StoredTensor], amax: Mapping[str, float], read: ReadTensors
    ) -> None:
        """Bring a block to disk, in any order, and as :data:`OUTSIDE` the rest of the model.

        Args:
            block: its path.
            tensors: as :attr:`BlockResult.tensors`, and the scales of attentions in FP8.
            amax: of each quantizer.
            read: what was read of it.
        """
        ...


OpenSink = Callable[[BlockCheckpoint], AbstractContextManager[Sink]]
"""Opens a sink for the unfinished blocks; has the checkpoint forget the finished ones where their tensors are lost."""


@dataclass(frozen=True)
class Prepared:
    """What is decided before the checkpoint is written.

    Attributes:
        tensors: name in the quantized checkpoint to where the value lies.
        figures: block to what the method measured there.
        amax: of each quantizer that a method has decided or measured, such as ``X.input_quantizer``.
        outside: module path to amax of the input of each linear outside the blocks, which are rounded to nearest.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    amax: Mapping[str, float] = field(default_factory=dict)
    outside: Mapping[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def prepared_by_block(
    folder: Path,
    calls: Sequence[Inputs],
    formats: Mapping[str, str],
    method: Method,
    recipe: Mapping[str, Any],
    work: Path,
    device: str = "cpu",
    fp8_attentions: Sequence[str] = (),
    into: OpenSink | None = None,
    crew: OpenCrew = in_this_process,
) -> Iterator[Prepared]:
    """Quantize a plain checkpoint block by block; what comes of it is there until the end of the ``with`` statement.

    In memory at a time: for each worker one block, what lies outside the blocks, one call, and what the method keeps.
    On disk, beside the result: the inputs of each block that is being worked on, and of the next one.

    Args:
        folder: a plain checkpoint.
        calls: captured inputs.
        formats: full module path to format; ``bf16`` for what stays as it is.
        method: what quantizes a block.
        recipe: what the result depends on besides, as JSON.
        work: folder for what is finished, as :func:`calibration.by_block.progress.finished_blocks` has it.
        device: where to compute, ``cpu`` or ``cuda``.
        fp8_attentions: module paths of the attentions that get scales, from what the plain model gives them.
        into: opens the sink that the blocks go to; None for a file for each in ``work``.
        crew: opens the workers that share the blocks.

    Raises:
        BadCheckpoint, BadInputs, BadAmax, OutputExists: naming what is wrong.
        BadEnvironment: the worker of a block dies again and again.
    """
    require_device(device)
    source = open_plain(folder.resolve())
    blocks = source.family.blocks(source.config)
    identity = {**identity_of(folder, source.config, calls, device), "recipe": dict(recipe), "formats": dict(formats)}
    identity |= {"results": "amax, figures", "scales": SHARING}
    scaled = {path for path, kind in formats.items() if kind != BF16 and FORMATS[kind].needs_input_amax}
    outside = tuple(path for group in source.family.outside for path in group.linears if path in scaled)
    open_sink = into or partial(_files, blocks)
    with finished_blocks(work, identity) as finished, open_sink(finished) as sink:
        given = held_calls(calls), formats, method, tuple(fp8_attentions), outside
        job = Job(source.folder, work.resolve(), *given, sink.reader, device)
        with crew(job, source, calls) as workers, tracking(len(blocks), "quantizing blocks") as advance:
            entering = _Schedule(blocks, finished, sink, workers, bool(outside)).run(advance)
        results = {block: finished.results[block] for block in blocks}
        amax = {name: value for result in results.values() for name, value in result["amax"].items()}
        figures = {block: result["figures"] for block, result in results.items() if result["figures"]}
        yield Prepared(sink.tensors, figures, amax, entering)


class _Schedule:
    """Hands out the blocks: one may begin when that before it has run once, and a worker is free.

    The inputs of a block stay until it is finished, so that a worker that dies costs that block alone.
    """

    def __init__(
        self, blocks: Sequence[str], finished: BlockCheckpoint, sink: Sink, workers: Crew, to_measure_outside: bool
    ) -> None:
        self._paths, self._finished, self._sink, self._workers = (*blocks, OUTSIDE), finished, sink, workers
        self._last_read = len(blocks) if to_measure_outside else len(blocks) - 1
        self._waiting = [index for index, path in enumerate(self._paths) if path not in finished.results]
        self._running: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._outside: dict[str, float] = {}

    def run(self, advance: Callable[..., None]) -> dict[str, float]:
        """Bring every block to the sink; return module path to amax of the input of each linear outside them."""
        advance(len(self._paths) - len(self._waiting))
        while self._waiting or self._running:
            self._hand_out()
            index, said = self._workers.wait()
            if isinstance(said, Ran):
                self._finished.ran(index, said.outputs)
                continue
            self._running.remove(index)
            if isinstance(said, Died):
                self._again(index, said)
                continue
            self._sink.put(self._paths[index], said.tensors, said.amax, said.read)
            if self._paths[index] == OUTSIDE:
                self._outside = {name.removesuffix(".input_quantizer"): value for name, value in said.amax.items()}
            else:
                result = {"amax": said.amax, "figures": said.figures}
                self._finished.finish(self._paths[index], result, index)
                advance()
        return self._outside

    def _hand_out(self) -> None:
        for index in list(self._waiting):
            if len(self._running) == self._workers.size:
                return
            if (entering := self._entering(index)) is not None:
                self._waiting.remove(index)
                self._running.add(index)
                self._workers.start(Order(index, self._paths[index], entering, self._outputs(index)))

    def _entering(self, index: int) -> Stored | None:
        """Return what enters a block, if it is there; where nothing outside the blocks is measured, that comes last."""
        if index <= self._last_read:
            return self._finished.entering(index)
        return () if self._waiting == [index] else None

    def _outputs(self, index: int) -> Path | None:
        """Return where a block's outputs go, unless nobody reads them any more, or they are there."""
        behind = index + 1
        wanted = behind <= self._last_read and self._paths[behind] not in self._finished.results
        return self._finished.outputs_of(index) if wanted and self._finished.entering(behind) is None else None

    def _again(self, index: int, died: Died) -> None:
        """Let a block be done again whose worker has died.

        Raises:
            BadEnvironment: it has died too often.
        """
        path = self._paths[index]
        self._deaths[index] += 1
        if self._deaths[index] == DEATHS:
            raise BadEnvironment(f"the worker of {path} died {DEATHS} times; the last one {died.why}")
        note(f"warning: the worker of {path} {died.why}; the block is done again")
        self._waiting = sorted([*self._waiting, index])


@dataclass(frozen=True)
class _PlainReader:
    """Reads a plain checkpoint for a sink that needs no more than the method's tensors."""

    source: PlainCheckpoint

    def tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name)

    def take(self, _: str = "") -> ReadTensors:
        return ReadTensors()


@dataclass(frozen=True)
class _BlockFiles:
    """Keeps what each block became in a file of its own."""

    blocks: Sequence[str]
    folder: Path
    reader = _PlainReader

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        files = [self._file(block) for block in self.blocks]
        return {name: place for file in files for name, place in tensors_in_file(file).items()}

    def put(self, block: str, tensors: Mapping[str, StoredTensor], _: Mapping[str, float], __: ReadTensors) -> None:
        plan = [TensorPlan(name, value.dtype, value.shape) for name, value in tensors.items()]
        pieces = ((name, piece) for name, value in tensors.items() if value.nbytes for piece in value.pieces())
        write(self._file(block), plan, pieces, {"format": "fp4trt-block"})

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _files(blocks: Sequence[str], finished: BlockCheckpoint) -> AbstractContextManager[Sink]:
    return contextlib.nullcontext(_BlockFiles(blocks, finished.folder))
