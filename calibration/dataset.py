"""Captured transformer inputs: what calibration runs on, kept as a safetensors file so that it repeats exactly."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, overload

import numpy as np
import numpy.typing as npt

from calibration.errors import BadCheckpoint, BadInputs
from calibration.safetensors_file import DTYPE_BYTES, StoredTensor, bytes_of, plan_of, read_header, write
from fp4trt.families import Family

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Inputs", "capturing", "check_inputs", "load_inputs", "partial_schedule", "save_inputs"]

WIDEST_GAP: Final = 0.35
"""Between timesteps of captured calls. Four steps, as few as models are made for, are .25 apart."""

Inputs = dict[str, "torch.Tensor"]
"""One call of the transformer: input name to tensor, batch first where the graph has a batch."""


def save_inputs(path: str | Path, calls: Sequence[Inputs]) -> None:
    """Write captured calls; tensor ``NNNNN.name`` is input ``name`` of call NNNNN.

    Args:
        path: a ``.safetensors`` file, written beside and renamed.
        calls: at least one.
    """
    if not calls:
        raise BadInputs("no transformer call was captured; expected at least one")
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    plan = [plan_of(f"{index:05d}.{name}", call[name]) for index, call in enumerate(calls) for name in call]
    plan.sort(key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    try:
        write(partial, plan, ((each.name, _bytes(calls, each.name)) for each in plan), {"format": "fp4trt-inputs"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _bytes(calls: Sequence[Inputs], tensor: str) -> npt.NDArray[np.uint8]:
    index, _, name = tensor.partition(".")
    return bytes_of(calls[int(index)][name])


class _StoredCalls(Sequence[Inputs]):
    """Captured calls on disk; each is read when it is asked for."""

    def __init__(self, calls: Sequence[dict[str, StoredTensor]]) -> None:
        self._calls = calls

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> Inputs: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Inputs]: ...
    def __getitem__(self, index: int | slice) -> Inputs | Sequence[Inputs]:
        if isinstance(index, slice):
            return _StoredCalls(self._calls[index])
        return {name: stored.tensor() for name, stored in self._calls[index].items()}


def load_inputs(path: str | Path) -> Sequence[Inputs]:
    """Return captured calls, in the order they were captured; each is read when it is asked for.

    Raises:
        BadInputs: the file is missing, damaged or holds something else.
    """
    if not Path(path).is_file():
        raise BadInputs(f"{path} does not exist; expected captured inputs (fp4trt calibrate --save-inputs writes them)")
    try:
        tensors = read_header(Path(path))
    except BadCheckpoint as error:
        raise BadInputs(f"{error}; expected captured inputs") from None
    calls: dict[str, dict[str, StoredTensor]] = {}
    for name in sorted(tensors):
        index, _, key = name.partition(".")
        if not index.isdigit() or not key:
            raise BadInputs(f"{path} holds a tensor {name}; expected captured inputs, named like 00000.hidden_states")
        calls.setdefault(index, {})[key] = tensors[name]
    return _StoredCalls([calls[index] for index in sorted(calls)])


def check_inputs(calls: Sequence[Inputs], family: Family, config: dict[str, object]) -> None:
    """Refuse captured calls that are not this model's.

    Raises:
        BadInputs: naming the call and the input.
    """
    shapes = family.input_shapes(config)
    for index, call in enumerate(calls):
        if call.keys() != shapes.keys():
            raise BadInputs(f"call {index} has inputs {sorted(call)}; this model takes {sorted(shapes)}")
        for name, shape in shapes.items():
            found = tuple(call[name].shape)
            fits = len(found) == len(shape) and all(
                isinstance(n, str) or n == m for n, m in zip(shape, found, strict=True)
            )
            if not fits:
                raise BadInputs(f"call {index}: {name} has shape {list(found)}; this model takes {list(shape)}")
            if not call[name].isfinite().all():
                raise BadInputs(f"call {index}: {name} holds NaN or infinite values; capture it again")


def partial_schedule(calls: Sequence[Inputs]) -> str | None:
    """Return, in one line, which part of the denoising schedule no captured call is from; None where none is missing.

    Args:
        calls: of a model that reads a ``timestep`` from 1 (noise) to 0 (picture).
    """
    times = sorted(float(time) for call in calls for time in call.get("timestep", ()))
    if not times:
        return None
    for begin, end in itertools.pairwise([0.0, *times, 1.0]):
        if end - begin > WIDEST_GAP:
            return (
                f"the calibration data have no step between timestep {begin:.2f} and {end:.2f}, of 1 to "
                "0; layers may be scaled wrongly there: capture whole trajectories"
            )
    return None


def capturing(transformer: nn.Module, family: Family, config: dict[str, object]) -> _Capture:
    """Return a context manager whose value is the list that every call of ``transformer`` is appended to."""
    return _Capture(transformer, tuple(family.input_shapes(config)))


class _Capture:
    """Listens to a transformer while a pipeline drives it."""

    def __init__(self, transformer: nn.Module, names: Sequence[str]) -> None:
        self._transformer = transformer
        self._names = names
        self._calls: list[Inputs] = []

    def __enter__(self) -> list[Inputs]:
        self._handle = self._transformer.register_forward_pre_hook(self._record, with_kwargs=True)
        return self._calls

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _record(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._calls.append({name: given[name].detach().cpu().clone() for name in self._names})  # type: ignore[attr-defined]
