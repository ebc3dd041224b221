"""What a description of a model of the user's may say, held against its examples before anything else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, get_args

from fp4trt.errors import BadModule
from fp4trt.families.family import Role

if TYPE_CHECKING:
    import torch

__all__ = ["Described", "reason_of", "refuse_misfits", "refuse_other_results", "sized"]


class Described(Protocol):
    """What :class:`fp4trt.custom_model.CustomModel` says of a model."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """Name of an input to its example."""
        ...

    @property
    def axes(self) -> Mapping[str, Sequence[str | int | None]]:
        """Name of an input to its axes."""
        ...

    @property
    def outputs(self) -> Mapping[str, Sequence[str | int | None]]:
        """Name of an output to its axes."""
        ...

    @property
    def sizes(self) -> Mapping[str, tuple[int, int, int]]:
        """Name of an axis to its bounds."""
        ...

    @property
    def roles(self) -> Mapping[str, Role]:
        """Name of an input to what its values are."""
        ...


def reason_of(error: BaseException) -> str:
    """Return what was raised, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def refuse_misfits(model: Described) -> None:
    """Refuse a description that contradicts itself.

    Raises:
        BadModule: naming the first thing that is wrong.
    """
    _refuse_other_kinds(model)
    _refuse_other_axes(model)
    _refuse_other_sizes(model)
    _refuse_equal_sizes(model)


def _refuse_other_kinds(model: Described) -> None:
    for what in ("inputs", "axes", "outputs", "sizes", "roles"):
        if not isinstance(getattr(model, what), Mapping):
            raise BadModule(f"{model.name}: {what} is a {type(getattr(model, what)).__name__}; expected a mapping")
    for what in ("blocks", "linears"):
        if isinstance(getattr(model, what), str) or not getattr(model, what):
            raise BadModule(
                f"{model.name}: {what} is {getattr(model, what)!r}; expected a list with one entry at least"
            )
    if not model.outputs:
        raise BadModule(f"{model.name} names no outputs; expected one at least")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", model.name):
        raise BadModule(f"the model's name is {model.name!r}; expected letters, digits, _ and -")


def _refuse_other_axes(model: Described) -> None:
    if set(model.axes) != set(model.inputs):
        odd = sorted(set(model.axes) ^ set(model.inputs))[0]
        raise BadModule(f"{model.name}: {odd} is not in both inputs and axes; expected the same names")
    for name, axes in [*model.axes.items(), *model.outputs.items()]:
        unknown = [axis for axis in axes if isinstance(axis, str) and axis not in model.sizes]
        if unknown:
            raise BadModule(
                f"{model.name}: {name} has an axis {unknown[0]!r}; expected one of {', '.join(model.sizes)}"
            )
        if name in model.inputs and len(axes) != model.inputs[name].dim():
            shape = list(model.inputs[name].shape)
            raise BadModule(f"{model.name}: {name} has {len(axes)} axes, and its example the shape {shape}")


def _refuse_other_sizes(model: Described) -> None:
    for name, sizes in model.sizes.items():
        whole = isinstance(sizes, tuple | list) and [size for size in sizes if type(size) is int and size > 0]
        if not whole or len(whole) != 3 or len(sizes) != 3 or whole != sorted(whole):
            raise BadModule(f"{model.name}: {name} is {sizes!r}; expected minimum, default and maximum, in order")
    for name, role in model.roles.items():
        if name not in model.inputs or role not in get_args(Role):
            known = f"one of {', '.join(model.inputs)}, and one of {', '.join(get_args(Role))}"
            raise BadModule(f"{model.name}: the role of {name!r} is {role!r}; expected {known}")
    used = {axis for axes in model.axes.values() for axis in axes}
    if surplus := [name for name in model.sizes if name not in used]:
        raise BadModule(f"{model.name}: no input has an axis {surplus[0]}, which sizes names")


def _refuse_equal_sizes(model: Described) -> None:
    """Refuse examples by whose sizes nobody could tell whose tokens a linear reads, or that contradict each other."""
    found: dict[str, int] = {}
    for name in model.inputs:
        for axis, size in sized(model, name):
            if found.setdefault(axis, size) != size:
                raise BadModule(f"{model.name}: {axis} is {found[axis]} in one example and {size} in that of {name}")
    for axis, size in found.items():
        if equal := [other for other in found if other < axis and found[other] == size]:
            raise BadModule(
                f"{model.name}: {equal[0]} and {axis} are both {size} in the examples; give them unlike sizes"
            )


def refuse_other_results(model: Described, result: object) -> None:
    """Refuse a forward that returns something else than the outputs that are named."""
    import torch

    results: tuple[Any, ...] = tuple(result) if isinstance(result, tuple | list) else (result,)
    if not all(isinstance(value, torch.Tensor) for value in results) or len(results) != len(model.outputs):
        found = ", ".join(type(value).__name__ for value in results)
        raise BadModule(
            f"{model.name}: forward returns {found}; expected {len(model.outputs)} tensors, as outputs names"
        )
    example = {axis: size for name in model.inputs for axis, size in sized(model, name)}
    for (name, axes), value in zip(model.outputs.items(), results, strict=True):
        shape = list(value.shape)
        said = [
            example.get(axis, size) if isinstance(axis, str) else axis for axis, size in zip(axes, shape, strict=False)
        ]
        if len(axes) != len(shape) or any(one not in (None, size) for one, size in zip(said, shape, strict=True)):
            raise BadModule(
                f"{model.name}: the output {name} has the shape {shape} of the examples; its axes are {list(axes)}"
            )


def sized(model: Described, name: str) -> Iterator[tuple[str, int]]:
    """Yield each axis of an example input that may change, but for the batch, and its size there."""
    for axis, size in zip(model.axes[name], model.inputs[name].shape, strict=True):
        if isinstance(axis, str) and axis != "B":
            yield axis, size
