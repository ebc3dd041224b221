"""A model of your own, any ``torch.nn.Module``, as a family: described by example inputs and patterns of linears.

A function without arguments returns the :class:`CustomModel`; ``--module package.file:function``, or the environment
variable ``FP4TRT_MODULE``, has every verb know it. docs/adding-a-model.md walks the whole road.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp4trt.errors import BadModule
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Dtype, Family, Group, Input, Role, Stack

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["CustomModel", "save_checkpoint"]

WEIGHTS: Final = "diffusion_pytorch_model.safetensors"

Axes = Sequence[str | int | None]
"""Of a tensor: the name of a size that may change, or a number or None where it may not."""


@dataclass(frozen=True)
class CustomModel:
    """A model of your own.

    Attributes:
        name: what checkpoints, graphs and messages call it: letters, digits, ``_`` and ``-``.
        make: makes the module, with no weights that matter; called without arguments, on the meta device.
        inputs: name of each argument of the module's ``forward`` to an example of it, batch first. BF16 stands for the
            dtype to compute in; FP32, bool, int32 and int64 stay what they are.
        axes: name of each input to its axes, such as ``("B", "L", None)``.
        outputs: name of each tensor that ``forward`` returns to its axes, in order.
        sizes: name of a size that may change to its minimum, default and maximum.
        linears: patterns of the module paths of the linears to quantize, as recipes have them.
        blocks: paths of module lists whose members run one after another, such as ``("blocks",)``. What runs block by
            block (``nvfp4-quality`` and its kin, ``validate --level blocks``) needs them.
        roles: name of an input to what example values of it are, where normal numbers will not do: ``time`` in (0, 1],
            ``guidance`` in [1, 5), ``mask``, ``padding``, ``choice`` of 0 and 1.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, torch.Tensor]
    axes: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    sizes: Mapping[str, tuple[int, int, int]]
    linears: Sequence[str] = ("*",)
    blocks: Sequence[str] = ()
    roles: Mapping[str, Role] = field(default_factory=dict)

    def family(self) -> Family:
        """Return the model as a family.

        Raises:
            BadModule: naming what of it is wrong.
        """
        return _family(self)


