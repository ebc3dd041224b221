"""Quantize block by block where that needs the model's own activations: each method is one function of a block.

Each block is loaded once. What it becomes lies on disk before the next one is loaded, in the result itself or in a file
for each block (:class:`Sink`); a run that was killed resumes with its first unfinished block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from calibration.by_block.measure_amax import OUTSIDE, identity_of, measured_outside, require_device
from calibration.by_block.progress import BlockCheckpoint, finished_blocks
from calibration.by_block.runner import BlockRunner
from calibration.checkpoints.plain import PlainCheckpoint, open_plain
from calibration.formats.attention_amax import OperandAmax
from calibration.formats.fp8_attention import attention_quantizers, attention_scales
from calibration.inputs.captured import Inputs
from fp4trt.number_formats import BF16, FORMATS
from fp4trt.progress import tracking
from fp4trt.safetensors_file import StoredTensor, bytes_of, plan_of, tensors_in_file, write

__all__ = ["BlockResult", "BlockTask", "Method", "OpenSink", "Prepared", "Run", "Sink", "prepared_by_block"]


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


class Sink(Protocol):
    """Reads the plain checkpoint, and writes what becomes of it."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Where the tensors that were put lie, for a sink that keeps them for others."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of the plain checkpoint, in BF16."""
        ...

    def put(self, block: str, tensors: Mapping[str, torch.Tensor], amax: Mapping[str, float]) -> None:
        """Bring a block to disk, and after all of them, as :data:`OUTSIDE`, the rest of the model.

        Args:
            block: its path; its tensors have just been read.
            tensors: as :attr:`BlockResult.tensors`, and the scales of attentions in FP8.
            amax: of each quantizer.
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
) -> Iterator[Prepared]:
    """Quantize a plain checkpoint block by block; what comes of it is there until the end of the ``with`` statement.

    In memory at a time: one block, what lies outside the blocks, one call, and what the method keeps.

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

    Raises:
        BadCheckpoint, BadInputs, BadAmax, OutputExists: naming what is wrong.
    """
    require_device(device)
    source = open_plain(folder)
    config, family = source.config, source.family
    blocks = family.blocks(config)
    groups = [group for group in family.groups(config) if formats[group[0]] != BF16]
    identity = {**identity_of(folder, config, calls, device), "recipe": dict(recipe), "formats": dict(formats)}
    identity["results"] = "amax, figures"
    scaled = {path for path, kind in formats.items() if kind != BF16 and FORMATS[kind].needs_input_amax}
    outside = tuple(path for group in family.outside for path in group.linears if path in scaled)
    bar = tracking(len(blocks), "quantizing blocks")
    open_sink = into or partial(_files, source)
    with finished_blocks(work, identity) as finished, open_sink(finished) as sink, bar as advance:
        runner = BlockRunner(source.model, blocks, sink.tensor, device)
        advance(len(finished.results))
        for block in blocks[len(finished.results) :]:
            inside = tuple(group for group in groups if group[0].startswith(f"{block}."))
            with runner.loaded(block) as module:
                attentions = [path for path in fp8_attentions if path.startswith(f"{block}.")]
                run = _Run(runner, block, calls, finished, attentions, keep=block != blocks[-1] or bool(outside))
                linears = {path: formats[path] for group in inside for path in group}
                result = method(BlockTask(block, module, linears, inside, run))
                run.require()
                scales = attention_scales(run.operands.amax, attentions)
                amax = {**result.amax, **attention_quantizers(run.operands.amax, attentions)}
                sink.put(block, {**result.tensors, **scales}, amax)
            finished.finish(block, {"amax": amax, "figures": dict(result.figures)})
            advance()
        if outside and OUTSIDE not in finished.results:
            measured = measured_outside(runner, source.model, outside, calls, finished.outputs, lambda _: None)
            finished.finish(OUTSIDE, measured)
        entering = finished.results.get(OUTSIDE, {})
        sink.put(OUTSIDE, {}, {f"{path}.input_quantizer": value for path, value in entering.items()})
        results = {block: finished.results[block] for block in blocks}
        amax = {name: value for result in results.values() for name, value in result["amax"].items()}
        figures = {block: result["figures"] for block, result in results.items() if result["figures"]}
        yield Prepared(sink.tensors, figures, amax, entering)


class _Run:
    """Runs a block on all calls; first it measures attention, and keeps the outputs: the inputs of the next block."""

    def __init__(
        self,
        runner: BlockRunner,
        block: str,
        calls: Sequence[Inputs],
        finished: BlockCheckpoint,
        attentions: Sequence[str],
        keep: bool,
    ) -> None:
        self._runner, self._block, self._calls, self._finished = runner, block, calls, finished
        self._keep, self._ran = keep, False
        self.operands = OperandAmax(attentions)

    def __call__(self, wanted: Iterable[nn.Module] = ()) -> None:
        """Run; only what has run to its end once may be left as soon as what is wanted has been reached."""
        if self._ran:
            with torch.no_grad(), _left_behind(list(wanted)):
                for index, call in enumerate(self._calls):
                    with contextlib.suppress(_Enough):
                        self._runner.run(self._block, call, self._finished.outputs(index))
            return
        with torch.no_grad(), self.operands:
            for index, call in enumerate(self._calls):
                outputs = self._runner.run(self._block, call, self._finished.outputs(index))
                if self._keep:
                    self._finished.add(outputs)
        self._ran = True

    def require(self) -> None:
        assert self._ran, f"the method never ran {self._block}, so that the next block has no inputs"


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


@dataclass(frozen=True)
class _BlockFiles:
    """Keeps what each block became in a file of its own."""

    source: PlainCheckpoint
    folder: Path

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        files = [self._file(block) for block in self.source.family.blocks(self.source.config)]
        return {name: place for file in files for name, place in tensors_in_file(file).items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name)

    def put(self, block: str, tensors: Mapping[str, torch.Tensor], _: Mapping[str, float]) -> None:
        plan = [plan_of(name, value) for name, value in tensors.items()]
        pieces = ((name, bytes_of(value)) for name, value in tensors.items() if value.numel())
        write(self._file(block), plan, pieces, {"format": "fp4trt-block"})

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def _files(source: PlainCheckpoint, finished: BlockCheckpoint) -> AbstractContextManager[Sink]:
    return contextlib.nullcontext(_BlockFiles(source, finished.folder))
