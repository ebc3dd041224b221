"""One block at a time: what a method is given, what it gives, and who runs it.

A :class:`Worker` knows a model block by block. Given the inputs that a block has in the plain model, a method quantizes
it independently of all others, so that several workers, here or elsewhere, can share the blocks. The method's first run
of a block gives the inputs of the block behind it, which another worker may then begin with: nothing runs twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from calibration.by_block.measure_amax import OUTSIDE, measured_outside
from calibration.by_block.progress import OutputsFile, Stored
from calibration.by_block.runner import BlockRunner, Outputs
from calibration.checkpoints.file_reader import ReadTensors
from calibration.checkpoints.plain import PlainCheckpoint, open_plain
from calibration.formats.attention_amax import OperandAmax
from calibration.formats.fp8_attention import attention_quantizers, attention_scales
from calibration.inputs.captured import Inputs
from fp4trt.number_formats import BF16
from fp4trt.safetensors_file import HeldTensor, StoredTensor, hold

__all__ = [
    "BlockResult",
    "BlockTask",
    "Finished",
    "Job",
    "Method",
    "OpenReader",
    "Order",
    "Ran",
    "Reader",
    "Run",
    "Worker",
    "held_calls",
]


class Run(Protocol):
    """Runs a block on all captured calls."""

    def __call__(self, wanted: Iterable[nn.Module] = ()) -> None:
        """Run; a call may end where the wanted modules have been reached, if there are any."""


@dataclass(frozen=True)
class BlockTask:
    """One block that is to be quantized.

    Attributes:
        path: module path, such as ``transformer_blocks.0``.
        module: the block as the checkpoint has it, in BF16, on the device; may be changed freely once it has run.
        linears: full module path to format (``nvfp4``, ...) of those that are quantized, in graph order.
        groups: those of them that read the same input and share their scales.
        run: runs the block on the inputs that it has in the plain model, for all captured calls; as often as wanted.
            Given some of its modules, it need not continue in a call where these have been reached.
    """

    path: str
    module: nn.Module
    linears: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]
    run: Run

    def linear(self, path: str) -> nn.Module:
        """Return one of the block's modules by its full path."""
        return self.module.get_submodule(self.inside(path))

    def inside(self, path: str) -> str:
        """Return a module's path in the block."""
        return path.removeprefix(f"{self.path}.")


@dataclass(frozen=True)
class BlockResult:
    """What a block became.

    Attributes:
        tensors: name in the quantized checkpoint to value, in the type that it is stored in: whatever differs from what
            the plain checkpoint has. A method that changes weights gives those of all quantized linears; one that only
            measures gives none, and leaves them to be rounded to nearest.
        figures: what the method measured, as JSON, for the manifest.
        amax: of each quantizer of the linears that it has quantized, such as ``X.input_quantizer``.
    """

    tensors: Mapping[str, torch.Tensor]
    figures: Mapping[str, Any] = field(default_factory=dict)
    amax: Mapping[str, float] = field(default_factory=dict)


Method = Callable[[BlockTask], BlockResult]
"""Can be pickled where other processes are to work by it."""


