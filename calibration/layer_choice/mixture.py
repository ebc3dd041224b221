"""A plain model whose linears can be exchanged for those of quantized checkpoints, group by group."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.by_block.runner import BlockRunner, Outputs, fill
from calibration.checkpoints.plain import open_plain
from calibration.checkpoints.quantized import Checkpoint, empty_model, reader
from calibration.inputs.captured import Inputs
from fp4trt.number_formats import BF16
from fp4trt.safetensors_file import StoredTensor

__all__ = ["Mixture", "Quantized"]


class Quantized:
    """The linears of a quantized checkpoint, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = empty_model(checkpoint)
        self._value = reader(checkpoint, self._model, torch.bfloat16)

    def linear(self, path: str, device: str) -> nn.Module:
        """Return one with its values."""
        linear = copy.deepcopy(self._model.get_submodule(path))
        fill(linear, list(linear.state_dict()), self._value, f"{path}.", device)
        return linear.eval().requires_grad_(False)


class Mixture:
    """A plain model in memory, in BF16.

    Attributes:
        blocks: module paths of its blocks.
    """

    def __init__(
        self, folder: Path, changed: Mapping[str, StoredTensor], quantized: Mapping[str, Quantized], device: str
    ) -> None:
        """Say what the model is made of; it is there within :meth:`loaded`.

        Args:
            folder: the plain checkpoint.
            changed: name to its tensors that have other values, as folds give them.
            quantized: choice to the checkpoint with all linears in it.
            device: where to compute.
        """
        source = open_plain(folder)
        self._model, self.blocks = source.model, source.family.blocks(source.config)
        self._quantized, self._device = quantized, device

        def tensor(name: str) -> torch.Tensor:
            return changed[name].tensor().to(torch.bfloat16) if name in changed else source.tensor(name)

        self._runner = BlockRunner(self._model, self.blocks, tensor, device, source.family.read_by)

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Hold all blocks in memory."""
        with contextlib.ExitStack() as stack, torch.no_grad():
            for block in self.blocks:
                stack.enter_context(self._runner.loaded(block))
            yield

    @contextlib.contextmanager
    def exchanged(self, formats: Mapping[str, str]) -> Iterator[None]:
        """Exchange linears.

        Args:
            formats: module path to choice; ``bf16`` leaves one as it is.
        """
        plain: dict[str, Any] = {path: self._model.get_submodule(path) for path in formats}
        for path, kind in formats.items():
            if kind != BF16:
                self._model.set_submodule(path, self._quantized[kind].linear(path, self._device))
        try:
            yield
        finally:
            for path, linear in plain.items():
                self._model.set_submodule(path, linear)

    def outputs(
        self, calls: Sequence[Inputs], formats: Mapping[str, str], tell: Callable[[int], object]
    ) -> list[Outputs]:
        """Return the model's outputs for every call, on the CPU, under choices.

        One block after another runs on all calls, so that no more than its linears are there twice.

        Args:
            calls: inputs.
            formats: module path to choice, as :meth:`exchanged` has it.
            tell: called with how many calls are done.
        """
        before: list[Outputs] = [() for _ in calls]
        for block in self.blocks:
            with self.exchanged({path: kind for path, kind in formats.items() if path.startswith(f"{block}.")}):
                before = self.after(block, calls, before)
        tell(len(calls))
        return [self._runner.finish(call, outputs) for call, outputs in zip(calls, before, strict=True)]

    def after(self, block: str, calls: Sequence[Inputs], before: Sequence[Outputs]) -> list[Outputs]:
        """Return what a block returns for every call, from what the block before it did; nothing before the first."""
        return [self._runner.run(block, call, outputs) for call, outputs in zip(calls, before, strict=True)]

    def rest(
        self, block: str, calls: Sequence[Inputs], before: Sequence[Outputs], tell: Callable[[int], object]
    ) -> list[Outputs]:
        """Return the model's outputs for every call, from what the block before a block returned."""
        found = []
        for call, outputs in zip(calls, before, strict=True):
            found.append(self._runner.finish(call, outputs, block))
            tell(1)
        return found
