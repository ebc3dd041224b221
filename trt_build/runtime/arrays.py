"""What a session returns: values in host memory or on a card, which numpy, torch and others take without a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_build.runtime.dlpack import CPU, DTYPES, View, array_at, capsule_of

__all__ = ["DeviceArray", "on_host"]

ReadBack = Callable[[View], npt.NDArray[Any]]


class DeviceArray:
    """Values of one type, in row-major order.

    ``torch.from_dlpack(array)``, and any other library's, takes them as they lie, in BF16 and on a GPU too.
    ``numpy.asarray(array)`` gives an array in host memory, BF16 in ml_dtypes' type.

    Args:
        view: where they lie; its owner is kept.
        read_back: copies values of a card to the host; needed for such alone.
    """

    def __init__(self, view: View, read_back: ReadBack | None = None) -> None:
        self._view = view
        self._read_back = read_back

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of values along each axis."""
        return self._view.shape

    @property
    def dtype(self) -> str:
        """The ONNX element type, such as BFLOAT16."""
        return self._view.dtype

    @property
    def pointer(self) -> int:
        """The address of the first value."""
        return self._view.pointer

    def numpy(self) -> npt.NDArray[Any]:
        """Return the values in host memory; without a copy where they lie there."""
        if self._view.on_card:
            assert self._read_back is not None, "what lies on a card has a way back"
            return self._read_back(self._view)
        return array_at(self._view)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        found = self.numpy()
        return np.array(found, dtype, copy=copy) if dtype is not None or copy else found

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        # Sessions return when the values are there: no stream has to wait. A newer version may be asked for, and this
        # one given, as the array API standard says.
        if copy or (dl_device is not None and tuple(dl_device) != self._view.device):
            raise BufferError("a session's result is given as it lies; copy or move it afterwards")
        return capsule_of(self._view)

    def __repr__(self) -> str:
        where = "CPU" if self._view.device[0] == CPU else f"cuda:{self._view.device[1]}"
        return f"DeviceArray({self.dtype}, {list(self.shape)}, {where})"


def on_host(values: npt.NDArray[Any], dtype: str) -> DeviceArray:
    """Return an array of numpy as a result, in an ONNX element type."""
    kept = np.ascontiguousarray(values.astype(DTYPES[dtype], copy=False)).reshape(values.shape)
    return DeviceArray(View(kept.ctypes.data, tuple(kept.shape), dtype, (CPU, 0), None, kept))
