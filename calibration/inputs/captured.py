"""Captured transformer inputs: what calibration runs on, kept as a safetensors file so that it repeats exactly."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np
import numpy.typing as npt

from calibration.inputs.given import require_captured
from fp4trt.errors import BadCheckpoint, BadInputs
from fp4trt.families import Dim, Family
from fp4trt.safetensors_file import DTYPE_BYTES, READABLE, StoredTensor, bytes_of, plan_of, tensors_in_file, write

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Inputs", "capturing", "check_inputs", "load_inputs", "partial_schedule", "save_inputs", "warnings_of"]

WIDEST_GAP: Final = 0.35
"""Between timesteps of captured calls. Four steps, as few as models are made for, are .25 apart."""

_TIME: Final = "timestep"
_TRAIN_STEPS: Final = 1000
"""The first timestep of diffusers' schedulers, which run from it to 0."""

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


class _LazyCalls(Sequence[Inputs]):
    """Captured calls, each made when it is asked for, by its number among all of them."""

    def __init__(self, numbers: Sequence[int], call: Callable[[int], Inputs]) -> None:
        self._numbers, self._call = numbers, call

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Inputs: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Inputs]: ...
    def __getitem__(self, index: int | slice) -> Inputs | Sequence[Inputs]:
        if isinstance(index, slice):
            return _LazyCalls(self._numbers[index], self._call)
        return self._call(self._numbers[index])


def load_inputs(path: str | Path) -> Sequence[Inputs]:
    """Return captured calls, in the order they were captured; each is read when it is asked for.

    Raises:
        BadInputs: the file is missing, damaged or holds something else.
    """
    require_captured(Path(path))
    try:
        tensors = tensors_in_file(Path(path))
    except BadCheckpoint as error:
        raise BadInputs(f"{error}; expected captured inputs") from None
    calls: dict[str, dict[str, StoredTensor]] = {}
    for name in sorted(tensors):
        index, _, key = name.partition(".")
        if not index.isdigit() or not key:
            raise BadInputs(f"{path} holds a tensor {name}; expected captured inputs, named like 00000.hidden_states")
        if tensors[name].dtype not in READABLE:
            raise BadInputs(
                f"{path} holds {name} as {tensors[name].dtype}; expected floating-point numbers, such as BF16"
            )
        calls.setdefault(index, {})[key] = tensors[name]
    stored = [calls[index] for index in sorted(calls)]
    return _LazyCalls(
        range(len(stored)), lambda number: {name: tensor.tensor() for name, tensor in stored[number].items()}
    )


def check_inputs(calls: Sequence[Inputs], family: Family, config: dict[str, object]) -> Sequence[Inputs]:
    """Return captured calls in the types that the model computes in; refuse those that are not this model's.

    What a pipeline has captured in FP16 or FP32 is rounded to BF16; position ids and guidance become FP32, and ids may
    have a batch dimension whose members are equal. Each call is converted when it is asked for.

    Raises:
        BadInputs: naming the call, the input, and what was expected.
    """
    if not calls:
        raise BadInputs("the file of captured inputs holds no call; expected at least one")
    expected = _Expected.of(family, config)
    converted = _LazyCalls(range(len(calls)), lambda number: expected.converted(number, calls[number]))
    for _ in converted:  # each is checked as it is read
        pass
    return converted


