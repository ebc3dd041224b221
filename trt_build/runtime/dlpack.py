"""DLPack without a tensor library: where the values of any library's array lie, and an array that others can take.

numpy knows neither BF16 nor memory on a GPU here, and torch is not needed to run an engine, so that the capsules are
read and written by ctypes. Source: dlpack.h of the DLPack project; the layout of DLManagedTensor has not changed since
its first version, and every library takes and gives it when no newer one is asked for.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadCall

__all__ = ["CPU", "CUDA", "DTYPES", "View", "array_at", "capsule_of", "view_of"]

CPU: Final = 1
CUDA: Final = 2
_PINNED: Final = 3
"""Kinds of devices; the last is host memory too."""

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "FLOAT": np.dtype(np.float32),
    "FLOAT16": np.dtype(np.float16),
    "BFLOAT16": np.dtype(ml_dtypes.bfloat16),
    "DOUBLE": np.dtype(np.float64),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "INT16": np.dtype(np.int16),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""ONNX element type to numpy's dtype, of all that inputs and outputs may have."""

_CODES: Final = {
    **{f"INT{bits}": (0, bits) for bits in (8, 16, 32, 64)},
    "UINT8": (1, 8),
    "FLOAT16": (2, 16),
    "FLOAT": (2, 32),
    "DOUBLE": (2, 64),
    "BFLOAT16": (4, 16),
    "BOOL": (6, 8),
}
_NAMES: Final = {code: name for name, code in _CODES.items()}
_NAME: Final = b"dltensor"
_USED: Final = b"used_dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_api = ctypes.pythonapi
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(("PyCapsule_New", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))
# While a capsule is deallocated there must be no new reference to it: it is passed as an address.
_still_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_last_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))


@dataclass(frozen=True)
class View:
    """Where an array's values lie.

    Attributes:
        pointer: the address of the first one; 0 where there may be none.
        shape: the number of values along each axis.
        dtype: the ONNX element type, such as BFLOAT16.
        device: the kind and the number of the device: ``(CPU, 0)``, ``(CUDA, 1)``.
        strides: of each axis, in values; None where they lie in row-major order without gaps.
        owner: what keeps the memory.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    strides: tuple[int, ...] | None
    owner: object

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def on_card(self) -> bool:
        """Whether they lie in the memory of a GPU."""
        return self.device[0] == CUDA


def view_of(name: str, array: Any, stream: int | None = None) -> View:
    """Return where the values of an array lie: numpy's, with ml_dtypes' BF16, or any with ``__dlpack__``.

    Args:
        name: of the input, for messages.
        array: is kept by the result.
        stream: a CUDA stream, which waits until the values of an array on a GPU are there.

    Raises:
        BadCall: it is no array, of a type that no input has, or on another kind of device.
    """
    if isinstance(array, np.ndarray):
        return _view_of_numpy(name, array)
    if not hasattr(array, "__dlpack__"):
        raise BadCall(f"the input {name} is a {type(array).__name__}; expected an array: numpy's, or with __dlpack__")
    kind, _ = array.__dlpack_device__()
    if int(kind) not in (CPU, CUDA, _PINNED):
        raise BadCall(
            f"the input {name} lies on a device of DLPack's kind {int(kind)}; expected the CPU or an NVIDIA GPU"
        )
    try:
        capsule = array.__dlpack__(stream=stream) if int(kind) == CUDA else array.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:  # as libraries refuse what they cannot export
        raise BadCall(f"the input {name}, a {type(array).__name__}, cannot be read: {error}") from None
    return _view_of_capsule(name, capsule, array)


def _view_of_numpy(name: str, array: npt.NDArray[Any]) -> View:
    found = next((dtype for dtype, known in DTYPES.items() if known == array.dtype), None)
    if found is None:
        raise BadCall(f"the input {name} is {array.dtype}; expected one of: {', '.join(DTYPES).lower()}")
    kept = np.ascontiguousarray(array).reshape(array.shape)  # numpy gives what has no axis one
    return View(kept.ctypes.data, tuple(kept.shape), found, (CPU, 0), None, kept)


def _view_of_capsule(name: str, capsule: object, array: object) -> View:
    if not _is_valid(capsule, _NAME):
        raise BadCall(f"the input {name}, a {type(array).__name__}, gives no capsule of the first DLPack version")
    tensor = _Managed.from_address(_pointer(capsule, _NAME)).tensor
    dtype = _NAMES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
    if dtype is None:
        known = ", ".join(_CODES).lower()
        raise BadCall(
            f"the input {name} is of DLPack's type {tensor.code} in {tensor.bits} bits; expected one of: {known}"
        )
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    strides = tuple(tensor.strides[axis] for axis in range(tensor.ndim)) if tensor.strides else None
    if strides is not None and _is_dense(shape, strides):
        strides = None
    kind = CUDA if tensor.device_type == CUDA else CPU
    # The capsule is not taken over: as long as it lives, so does what it points to.
    return View(
        (tensor.data or 0) + tensor.byte_offset, shape, dtype, (kind, tensor.device_id), strides, (capsule, array)
    )


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether values lie in row-major order without gaps; an axis of one value may have any stride."""
    if 0 in shape:
        return True
    wanted = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != wanted:
            return False
        wanted *= size
    return True


def array_at(view: View) -> npt.NDArray[Any]:
    """Return values that lie in host memory as an array of numpy, without a copy; it keeps their owner."""
    dtype = DTYPES[view.dtype]
    if 0 in view.shape:
        return np.empty(view.shape, dtype)
    strides = view.strides or _dense_strides(view.shape)
    span = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, strides, strict=True))
    memory: Any = (ctypes.c_uint8 * (span * dtype.itemsize)).from_address(view.pointer)
    memory.owner = view.owner
    flat = np.frombuffer(memory, np.uint8).view(dtype)
    return np.lib.stride_tricks.as_strided(flat, view.shape, tuple(stride * dtype.itemsize for stride in strides))


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


_given: dict[int, tuple[Any, ...]] = {}
"""What capsules that are out point into, by the address of their DLManagedTensor."""


def _delete(managed: Any) -> None:
    _given.pop(ctypes.addressof(managed.contents), None)


def _destroy(capsule: int) -> None:
    """Free what a capsule holds that nobody has taken over; one that was is called ``used_dltensor``."""
    if _still_valid(capsule, _NAME):
        _given.pop(_last_pointer(capsule, _NAME), None)


# Held here, since others call them as long as there are capsules.
_DELETE = _Deleter(_delete)
_DESTROY = _Destructor(_destroy)


def capsule_of(view: View) -> object:
    """Return a capsule of values in row-major order, which keeps their owner until its taker is done with them."""
    assert view.strides is None, "a capsule is made of dense values"
    shape = (ctypes.c_int64 * len(view.shape))(*view.shape)
    managed = _Managed()
    tensor = managed.tensor
    tensor.data, tensor.ndim, tensor.lanes = view.pointer or None, len(view.shape), 1
    tensor.device_type, tensor.device_id = view.device
    tensor.code, tensor.bits = _CODES[view.dtype]
    tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _DELETE
    address = ctypes.addressof(managed)
    _given[address] = (managed, shape, view.owner)
    return _new(address, _NAME, _DESTROY)
