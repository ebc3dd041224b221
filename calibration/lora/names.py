"""A model's modules by every name that a LoRA file may give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fp4trt.families import Family
from fp4trt.single_files.names import Original, Part
from fp4trt.single_files.tables import SINGLE_FILES

__all__ = ["Module", "names_of"]

_FLUX1: Final = "FluxTransformer2DModel"
_XLABS: Final = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
    "processor.proj": "linear2",
}
"""Module of a block in XLabs' files of FLUX.1 to the module that it adds to; ``qkv`` of a single block is below."""

_QKV: Final = ("processor.qkv", "linear1_qkv")
"""Names of the first three parts of ``linear1`` of a single block, in XLabs' files and in ComfyUI."""


@dataclass(frozen=True)
class Module:
    """A module, or a parameter of its own, as a LoRA file may name it.

    Attributes:
        name: with dots.
        weight: the tensor that a change of its weight is for: its shape, and the tensors of diffusers that make it.
        bias: likewise; None where it has none.
        own: whether the name is diffusers' own, and not that of single files.
    """

    name: str
    weight: Original
    bias: Original | None
    own: bool


def names_of(family: Family, config: Mapping[str, Any]) -> dict[str, Module]:
    """Return a model's modules, and its parameters that belong to none, by all of their names.

    These are diffusers' and, where the class has some, those of single files, with ``_`` for each dot, so that one
    look-up serves the namings with dots and those without.

    Raises:
        AssertionError: two modules have one name.
    """
    state = family.state(config)
    own = {name: Original(shape, (Part(name, shape),)) for name, shape in state.items()}
    table = SINGLE_FILES.get(family.class_name)
    originals = table.layout(state) if table is not None else {}
    names: dict[str, Module] = {}
    for layout, is_own in ((own, True), (originals, False)):
        for name, module in _modules(layout, is_own):
            _add(names, name, module)
    if family.class_name == _FLUX1:
        for name, module in list(_aliases(names, config)):
            _add(names, name, module)
    return names


def _add(names: dict[str, Module], name: str, module: Module) -> None:
    known = names.setdefault(name.replace(".", "_"), module)
    if (known.weight, known.bias) != (module.weight, module.bias):
        raise AssertionError(f"{known.name} and {name} are one name without dots")


def _modules(layout: Mapping[str, Original], own: bool) -> Iterator[tuple[str, Module]]:
    for name, original in layout.items():
        path, dot, leaf = name.rpartition(".")
        if not dot or leaf not in ("weight", "bias"):
            yield name, Module(name, original, None, own)
        if dot and leaf in ("weight", "scale"):
            yield path, Module(path, original, layout.get(f"{path}.bias"), own)


def _aliases(modules: Mapping[str, Module], config: Mapping[str, Any]) -> Iterator[tuple[str, Module]]:
    """Yield FLUX.1's modules under the names of XLabs, and of ComfyUI for a part of ``linear1``."""
    for kind, count in (("double_blocks", config["num_layers"]), ("single_blocks", config["num_single_layers"])):
        for block in (f"{kind}.{index}" for index in range(count)):
            for alias, name in _XLABS.items():
                found = modules.get(f"{block}.{name}".replace(".", "_"))
                if found is not None:
                    yield f"{block}.{alias}", found
            linear = modules.get(f"{block}.linear1".replace(".", "_"))
            if linear is not None:
                qkv = _first_parts(linear, 3)
                yield from ((f"{block}.{alias}", qkv) for alias in _QKV)


def _first_parts(module: Module, count: int) -> Module:
    """Return a module's first parts as a module."""

    def first(original: Original) -> Original:
        parts = original.parts[:count]
        return Original((sum(part.shape[0] for part in parts), *original.shape[1:]), parts)

    return Module(module.name, first(module.weight), module.bias and first(module.bias), False)
