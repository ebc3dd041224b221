"""Measure what enters a plain checkpoint's linears and attentions, block by block, resuming after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from calibration.by_block.progress import finished_blocks
from calibration.by_block.runner import BlockRunner, Outputs
from calibration.checkpoints.plain import open_plain
from calibration.formats import input_quantizers
from calibration.formats.attention_amax import OperandAmax, checked_attentions
from calibration.inputs.captured import Inputs
from fp4trt.checkpoint_folder import files_of
from fp4trt.errors import BadInputs
from fp4trt.progress import tracking
from fp4trt.safetensors_file import bytes_of
from fp4trt.source_folder import loras_of, stamp_of

__all__ = ["DEVICES", "OUTSIDE", "identity_of", "measured_by_block", "measured_outside", "require_device"]

DEVICES: Final = ("cpu", "cuda")

OUTSIDE: Final = "outside the blocks"
"""Where the amax of linears that lie in no block stand among the results of the blocks."""

_VERSIONED: Final = ("torch", "diffusers", "nvidia-modelopt")


@contextlib.contextmanager
def measured_by_block(
    folder: Path, calls: Sequence[Inputs], work: Path, device: str = "cpu"
) -> Iterator[input_quantizers.Amax]:
    """Give the largest magnitude that enters each linear and attention that the family quantizes, over all calls.

    In memory at a time: one block, what lies outside the blocks, and the activations of one call. The outputs of a
    block for every call are on disk (28 MB a call for FLUX.1 at 1024 pixels), beside those of the block before it.

    Args:
        folder: a plain checkpoint.
        calls: captured inputs.
        work: folder for what is finished, as :func:`calibration.by_block.progress.finished_blocks` has it: until the
            end of the ``with`` statement the same call gives the same amax values again, and need not measure.
        device: where to compute, ``cpu`` or ``cuda``.

    Raises:
        BadCheckpoint: the folder is not what :func:`calibration.checkpoints.plain.load_source` accepts.
        BadAmax: a linear was never reached, or its maximum is zero, NaN or infinite.
        BadInputs: there is no such device.
        OutputExists: ``work`` is somebody else's.
    """
    require_device(device)
    source = open_plain(folder)
    config, family = source.config, source.family
    blocks, paths, attentions = family.blocks(config), family.quantized(config), family.fp8_attentions(config)
    runner = BlockRunner(source.model, blocks, source.tensor, device, source.family.read_by)
    outside = tuple(path for group in family.outside for path in group.linears)
    length = (len(blocks) + bool(outside)) * len(calls)
    identity = identity_of(folder, config, calls, device)
    with finished_blocks(work, identity) as finished, tracking(length, "calibrating") as advance:
        advance(len(finished.results) * len(calls))
        for block in blocks[len(finished.results) :]:
            members, inner = ([p for p in listed if p.startswith(f"{block}.")] for listed in (paths, attentions))
            add = finished.add if block != blocks[-1] or outside else _drop
            finished.finish(block, _measure(runner, block, members, inner, calls, finished.outputs, add, advance))
        if outside and OUTSIDE not in finished.results:
            finished.finish(OUTSIDE, measured_outside(runner, source.model, outside, calls, finished.outputs, advance))
        amax = {path: value for result in finished.results.values() for path, value in result.items()}
        yield input_quantizers.checked(amax, paths) | checked_attentions(amax, attentions)


def _drop(_: Outputs) -> None:
    """Keep nothing of what the last block gives: no block reads it."""


def measured_outside(
    runner: BlockRunner,
    model: nn.Module,
    paths: Sequence[str],
    calls: Sequence[Inputs],
    before: Callable[[int], Outputs],
    tell: Callable[[int], object],
) -> input_quantizers.Amax:
    """Return the largest magnitude that enters each of some linears outside the blocks, over all calls.

    Args:
        runner: of the model.
        model: whose linears they are.
        paths: their module paths.
        calls: captured inputs.
        before: number of a call to what the last block returned for it.
        tell: called after each call.
    """
    amax: dict[str, float] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            amax[path] = max(amax.get(path, 0.0), float(given[0].abs().amax()))

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    try:
        with torch.no_grad():
            for index, call in enumerate(calls):
                runner.finish(call, before(index))
                tell(1)
    finally:
        for handle in handles:
            handle.remove()
    return input_quantizers.checked(amax, paths)


def require_device(device: str) -> None:
    """Refuse a device that is none, or not there.

    Raises:
        BadInputs: naming it.
    """
    if not isinstance(device, str) or device.partition(":")[0] not in DEVICES:
        raise BadInputs(f"there is no device {device!r}; expected one of: {', '.join(DEVICES)}")
    if device != "cpu" and not torch.cuda.is_available():
        raise BadInputs("torch sees no CUDA GPU; expected one for --device cuda: use --device cpu")


def _measure(
    runner: BlockRunner,
    block: str,
    paths: Sequence[str],
    attentions: Sequence[str],
    calls: Sequence[Inputs],
    before: Callable[[int], Outputs],
    add: Callable[[Outputs], None],
    tell: Callable[[int], object],
) -> input_quantizers.Amax:
    """Run one block on every call, keeping its outputs, and return its amax values by full path."""

    def run() -> None:
        for index, call in enumerate(calls):
            add(runner.run(block, call, before(index)))
            tell(1)

    names = [path.removeprefix(f"{block}.") for path in paths]
    with runner.loaded(block) as module, OperandAmax(attentions) as operands:
        measured = input_quantizers.measure_input_amax(module, names, run)
    amax = {f"{block}.{name}": value for name, value in measured.items()}
    return input_quantizers.checked(amax, paths) | checked_attentions(operands.amax, attentions)


def identity_of(folder: Path, config: dict[str, Any], calls: Sequence[Inputs], device: str) -> dict[str, Any]:
    """Return what must be the same for a run to resume; the weights are known by size and time of change."""
    digest = hashlib.sha256()
    for call in calls:
        for name, value in call.items():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(bytes_of(value).data)
    weights = [[file.name, *stamp_of(file).values()] for file in files_of(folder)]
    loras = {"lora": found} if (found := loras_of(folder)) else {}
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {
        "measured": "linears and attentions",
        "weights": weights,
        **loras,
        "config": config,
        "calls": digest.hexdigest(),
        "device": device,
        "versions": versions,
    }
