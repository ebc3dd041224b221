"""Model families: which linears to quantize, which share an input, what goes in and out. Data and functions only.

Every :class:`Family` that a module of this package defines is known: a new one is one file here.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Final

from fp4trt.errors import BadCheckpoint, UnknownFamily
from fp4trt.families.custom import custom_families
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Transformer
from fp4trt.progress import note_once

__all__ = ["COMPONENTS", "FAMILIES", "Dim", "Family", "Symbol", "Transformer", "family_named", "family_of"]

Symbol = Dim
"""Former name of :class:`Dim`; works for one more version."""


def _modules() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [importlib.import_module(f"fp4trt.families.{name}") for name in names]


def _defined() -> tuple[Family, ...]:
    found = {value.name: value for module in _modules() for value in vars(module).values() if isinstance(value, Family)}
    return tuple(sorted(found.values(), key=lambda family: (not family.special, family.name)))


FAMILIES: Final = _defined()
"""In the order in which a config is tried on them: special cases of another family first."""

COMPONENTS: Final[tuple[Family, ...]] = tuple(
    family for module in _modules() for family in vars(module).get("COMPONENTS", ())
)
"""The other parts of a pipeline, text encoders and autoencoders: they go the same road in BF16."""


def family_of(config: Config, folder: str | Path | None = None) -> Family:
    """Return the family of a diffusers config.

    Args:
        config: the config.
        folder: that it is from, for messages.

    Raises:
        UnknownFamily: no family fits.
        BadCheckpoint: the config contradicts itself, or is of a model that is not supported.
    """
    name = Path(folder) / "config.json" if folder is not None else "config.json"
    for family in (*custom_families(), *FAMILIES, *COMPONENTS):
        if family.matches(config):
            if (why := family.unsupported(config)) is not None:
                raise BadCheckpoint(f"{name}: {why}")
            wrong = family.problem(config)
            if wrong is not None:
                raise BadCheckpoint(f"{name}: {wrong}; take the one that belongs to the weights")
            if (remark := family.remark(config)) is not None:
                note_once(remark)
            return family
    if (part := _part_of_a_pipeline(config)) is not None:
        known = ", ".join(sorted({family.class_name for family in COMPONENTS}))
        raise UnknownFamily(f"{name} describes a {part}; of the parts of a pipeline expected one of: {known}")
    known = ", ".join(sorted({family.class_name for family in FAMILIES}))
    raise UnknownFamily(
        f"{name} describes a {config.get('_class_name', 'model without _class_name')}; "
        f"expected one of: {known}; give the folder of a diffusers transformer, or --module for a model of your own"
    )


def _part_of_a_pipeline(config: Config) -> str | None:
    """Return the class of a text encoder or an autoencoder; None of any other model."""
    classes = [config["_class_name"]] if "_class_name" in config else config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    is_part = isinstance(first, str) and ("_class_name" not in config or first.startswith("Autoencoder"))
    return first if is_part else None


def family_named(name: str) -> Family | None:
    """Return the family that a manifest or a graph names, None where there is none of that name."""
    return next((family for family in (*custom_families(), *FAMILIES, *COMPONENTS) if family.name == name), None)
