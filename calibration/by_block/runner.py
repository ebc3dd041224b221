"""Run a diffusers model block by block: the weights of one block in memory at a time, whatever the model's size.

accelerate's offloading (AlignDevicesHook, ``disk_offload``) loads every block once for every call, so that N calls read
the model N times, and nothing can be said of a block before the whole model has run. Here a block is loaded once, runs
for every call, and goes.

The model's own forward does all that lies between the blocks: it is run from its beginning for every block and call,
where the blocks that are done answer at once, and it is left behind the block that is wanted. Blocks of the stack that
ran last answer what its last one had answered, and so do those of an earlier stack whose result a later one is still to
read; those that nothing reads any more answer NaN of the right shapes, so that a model for which this is not true is
found out. What is computed again is what comes before the first block: for FLUX.1 about 1 % of a block.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from calibration.checkpoints.plain import stays_fp32
from calibration.inputs.captured import Inputs
from fp4trt.errors import UnsupportedModel

__all__ = ["BlockRunner", "Outputs", "fill"]

Outputs = tuple[torch.Tensor, ...]
"""What a block returned, on the CPU; before it, what other stacks gave that later ones are still to read."""


class _Reached(Exception):
    """Leaves the model's forward behind the block that was wanted."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs


def fill(
    module: nn.Module, names: Sequence[str], tensor: Callable[[str], torch.Tensor], prefix: str, device: str
) -> None:
    """Give the named tensors of a module's state their values, strictly.

    Args:
        module: on the meta device, or filled before.
        names: of its state.
        tensor: full name to value.
        prefix: of the full names.
        device: where they go.
    """
    state = {name: tensor(f"{prefix}{name}").to(device) for name in names}
    module.load_state_dict(state, strict=len(names) == len(module.state_dict()), assign=True)


