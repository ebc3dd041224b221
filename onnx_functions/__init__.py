"""Deployable ONNX in, verdict on its numerics out: what FP4 operators mean, and whether a graph computes it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_functions.simulate import session, simulate
    from onnx_functions.validate import validate

__all__ = ["session", "simulate", "validate"]

_MODULE_OF = {"session": "simulate", "simulate": "simulate", "validate": "validate"}


def __getattr__(name: str) -> Any:
    """Load on first use (PEP 562): `validate` needs torch, the others do not."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


class _Room(ModuleType):
    """This package, whose verbs are functions although modules bear the same names.

    Importing `onnx_functions.validate` binds that module to `validate` here; the function takes its place.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _MODULE_OF:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room