class Reader(Protocol):
    """Reads a plain checkpoint for a worker."""

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor, in BF16, or in FP32 where the model computes with it so."""
        ...

    def take(self, prefix: str = "") -> ReadTensors:
        """Return what was read under names that begin so, for the sink; nothing where that needs nothing."""
        ...


OpenReader = Callable[[PlainCheckpoint], Reader]


@dataclass(frozen=True)
class Job:
    """What all workers of a run have to know, without a tensor of torch's: it goes to other processes.

    Attributes:
        folder: the plain checkpoint.
        work: folder that blocks' outputs go to.
        calls: captured inputs (:func:`held_calls`).
        formats: full module path to format; ``bf16`` for what stays as it is.
        method: what quantizes a block.
        fp8_attentions: module paths of the attentions that get scales, from what the plain model gives them.
        outside: module paths of the linears outside the blocks whose input is measured.
        reader: opens what reads the checkpoint.
        device: where to compute.
    """

    folder: Path
    work: Path
    calls: Sequence[Mapping[str, HeldTensor]]
    formats: Mapping[str, str]
    method: Method
    fp8_attentions: tuple[str, ...]
    outside: tuple[str, ...]
    reader: OpenReader
    device: str


def held_calls(calls: Sequence[Inputs]) -> list[dict[str, HeldTensor]]:
    """Return captured inputs as plain bytes, not copied."""
    return [{name: hold(name, value) for name, value in call.items()} for call in calls]


@dataclass(frozen=True)
class Order:
    """One block for a worker; behind the last one, what lies outside the blocks.

    Attributes:
        index: of the block, in the order in which the model runs them.
        path: of it, or :data:`OUTSIDE`.
        entering: where what enters it lies, for every call; empty for the first.
        outputs: the file for what it gives; None where nobody needs that, or has it.
    """

    index: int
    path: str
    entering: Stored
    outputs: Path | None


@dataclass(frozen=True)
class Ran:
    """A block has run once.

    Attributes:
        outputs: where that lies which enters the next one.
    """

    outputs: Stored


@dataclass(frozen=True)
class Finished:
    """What a block became.

    Attributes:
        tensors: as :attr:`BlockResult.tensors`, and the scales of attentions in FP8.
        figures: what the method measured.
        amax: of each quantizer.
        read: of the plain checkpoint, for the sink.
    """

    tensors: Mapping[str, StoredTensor]
    figures: Mapping[str, Any]
    amax: Mapping[str, float]
    read: ReadTensors


class Worker:
    """Quantizes blocks of one model, one after another; in memory is one block and what lies outside the blocks.

    Args:
        job: of the run.
        source: the job's plain checkpoint.
        calls: the job's captured inputs.

    Attributes:
        config: of the model.
    """

    def __init__(self, job: Job, source: PlainCheckpoint, calls: Sequence[Inputs]) -> None:
        self._job, self._source, self._calls = job, source, calls
        self._reader = job.reader(source)
        self.config, family = source.config, source.family
        self._groups = [group for group in family.groups(self.config) if job.formats[group[0]] != BF16]
        self._runner = BlockRunner(
            source.model, family.blocks(self.config), self._reader.tensor, job.device, family.read_by
        )

    @classmethod
    def of(cls, job: Job) -> Worker:
        """Return a worker in another process than that which made the job."""
        calls = [{name: value.tensor() for name, value in call.items()} for call in job.calls]
        return cls(job, open_plain(job.folder), calls)

    def work(self, order: Order, say: Callable[[Ran], object]) -> Finished:
        """Quantize a block, or measure what enters the linears outside the blocks.

        Args:
            order: which one.
            say: told once the block has run on all calls, if its outputs are wanted.
        """
        return self._outside(order) if order.path == OUTSIDE else self._block(order, say)

    def _block(self, order: Order, say: Callable[[Ran], object]) -> Finished:
        job, block = self._job, order.path
        inside = tuple(group for group in self._groups if group[0].startswith(f"{block}."))
        attentions = [path for path in job.fp8_attentions if path.startswith(f"{block}.")]
        with self._runner.loaded(block) as module:
            run = _Run(self._runner, order, self._calls, attentions, say)
            linears = {path: job.formats[path] for group in inside for path in group}
            result = job.method(BlockTask(block, module, linears, inside, run))
            run.require()
            tensors = {**result.tensors, **attention_scales(run.operands.amax, attentions)}
            held = {name: hold(name, value) for name, value in tensors.items()}
        amax = {**result.amax, **attention_quantizers(run.operands.amax, attentions)}
        return Finished(held, dict(result.figures), amax, self._reader.take(f"{block}."))

    def _outside(self, order: Order) -> Finished:
        job, measured = self._job, {}
        if job.outside:
            model, before = self._source.model, lambda index: _loaded(order.entering[index])
            measured = measured_outside(self._runner, model, job.outside, self._calls, before, lambda _: None)
        amax = {f"{path}.input_quantizer": value for path, value in measured.items()}
        return Finished({}, {}, amax, self._reader.take())


class _Run:
    """Runs a block on all calls; first it measures attention, and keeps the outputs: the inputs of the next block."""

    def __init__(
        self,
        runner: BlockRunner,
        order: Order,
        calls: Sequence[Inputs],
        attentions: Sequence[str],
        say: Callable[[Ran], object],
    ) -> None:
        self._runner, self._order, self._calls, self._say = runner, order, calls, say
        self._ran = False
        self.operands = OperandAmax(attentions)

    def __call__(self, wanted: Iterable[nn.Module] = ()) -> None:
        """Run; only what has run to its end once may be left as soon as what is wanted has been reached."""
        if self._ran:
            with torch.no_grad(), _left_behind(list(wanted)):
                for index, call in enumerate(self._calls):
                    with contextlib.suppress(_Enough):
                        self._runner.run(self._order.path, call, self._entering(index))
            return
        file = OutputsFile(self._order.outputs) if self._order.outputs else None
        with torch.no_grad(), self.operands:
            for index, call in enumerate(self._calls):
                outputs = self._runner.run(self._order.path, call, self._entering(index))
                if file is not None:
                    file.add(outputs)
        if file is not None:
            self._say(Ran(file.close()))
        self._ran = True

    def _entering(self, index: int) -> Outputs:
        return _loaded(self._order.entering[index]) if self._order.entering else ()

    def require(self) -> None:
        assert self._ran, f"the method never ran {self._order.path}, so that the next block has no inputs"


def _loaded(stored: Sequence[StoredTensor]) -> Outputs:
    return tuple(tensor.tensor() for tensor in stored)


class _Enough(Exception):
    """Leaves a block's forward where all that was wanted has been reached."""


@contextlib.contextmanager
def _left_behind(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Leave each call of a block when it has come to the last of some modules, whose other hooks have run by then."""
    reached: set[nn.Module] = set()

    def hook(module: nn.Module, _: tuple[Any, ...]) -> None:
        reached.add(module)
        if len(reached) == len(modules):
            reached.clear()
            raise _Enough

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
