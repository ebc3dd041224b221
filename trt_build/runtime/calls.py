"""Whether the arrays of a call are what a graph or an engine takes: names, types, axes, and one size a symbol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fp4trt.errors import BadCall
from trt_build.runtime.dlpack import View, view_of
from trt_build.signature import Port

__all__ = ["views_of"]


def views_of(ports: Mapping[str, Port], given: Mapping[str, Any], stream: int | None = None) -> dict[str, View]:
    """Return where the arrays of a call lie, in the order of the ports.

    Args:
        ports: the inputs.
        given: input to its array.
        stream: a CUDA stream, which waits until values that lie on a GPU are there.

    Raises:
        BadCall: an input is missing, unknown, or not of its port's type and shape.
    """
    if not isinstance(given, Mapping):
        raise BadCall(f"inputs is a {type(given).__name__}; expected input name to array: {', '.join(ports)}")
    for name in sorted(ports.keys() ^ given.keys(), key=str):
        if name in ports:
            raise BadCall(f"the input {name} is missing; expected {', '.join(ports)}")
        raise BadCall(f"{name} is no input; expected {', '.join(ports)}: leave it out")
    views = {name: view_of(name, given[name], stream) for name in ports}
    sizes: dict[str, tuple[str, int]] = {}
    for name, port in ports.items():
        _check(port, views[name], sizes)
    return views


def _check(port: Port, view: View, sizes: dict[str, tuple[str, int]]) -> None:
    """Hold an array against its port, and its sizes against those that symbols have by other inputs.

    Args:
        sizes: symbol to the first input that has it and its size there; is added to.
    """
    if view.dtype != port.dtype:
        raise BadCall(f"the input {port.name} is {view.dtype}; expected {port.dtype}: convert it")
    if len(view.shape) != len(port.dims):
        raise BadCall(f"the input {port.name} is {list(view.shape)}; expected {_dims(port)}")
    for size, dim in zip(view.shape, port.dims, strict=True):
        if isinstance(dim, int) and size != dim:
            raise BadCall(f"the input {port.name} is {list(view.shape)}; expected {_dims(port)}")
        if isinstance(dim, str):
            other, known = sizes.setdefault(dim, (port.name, size))
            if size != known:
                raise BadCall(
                    f"the input {port.name} is {list(view.shape)}, {dim} {size}, and {other} has {dim} {known}; "
                    f"expected one size of {dim}: {_dims(port)}"
                )


def _dims(port: Port) -> str:
    return f"[{', '.join('any' if dim is None else str(dim) for dim in port.dims)}]"