class BlockRunner:
    """A model that runs one block at a time.

    The blocks of a stack return the same kinds of tensors; those of different stacks need not.

    Attributes:
        kept: how many of the tensors that were returned last are other stacks'.
    """

    kept = 0

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        tensor: Callable[[str], torch.Tensor],
        device: str = "cpu",
        read_by: Mapping[str, str] | None = None,
    ) -> None:
        """Load what lies outside the blocks.

        Args:
            model: on the meta device; every quantity of its state is read through ``tensor``.
            blocks: module paths, in the order in which the model runs them.
            tensor: full name to value, in the dtype to compute in.
            device: where to compute.
            read_by: stack to the later stack that reads what it gives, where others run in between.
        """
        self._model, self._blocks = model.eval().requires_grad_(False), blocks
        self._device = device

        def in_its_type(name: str) -> torch.Tensor:
            value = tensor(name)
            return value.float() if stays_fp32(model, name) else value

        self._tensor = in_its_type
        inside = tuple(f"{block}." for block in blocks)
        fill(model, [name for name in model.state_dict() if not name.startswith(inside)], self._tensor, "", device)
        # One block of each stack that nobody loads or changes, to be asked for shapes.
        filled = {name: value.dtype for name, value in model.state_dict().items() if not value.is_meta}
        rounded = (dtype for name, dtype in filled.items() if not stays_fp32(model, name))
        dtype = next(rounded, torch.bfloat16)  # of a model that is blocks alone
        first = {_stack_of(block): block for block in reversed(blocks)}
        self._empty = {stack: _like(model, block, dtype) for stack, block in first.items()}
        for index, block in enumerate(blocks):
            module = model.get_submodule(block)
            module.forward = partial(self._forward, index, module.forward)
        starts = {stack: blocks.index(block) for stack, block in first.items()}
        self._kept_until = {stack: starts[reader] for stack, reader in (read_by or {}).items() if stack in starts}
        self._wanted, self._leave = 0, True
        self._before: Outputs = ()
        self._answers: dict[str, Any] = {}
        self._shapes: dict[str, Any] = {}

    @contextlib.contextmanager
    def loaded(self, block: str) -> Iterator[nn.Module]:
        """Hold one block's weights in memory."""
        module = self._model.get_submodule(block)
        fill(module, list(module.state_dict()), self._tensor, f"{block}.", self._device)
        try:
            yield module
        finally:
            module.to_empty(device="meta")

    def run(self, block: str, call: Inputs, before: Outputs) -> Outputs:
        """Run one call up to a block, which has to be loaded, and return what that block returns.

        Args:
            block: which one.
            call: the model's inputs.
            before: what the block before it returned for this call; empty for the first.
        """
        self._wanted, self._leave, self._before = self._blocks.index(block), True, self._on_device(before)
        try:
            self._call(call)
        except _Reached as reached:
            outputs = tuple(value.cpu() for value in reached.outputs)
        else:
            raise AssertionError(f"the model never ran {block}")
        first = not self._wanted or _stack_of(self._blocks[self._wanted - 1]) != _stack_of(block)
        if first and any(value.isnan().any() for value in outputs):
            raise UnsupportedModel(f"{block} gives NaN: a weight, an input, or something that an earlier stack gave is")
        if first:
            still_read = (stack for stack in self._answers if self._kept_until.get(stack, 0) > self._wanted)
            others = tuple(value.cpu() for stack in still_read for value in _as_tuple(self._answers[stack]))
            self.kept = len(others)
            return (*others, *outputs)
        kept, own = before[: -len(outputs)], before[-len(outputs) :]
        if [(v.shape, v.dtype) for v in own] != [(v.shape, v.dtype) for v in outputs]:
            raise UnsupportedModel(f"{block} returns other tensors than the block before it in its stack")
        self.kept = len(kept)
        return (*kept, *outputs)

    def finish(self, call: Inputs, before: Outputs, block: str | None = None) -> Outputs:
        """Return the model's outputs, which it makes of the last block's.

        Args:
            call: the model's inputs.
            before: what the last block returned for this call.
            block: begin with this one, for which ``before`` is what the block before it returned, empty for the first;
                it and all behind it have to be loaded.
        """
        self._wanted = len(self._blocks) if block is None else self._blocks.index(block)
        self._leave, self._before = False, self._on_device(before)
        return tuple(value.cpu() for value in self._call(call))

    def _call(self, call: Inputs) -> Any:
        self._answers.clear()
        on_device = {name: value.to(self._device) for name, value in call.items()}
        return self._model(**on_device, return_dict=False)

    def _on_device(self, outputs: Outputs) -> Outputs:
        return tuple(value.to(self._device) for value in outputs)

    def _forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index < self._wanted:
            stack = _stack_of(self._blocks[index])
            if stack not in self._answers:
                self._answers[stack] = self._answer(stack, args, kwargs)
            return self._answers[stack]
        result = forward(*args, **kwargs)
        if not self._leave:
            return result
        raise _Reached(_as_tuple(result))

    def _answer(self, stack: str, args: Any, kwargs: Any) -> Any:
        """Return what a stack gave: as it was where that is still read, NaN where it is not."""
        taken = sum(len(_as_tuple(self._answers[other])) for other in self._answers if self._is_kept(other))
        if stack == _stack_of(self._blocks[self._wanted - 1]):
            own = self._before[taken:]
            return own if len(own) > 1 else own[0]
        given = self._nan_like_what_it_gives(stack, args, kwargs)
        if not self._is_kept(stack):
            return given
        if not isinstance(given, tuple):
            return self._before[taken]
        return self._before[taken : taken + len(given)]

    def _is_kept(self, stack: str) -> bool:
        return self._kept_until.get(stack, -1) >= self._wanted

    def _nan_like_what_it_gives(self, stack: str, args: Any, kwargs: Any) -> Any:
        """Return what a block of a stack would give, with NaN in place of numbers."""
        shapes = _each_tensor((args, kwargs), lambda value: (value.shape, value.dtype))
        key = f"{stack} {shapes}"
        if key not in self._shapes:  # asking takes longer than a small block runs
            self._shapes[key] = self._empty[stack](*_each_tensor(args, _on_meta), **_each_tensor(kwargs, _on_meta))

        def nan(value: torch.Tensor) -> torch.Tensor:
            return torch.full((), math.nan, dtype=value.dtype, device=self._device).expand(value.shape)

        return _each_tensor(self._shapes[key], nan)


def _like(model: nn.Module, block: str, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a block, on the meta device, in the types that it is computed in."""
    made = copy.deepcopy(model.get_submodule(block)).to(dtype)
    for name, value in made.named_parameters():
        value.data = value.data.float() if stays_fp32(model, name) else value.data
    return made


def _as_tuple(result: Any) -> Outputs:
    return result if isinstance(result, tuple) else (result,)


def _stack_of(block: str) -> str:
    return block.rpartition(".")[0]


def _on_meta(value: torch.Tensor) -> torch.Tensor:
    return value.to("meta")


def _each_tensor(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Return a nest of tuples, lists and dicts with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_each_tensor(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _each_tensor(item, change) for key, item in value.items()}
    return value