@dataclass(frozen=True)
class _Expected:
    """What a model takes: input name to symbolic shape, and to the type that it computes in; symbol to its kind.

    Attributes:
        noise_at: the timestep of pure noise.
    """

    shapes: Mapping[str, tuple[str | int, ...]]
    dtypes: Mapping[str, torch.dtype]
    symbols: Mapping[str, str]
    noise_at: int

    @classmethod
    def of(cls, family: Family, config: dict[str, object]) -> _Expected:
        import torch

        shapes = family.input_shapes(config)
        dtypes = {
            "bf16": torch.bfloat16,
            "fp32": torch.float32,
            "bool": torch.bool,
            "int32": torch.int32,
            "int64": torch.int64,
        }
        kinds = {name: dim.kind for name, dim in family.dims.items()}
        types = {name: dtypes[family.inputs[name].dtype] for name in shapes}
        return cls(shapes, types, kinds, family.noise_at)

    def converted(self, index: int, call: Inputs) -> Inputs:
        """Return a call as the model takes it."""
        absent, superfluous = sorted(self.shapes.keys() - call.keys()), sorted(call.keys() - self.shapes.keys())
        if absent or superfluous:
            what = f"lacks {absent[0]}, which this model reads" if absent else f"has {superfluous[0]} too"
            raise BadInputs(f"call {index} {what}; this model takes {', '.join(self.shapes)}: capture exactly these")
        call = {name: self._without_batch(index, name, call[name]) for name in self.shapes}
        self._refuse_other_shapes(index, call)
        if _TIME in call:
            _refuse_other_times(index, call[_TIME], self.noise_at)
        return {name: self._rounded(index, name, value) for name, value in call.items()}

    def _without_batch(self, index: int, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return what is the same for the whole batch, such as position ids, without the dimension of a batch."""
        if value.dim() != len(self.shapes[name]) + 1 or "B" in self.shapes[name] or not len(value):
            return value
        if not (value == value[:1]).all():
            raise BadInputs(
                f"call {index}: {name} has shape {list(value.shape)} and differs between the pictures of the batch; "
                f"this model takes one {list(self.shapes[name])} for all of them: capture one picture a call"
            )
        return value[0]

    def _refuse_other_shapes(self, index: int, call: Inputs) -> None:
        """Refuse a call of other sizes than the model's, or whose inputs contradict each other."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, shape in self.shapes.items():
            found = list(call[name].shape)
            fixed = [n for n in shape if isinstance(n, int)]
            if len(found) != len(shape) or [m for n, m in zip(shape, found, strict=True) if n in fixed] != fixed:
                raise BadInputs(f"call {index}: {name} has shape {found}; this model takes {list(shape)}")
            for symbol, size in zip(shape, found, strict=True):
                if not isinstance(symbol, str):
                    continue
                known, first = sizes.setdefault(symbol, (size, name))
                if size != known or not size:
                    wanted = [sizes[n][0] if isinstance(n, str) and n in sizes else n for n in shape]
                    why = f"{wanted}, as {first} has {self._counted(symbol, known)}" if size else "no dimension of 0"
                    raise BadInputs(f"call {index}: {name} has shape {found}; expected {why}: capture it again")

    def _counted(self, symbol: str, count: int) -> str:
        kind = self.symbols.get(symbol, symbol)
        return f"a batch of {count}" if kind == "batch" else f"{count} {kind.replace('_', ' ')}"

    def _rounded(self, index: int, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return an input in the model's type."""
        import torch

        wanted, given = self.dtypes[name], value.dtype
        if not wanted.is_floating_point:
            return _as_whole(index, name, value, wanted)
        # Ids count; whoever captured them as integers lost nothing. A latent in whole numbers is not a latent.
        countable = wanted == torch.float32 and not given.is_complex and given != torch.bool
        if not (given.is_floating_point or countable):
            raise BadInputs(
                f"call {index}: {name} is {_named(given)}; expected floating-point numbers, such as {_named(wanted)}"
            )
        if given.is_floating_point and not value.float().isfinite().all():
            raise BadInputs(f"call {index}: {name} holds NaN or infinite values; capture it again")
        rounded = value.to(wanted)
        if not rounded.isfinite().all():
            largest = float(value.double().abs().max())
            raise BadInputs(f"call {index}: {name} holds {largest:.3g}, which is beyond the range of {_named(wanted)}")
        return rounded


def _as_whole(index: int, name: str, value: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    """Return whole numbers, or truth values, in another type that has them all."""
    found = value if value.is_complex() else value.to(wanted)
    if value.is_complex() or not (found == value).all():
        raise BadInputs(f"call {index}: {name} holds other values than {_named(wanted)} has; capture it again")
    return found


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_other_times(index: int, times: torch.Tensor, noise_at: int) -> None:
    """Refuse times outside 0 (picture) to that of noise."""
    outside = [time for time in times.flatten().tolist() if not 0 <= time <= noise_at and math.isfinite(time)]
    if not outside:
        return
    advice = "capture it again"
    if noise_at == 1 and min(outside) > 1 and max(outside) <= _TRAIN_STEPS:
        advice = (
            f"a scheduler counts {_TRAIN_STEPS} steps, and the pipeline divides by {_TRAIN_STEPS} before it calls the "
            "transformer; divide yours too"
        )
    raise BadInputs(
        f"call {index}: {_TIME} holds {outside[0]:g}; this model takes 0 (picture) to {noise_at} (noise): {advice}"
    )


def warnings_of(calls: Sequence[Inputs], family: Family, config: dict[str, object]) -> list[str]:
    """Return, in a line each, what of captured calls is unlike those that an engine will get: timesteps, and sizes.

    Args:
        calls: as :func:`check_inputs` gives them; each is read once.
        family: of the model.
        config: of the model.
    """
    shapes, times = family.input_shapes(config), list[float]()
    sizes: dict[str, int] = {}
    for call in calls:
        times += _times(call, family)
        for name, shape in shapes.items():
            for symbol, size in zip(shape, call[name].shape, strict=True):
                if isinstance(symbol, str):
                    sizes[symbol] = max(size, sizes.get(symbol, 0))
    told = (_missing_part(times, family), *(_beyond(name, size, family.dims[name]) for name, size in sizes.items()))
    return [line for line in told if line is not None]


def _beyond(name: str, size: int, dim: Dim) -> str | None:
    """Return the warning about a size of calls that no engine takes; pictures to refer to are of any number."""
    if dim.kind == "batch" or dim.references or size <= dim.most:
        return None
    what = f"{size} {dim.kind.replace('_', ' ')}" if dim.kind != "size" else f"{name} of {size}"
    return (
        f"the calibration data go to {what}, beyond the {dim.most} that the model declares for its engines; capture "
        "calls as they will be"
    )


def partial_schedule(calls: Sequence[Inputs], family: Family) -> str | None:
    """Return, in one line, which part of the denoising schedule no captured call is from; None where none is missing.

    Args:
        calls: of a model that may read a ``timestep`` from noise to 0 (picture); where each token has one, the largest
            of them counts: tokens of a picture that is given are at 0 throughout.
        family: of the model.
    """
    return _missing_part([time for call in calls for time in _times(call, family)], family)


def _times(call: Inputs, family: Family) -> list[float]:
    """Return the times of a call's pictures, from 1 (noise) to 0."""
    return [float(time.max()) / family.noise_at for time in call.get(_TIME, ())]


def _missing_part(times: Sequence[float], family: Family) -> str | None:
    if not times:
        return None
    noise_at = family.noise_at
    for begin, end in itertools.pairwise([0.0, *sorted(times), 1.0]):
        if end - begin > WIDEST_GAP:
            return (
                f"the calibration data have no step between timestep {begin * noise_at:.2f} and {end * noise_at:.2f}, "
                f"of {noise_at} to 0; layers may be scaled wrongly there: capture whole trajectories"
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

    def _record(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {name: value for name, value in kwargs.items() if name != "return_dict"}
        given = {**dict(zip(self._names, args, strict=False)), **named}
        found: Sequence[Inputs] = [given]
        # More than the family's inputs may ask for what no graph computes.
        if {key for key in given if given[key] is not None} != set(self._names):
            if hasattr(model, "calls_of"):
                found = model.calls_of(*args, **named)
            elif hasattr(model, "inputs_of"):
                found = [model.inputs_of(*args, **named)]
        self._calls += map(self._kept, found)

    def _kept(self, call: Inputs) -> Inputs:
        """Return a copy of the inputs of a call."""
        absent = [name for name in self._names if call.get(name) is None]
        if absent:
            raise BadInputs(
                f"the transformer is called without {absent[0]}, which it reads by its config; expected a pipeline of "
                "this model"
            )
        return {name: call[name].detach().cpu().clone() for name in self._names}