def save_checkpoint(model: CustomModel, module: nn.Module, folder: str | Path) -> None:
    """Write a module with its weights as the plain checkpoint that the verbs take: BF16, and a config.json.

    Args:
        model: what describes it.
        module: as ``model.make`` makes it, trained.
        folder: to write; made where it is missing.

    Raises:
        BadModule: the module's tensors are not those of what ``model.make`` makes.
    """
    import torch

    from fp4trt.safetensors_file import bytes_of, plan_of, write

    family = model.family()
    state = {name: value.detach().to(torch.bfloat16) for name, value in module.state_dict().items()}
    made = family.state({})
    for name in made.keys() | state.keys():
        if made.get(name) != (tuple(state[name].shape) if name in state else None):
            raise BadModule(f"{name} of the module to save is not that of what make() makes; expected the same class")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": model.name, **_counts(model, _made(model))}
    plan = [plan_of(name, value) for name, value in state.items()]
    write(folder / WEIGHTS, plan, ((name, bytes_of(value)) for name, value in state.items()), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _family(model: CustomModel) -> Family:
    _refuse_what_does_not_fit(model)
    module = _made(model)
    counts = _counts(model, module)
    groups = tuple(_groups(model, module))
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    in_blocks = tuple(f"{path}." for path in model.blocks)

    def problem(config: Config) -> str | None:
        given = {path: config.get(path) for path in counts}
        return None if given == counts else f"its blocks are {given}, expected {counts}, as make() makes them"

    return Family(
        name=model.name,
        class_name=model.name,
        matches=lambda config: config.get("_class_name") == model.name,
        problem=problem,
        stacks=tuple(_stack(path, counts[path], groups) for path in model.blocks),
        dims={name: Dim(_kind(name), *_bounds(sizes)) for name, sizes in model.sizes.items()},
        inputs={name: _input(model, name) for name in model.inputs},
        outputs={name: tuple(axes) for name, axes in model.outputs.items()},
        positions=lambda _: {},
        state=lambda _: dict(shapes),
        outside=tuple(group for group in groups if not group.linears[0].startswith(in_blocks)),
        lookups=tuple(_no_linears(module)),
        make=lambda _: _returning_tuples(model, model.make()),
        special=True,
    )


def _kind(name: str) -> Any:
    return "batch" if name == "B" else "size"


def _bounds(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a range in the order of :class:`Dim`: minimum, maximum, default."""
    low, usual, high = sizes
    return low, high, usual


def _refuse_what_does_not_fit(model: CustomModel) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", model.name):
        raise BadModule(f"the model's name is {model.name!r}; expected letters, digits, _ and -")
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
    for name, sizes in model.sizes.items():
        if len(sizes) != 3 or not 0 < sizes[0] <= sizes[1] <= sizes[2]:
            raise BadModule(f"{model.name}: {name} is {sizes}; expected minimum, default and maximum, in order")


def _made(model: CustomModel) -> nn.Module:
    """Return the module on the meta device, in BF16."""
    import torch

    with torch.device("meta"):
        return model.make().to(torch.bfloat16).eval()


def _counts(model: CustomModel, module: nn.Module) -> dict[str, int]:
    """Return how many blocks each list has."""
    from torch import nn

    found = {}
    for path in model.blocks:
        try:
            blocks = module.get_submodule(path)
        except AttributeError:
            raise BadModule(f"{model.name} has no module {path}, which blocks names") from None
        if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
            raise BadModule(f"{model.name}: {path} is a {type(blocks).__name__}; expected a ModuleList of blocks")
        found[path] = len(blocks)
    return found


def _groups(model: CustomModel, module: nn.Module) -> Iterator[Group]:
    """Yield the linears to quantize by the tensor that they read, in the order in which they run."""
    import torch
    from torch import nn

    read: dict[int, tuple[torch.Tensor, list[str]]] = {}
    chosen = {
        path: linear
        for path, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and any(fnmatchcase(path, pattern) for pattern in model.linears)
    }
    if not chosen:
        raise BadModule(f"{model.name} has no linear that {' or '.join(model.linears)} matches")

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            read.setdefault(id(given[0]), (given[0], []))[1].append(path)

        return hook

    handles = [linear.register_forward_pre_hook(note(path)) for path, linear in chosen.items()]
    inputs = {name: value.to("meta") for name, value in model.inputs.items()}
    try:
        with torch.no_grad():
            module(**inputs)
    except Exception as error:
        raise BadModule(f"{model.name} does not run on its example inputs: {type(error).__name__}: {error}") from None
    finally:
        for handle in handles:
            handle.remove()
    ran = [path for _, paths in read.values() for path in paths]
    for path in chosen:
        if ran.count(path) != 1:
            times = f"runs {ran.count(path)} times" if path in ran else "does not run"
            raise BadModule(f"{model.name}: {path} {times} in a call; expected once, or leave it out of linears")
    for value, paths in read.values():
        yield Group(_tokens(model, value), tuple(paths))


def _tokens(model: CustomModel, read: torch.Tensor) -> str:
    """Return whose tokens a linear reads, by the number that it reads in the examples; empty for one vector."""
    example = {axis: size for name in model.inputs for axis, size in _sized(model, name)}
    count = read[0, ..., 0].numel() if read.dim() > 2 else 1
    names = [name for name, size in example.items() if size == count and name != "B"]
    sums = (f"{a}+{b}" for a in example for b in example if a < b and example[a] + example[b] == count)
    return "" if count == 1 else next(iter(names), None) or next(sums, "")


def _sized(model: CustomModel, name: str) -> Iterator[tuple[str, int]]:
    for axis, size in zip(model.axes[name], model.inputs[name].shape, strict=True):
        if isinstance(axis, str) and axis != "B":
            yield axis, size


def _stack(path: str, count: int, groups: Sequence[Group]) -> Stack:
    """Return a list of blocks; every block is traced, so that they need not be alike."""
    found: dict[tuple[str, ...], Group] = {}
    present: list[set[str]] = [set() for _ in range(count)]
    for group in groups:
        if group.linears[0].startswith(f"{path}."):
            index = int(group.linears[0].removeprefix(f"{path}.").partition(".")[0])
            if f"{path}.{index}" in group.linears:
                raise BadModule(f"{path}.{index} is a linear itself; expected blocks with linears in them")
            leaves = tuple(linear.removeprefix(f"{path}.{index}.") for linear in group.linears)
            found.setdefault(leaves, Group(group.reads, leaves))
            present[index].update(leaves)
    every = {leaf for leaves in found for leaf in leaves}
    absent = [tuple(sorted(every - there)) for there in present]
    return Stack(path, path, tuple(found.values()), attentions=(), lacks=lambda _, index: absent[index], equal=False)


def _input(model: CustomModel, name: str) -> Input:
    import torch

    example = model.inputs[name]
    kinds: dict[torch.dtype, Dtype] = {
        torch.bfloat16: "bf16",
        torch.float32: "fp32",
        torch.bool: "bool",
        torch.int32: "int32",
        torch.int64: "int64",
    }
    if example.dtype not in kinds:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in kinds)
        raise BadModule(f"{model.name}: {name} is {example.dtype}; expected one of {known}")
    kind = kinds[example.dtype]
    usual: dict[Dtype, Role] = {"bool": "mask", "int32": "choice", "int64": "choice"}
    sizes = zip(model.axes[name], example.shape, strict=True)
    shape = tuple(axis if isinstance(axis, str) else size for axis, size in sizes)
    return Input(shape, model.roles.get(name, usual.get(kind, "normal")), kind)


def _no_linears(module: nn.Module) -> Iterator[str]:
    """Yield the modules with a matrix that is no linear's."""
    from torch import nn

    for path, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(part, nn.Linear) and weight is not None and weight.dim() == 2:
            yield path


def _returning_tuples(model: CustomModel, module: nn.Module) -> nn.Module:
    """Return the module as one that is called as diffusers' are: by name, with ``return_dict``, for a tuple."""
    base: Any = type(module)

    def forward(self: Any, return_dict: bool = False, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        del return_dict
        result = base.forward(self, **inputs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, kind) for name in ("self", *model.inputs)]
    switch = inspect.Parameter("return_dict", kind, default=False)
    forward.__signature__ = inspect.Signature([*names, switch])  # type: ignore[attr-defined]
    module.__class__ = type(base.__name__, (base,), {"forward": forward})
    return module
