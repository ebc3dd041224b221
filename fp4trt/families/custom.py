"""Families of the user's own files: ``--module package.file:function``, which child processes inherit."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from fp4trt.errors import BadModule

if TYPE_CHECKING:
    from fp4trt.families.family import Family

__all__ = ["VARIABLE", "Describes", "custom_families", "use_module"]

VARIABLE: Final = "FP4TRT_MODULE"
"""Environment variable that holds ``package.file:function``."""


@runtime_checkable
class Describes(Protocol):
    """What says of a model all that a family does: :class:`fp4trt.custom_model.CustomModel`."""

    def family(self) -> Family:
        """Return the model as a family."""
        ...


def use_module(name: str) -> None:
    """Have this process, and those that it starts, know the family that a function of the user's returns.

    Args:
        name: ``package.file:function``, found from the current folder too, or ``path/to/file.py:function``.

    Raises:
        BadModule: there is no such function, or what it returns is wrong.
    """
    where, colon, function = name.rpartition(":")
    if not colon or not function:
        raise BadModule(f"the module is {name!r}; expected package.file:function, such as my_model:denoiser")
    if where.endswith(".py"):
        name = f"{Path(where).resolve()}:{function}"
    else:
        known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(Path.cwd()), *filter(None, known)]))
    os.environ[VARIABLE] = name
    custom_families()


def custom_families() -> tuple[Family, ...]:
    """Return the family that the environment names, or nothing.

    Raises:
        BadModule: as :func:`use_module`.
    """
    name = os.environ.get(VARIABLE)
    return (_loaded(name),) if name else ()


@functools.cache
def _loaded(name: str) -> Family:
    where, _, function = name.rpartition(":")
    try:
        module = _file(Path(where)) if where.endswith(".py") else _import(where)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadModule(
            f"{where} cannot be imported ({reason}); expected a file of yours, such as my_model.py"
        ) from None
    described = getattr(module, function, None)
    if not callable(described):
        raise BadModule(
            f"{where} has no function {function}; expected one that returns a fp4trt.custom_model.CustomModel"
        )
    try:
        made = described()
    except BadModule:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadModule(
            f"{name} raised {reason}; expected a function without arguments that returns a CustomModel"
        ) from None
    return _family(name, made)


def _import(where: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(where)


def _file(path: Path) -> Any:
    name = f"{__name__}.{path.stem}"  # in nobody's way
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _family(name: str, described: object) -> Family:
    from fp4trt.families.family import Family

    if isinstance(described, Family):
        return described
    if isinstance(described, Describes):
        return described.family()
    raise BadModule(f"{name} returns a {type(described).__name__}; expected a fp4trt.custom_model.CustomModel")
