"""A model of your own, any ``torch.nn.Module``, as a family: described by example inputs and patterns of linears.

A function without arguments returns the :class:`CustomModel`; ``--module package.file:function``, or the environment
variable ``FP4TRT_MODULE``, has every verb know it. docs/adding-a-model.md walks the whole road.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp4trt.custom_checks import reason_of, refuse_misfits, refuse_other_results, sized
from fp4trt.errors import BadModule, OutputExists
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Dtype, Family, Group, Input, Role, Stack
from fp4trt.file_output import made_folder, partial_path, write_texts

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["CustomModel", "save_checkpoint"]

WEIGHTS: Final = "diffusion_pytorch_model.safetensors"

Axes = Sequence[str | int | None]
"""Axes of a tensor: the name of a size that may change, or a number or None where it may not."""


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
        blocks: paths of the module lists whose members run one after another, such as ``("blocks",)``, in the order in
            which they run: calibration goes block by block.
        roles: name of an input to what example values of it are, where normal numbers will not do: ``time`` in (0, 1],
            ``guidance`` in [1, 5), ``mask``, ``padding``, ``choice`` of 0 and 1.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, torch.Tensor]
    axes: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    sizes: Mapping[str, tuple[int, int, int]]
    blocks: Sequence[str]
    linears: Sequence[str] = ("*",)
    roles: Mapping[str, Role] = field(default_factory=dict)

    def family(self) -> Family:
        """Return the model as a family.

        Raises:
            BadModule: naming what of it is wrong.
        """
        return _family(self)


def save_checkpoint(model: CustomModel, module: nn.Module, folder: str | Path, force: bool = False) -> None:
    """Write a module with its weights as the plain checkpoint that the verbs take: BF16, and a config.json.

    Args:
        model: what describes it.
        module: as ``model.make`` makes it, trained.
        folder: to write.
        force: write into a folder that is there.

    Raises:
        BadModule: the module's tensors are not those of what ``model.make`` makes, or not finite.
        OutputExists: the folder is there.
    """
    import torch

    from fp4trt.safetensors_file import bytes_of, plan_of, write

    family = model.family()
    state = {name: value.detach().to(torch.bfloat16) for name, value in module.state_dict().items()}
    made = family.state({})
    for name in made.keys() | state.keys():
        if made.get(name) != (tuple(state[name].shape) if name in state else None):
            raise BadModule(f"{name} of the module to save is not that of what make() makes; expected the same class")
    odd = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if odd is not None:
        raise BadModule(f"{odd} of the module to save holds NaN or infinity in BF16; expected finite weights")
    folder = Path(folder)
    if folder.exists() and not force:
        raise OutputExists(f"{folder} exists; give another folder, or force=True")
    config = json.dumps({"_class_name": model.name, **_counts(model, module)}, indent=2)
    plan = [plan_of(name, value) for name, value in state.items()]
    with made_folder(folder):
        partial = partial_path(folder / WEIGHTS)
        try:
            write(partial, plan, ((name, bytes_of(value)) for name, value in state.items()), {"format": "pt"})
            partial.replace(folder / WEIGHTS)
        finally:
            partial.unlink(missing_ok=True)
        write_texts({folder / "config.json": f"{config}\n"})


def _family(model: CustomModel) -> Family:
    refuse_misfits(model)
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


def _made(model: CustomModel) -> nn.Module:
    """Return the module on the meta device, in BF16."""
    import torch
    from torch import nn

    try:
        with torch.device("meta"):
            module = model.make()
    except Exception as error:
        raise BadModule(
            f"{model.name}: make() raised {reason_of(error)}; it is called without arguments, on the meta device, and "
            "has to make the module without its data"
        ) from None
    if not isinstance(module, nn.Module):
        raise BadModule(f"{model.name}: make() returned a {type(module).__name__}; expected a torch.nn.Module")
    stored = module.state_dict()
    for name, value in module.named_buffers():
        if name not in stored or not value.is_floating_point():
            what = "not persistent" if name not in stored else f"{value.dtype}"
            raise BadModule(
                f"{model.name}: the buffer {name} is {what}, which no checkpoint holds; compute it in forward"
            )
    return module.to(torch.bfloat16).eval()


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
    """Yield the linears to quantize by the tensor that they read and the block that they lie in, as they run.

    Raises:
        BadModule: the module does not run on the examples as it is described.
    """
    from torch import nn

    chosen = {
        path: linear
        for path, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and any(fnmatchcase(path, pattern) for pattern in model.linears)
    }
    if not chosen:
        raise BadModule(f"{model.name} has no linear that {' or '.join(model.linears)} matches")
    lists = {path: module.get_submodule(path) for path in model.blocks}
    blocks = {f"{path}.{name}": block for path, each in lists.items() for name, block in each.named_children()}
    read, ran = _run(model, module, chosen, blocks)
    if ran != list(blocks):
        order = ", ".join(dict.fromkeys(block.rpartition(".")[0] for block in ran))
        raise BadModule(f"{model.name}: the blocks run otherwise than listed; expected each once, in the order {order}")
    linears = [path for _, paths in read for path in paths]
    for path in chosen:
        if linears.count(path) != 1:
            times = f"runs {linears.count(path)} times" if path in linears else "does not run"
            raise BadModule(f"{model.name}: {path} {times} in a call; expected once, or leave it out of linears")
    for value, paths in read:
        yield Group(_tokens(model, value), tuple(paths))


def _run(
    model: CustomModel, module: nn.Module, chosen: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]
) -> tuple[list[tuple[torch.Tensor, list[str]]], list[str]]:
    """Run the module on its examples; return what the chosen linears read, by block, and the blocks as they ran."""
    import torch

    read: dict[tuple[int, str], tuple[torch.Tensor, list[str]]] = {}
    ran: list[str] = []

    def note(path: str) -> Callable[..., None]:
        block = next((block for block in blocks if path.startswith(f"{block}.")), "")

        def hook(linear: Any, given: tuple[torch.Tensor, ...], named: Mapping[str, torch.Tensor]) -> None:
            (value,) = (*given, *named.values())
            if value.dtype != linear.weight.dtype:
                raise BadModule(f"{model.name}: {path} reads {value.dtype}; give inputs that it computes of in BF16")
            read.setdefault((id(value), block), (value, []))[1].append(path)

        return hook

    def pass_by(block: str) -> Callable[..., None]:
        return lambda *_: ran.append(block)

    handles = [linear.register_forward_pre_hook(note(path), with_kwargs=True) for path, linear in chosen.items()]
    handles += [block.register_forward_pre_hook(pass_by(path)) for path, block in blocks.items()]
    try:
        with torch.no_grad():
            result = module(**{name: value.to("meta") for name, value in model.inputs.items()})
    except BadModule:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise BadModule(f"{model.name} does not run on its example inputs, on the meta device: {reason}") from None
    finally:
        for handle in handles:
            handle.remove()
    refuse_other_results(model, result)
    return list(read.values()), ran


def _tokens(model: CustomModel, read: torch.Tensor) -> str:
    """Return whose tokens a linear reads, by how many it reads in the examples; empty for one vector."""
    example = {axis: size for name in model.inputs for axis, size in sized(model, name)}
    count = read[0, ..., 0].numel() if read.dim() > 2 else 1
    names = [name for name, size in example.items() if size == count]
    sums = (f"{a}+{b}" for a in example for b in example if a < b and example[a] + example[b] == count)
    most = max(example, key=lambda name: example[name], default="")  # where it is neither, as of patches
    return "" if count == 1 else next(iter(names), None) or next(sums, most)


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
