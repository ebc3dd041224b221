"""Quantize block by block where that needs the model's own activations: each method is one function of a block.

What a block becomes lies on disk before the next one is loaded; a run that was killed goes on with its first unfinished
block. The finished tensors are then copied into the result by the same pass that packs everything else.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import click
import torch
from torch import nn

from calibration.by_block.measure_amax import OUTSIDE, identity_of, measured_outside, require_device
from calibration.by_block.progress import BlockCheckpoint, finished_blocks
from calibration.by_block.runner import BlockRunner
from calibration.checkpoints.plain import empty_source, finite_tensor
from calibration.formats.attention_amax import OperandAmax
from calibration.formats.fp8_attention import attention_scales
from calibration.inputs.captured import Inputs
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.number_formats import BF16
from fp4trt.safetensors_file import StoredTensor, bytes_of, plan_of, read_header, write

__all__ = ["BlockResult", "BlockTask", "Method", "Prepared", "Run", "prepared_by_block"]


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
            Given some of its modules, it need not go on in a call where these have been reached.
    """

    path: str
    module: nn.Module
    linears: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]
    run: Run

    def linear(self, path: str) -> nn.Module:
        """Return one of the block's modules by its full path."""
        return self.module.get_submodule(path.removeprefix(f"{self.path}."))


@dataclass(frozen=True)
class BlockResult:
    """What a block became.

    Attributes:
        tensors: name in the quantized checkpoint to value, in the type that it is stored in: whatever differs from what
            the plain checkpoint has.
        figures: what the method measured, as JSON, for the manifest.
    """

    tensors: Mapping[str, torch.Tensor]
    figures: Mapping[str, Any] = field(default_factory=dict)


Method = Callable[[BlockTask], BlockResult]


@dataclass(frozen=True)
class Prepared:
    """What is decided before the checkpoint is written.

    Attributes:
        tensors: name in the quantized checkpoint to where the value lies.
        figures: block to what the method measured there.
        amax: of the inputs of linears outside the blocks, which are rounded to nearest.
    """

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    amax: Mapping[str, float] = field(default_factory=dict)


_METADATA: Final = {"format": "fp4trt-block"}


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

    Raises:
        BadCheckpoint, BadInputs, BadAmax, OutputExists: naming what is wrong.
    """
    require_device(device)
    config = load_json(folder / "config.json")
    family = family_of(config)
    blocks = family.blocks(config)
    groups = [group for group in family.groups(config) if formats[group[0]] != BF16]
    model, stored = empty_source(folder)
    tensor = lambda name: finite_tensor(folder, name, stored[name]).to(torch.bfloat16)  # noqa: E731
    runner = BlockRunner(model, blocks, tensor, device)
    identity = {**identity_of(folder, config, calls, device), "recipe": dict(recipe), "formats": dict(formats)}
    outside = tuple(path for group in family.outside for path in group.linears if formats[path] != BF16)
    bar = click.progressbar(length=len(blocks), label="quantizing blocks", file=sys.stderr, show_eta=True)
    with finished_blocks(work, identity) as finished, bar as progress:
        progress.update(len(finished.results))
        for block in blocks[len(finished.results) :]:
            inside = tuple(group for group in groups if group[0].startswith(f"{block}."))
            with runner.loaded(block) as module:
                attentions = [path for path in fp8_attentions if path.startswith(f"{block}.")]
                run = _Run(runner, block, calls, finished, attentions, keep=block != blocks[-1] or bool(outside))
                linears = {path: formats[path] for group in inside for path in group}
                result = method(BlockTask(block, module, linears, inside, run))
                run.require()
                scales = attention_scales(run.operands.amax, attentions)
                _save(_file(finished, block), {**result.tensors, **scales})
            finished.finish(block, dict(result.figures))
            progress.update(1)
        if outside and OUTSIDE not in finished.results:
            measured = measured_outside(runner, model, outside, calls, finished.outputs, lambda _: None)
            finished.finish(OUTSIDE, measured)
        tensors = {name: place for block in blocks for name, place in read_header(_file(finished, block)).items()}
        figures = {block: finished.results[block] for block in blocks}
        yield Prepared(tensors, figures, finished.results.get(OUTSIDE, {}))


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


def _file(finished: BlockCheckpoint, block: str) -> Path:
    return finished.folder / f"{block}.safetensors"


def _save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    plan = [plan_of(name, value) for name, value in tensors.items()]
    write(file, plan, ((name, bytes_of(value)) for name, value in tensors.items() if value.numel()), _METADATA)
