"""Captured transformer inputs: what calibration runs on, kept as a safetensors file so that it repeats exactly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.errors import BadInputs
from calibration.models import Family
from calibration.safetensors_file import bytes_of, plan_of, write

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Inputs", "capturing", "check_inputs", "load_inputs", "save_inputs"]

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
    tensors = {f"{index:05d}.{name}": value for index, call in enumerate(calls) for name, value in call.items()}
    by_width = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    plan = [plan_of(name, tensors[name]) for name in by_width]
    try:
        write(partial, plan, ((name, bytes_of(tensors[name])) for name in by_width), {"format": "fp4trt-inputs"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_inputs(path: str | Path) -> list[Inputs]:
    """Read captured calls, in the order they were captured.

    Raises:
        BadInputs: the file is missing, damaged or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise BadInputs(f"{path} does not exist; expected captured inputs (fp4trt calibrate --save-inputs writes them)")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise BadInputs(f"{path} is not a safetensors file ({error}); expected captured inputs") from None
    calls: dict[str, Inputs] = {}
    for name in sorted(tensors):
        index, _, key = name.partition(".")
        if not index.isdigit() or not key:
            raise BadInputs(f"{path} holds a tensor {name}; expected captured inputs, named like 00000.hidden_states")
        calls.setdefault(index, {})[key] = tensors[name]
    return [calls[index] for index in sorted(calls)]


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
