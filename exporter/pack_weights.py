"""Pack a weight to NVFP4 a few rows at a time: one weight's codes are in memory only while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from calibration.formats import nvfp4
from fp4trt.errors import BadGraph

__all__ = ["PackedWeight"]

_CHUNK: Final = 1 << 18
"""Elements that are packed at a time: 1 MiB in FP32, which stays in the cache with what is computed from it."""


class PackedWeight:
    """A stored weight [..., K] as NVFP4: ask for the codes, then for the block scales, which wait while they are taken.

    The global scale is the weight's own, ``amax / (6 * 448)``; 1 for a weight of zeros (as ModelOpt has it), because
    TensorRT refuses a global scale of 0. Its codes and block scales are then 0, and so is what they stand for.
    """

    def __init__(self, name: str, tensor: ir.TensorProtocol) -> None:
        self.name = name
        self.tensor = tensor
        self._scales: list[npt.NDArray[np.uint8]] = []

    @cached_property
    def global_scale(self) -> torch.Tensor:
        """The FP32 global scale, 0-d.

        Raises:
            BadGraph: the weight holds NaN or infinite values, or is not 0 and too small for a global scale in FP32.
        """
        amax = 0.0
        for rows in self._rows():
            largest = float(rows.abs().max())
            if not largest < float("inf"):  # false for NaN too
                raise BadGraph(f"weight {self.name} holds NaN or infinite values; expected finite weights")
            amax = max(amax, largest)
        scale = nvfp4.global_scale(amax)
        if amax > 0 and not scale > 0:
            raise BadGraph(
                f"weight {self.name} is at most {amax:.3g}, too small for FP4: all of it would be 0; check it"
            )
        return scale if scale > 0 else torch.ones(())

    def codes(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the packed codes, two a byte, and keep the block scales."""
        self._scales.clear()
        for rows in self._rows():
            codes, scales = nvfp4.quantize(rows, self.global_scale)
            self._scales.append(scales.view(torch.uint8).numpy())
            yield nvfp4.pack_codes(codes).numpy()

    def block_scales(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of the block scales, and forget them and the weight.

        Only after :meth:`codes`.
        """
        yield from self._scales
        self._scales.clear()
        if isinstance(self.tensor, ir.ExternalTensor):
            self.tensor.release()

    def _rows(self) -> Iterator[torch.Tensor]:
        """Yield the weight in FP32, [rows, K], in pieces."""
        array: npt.NDArray[Any] = self.tensor.numpy()
        matrix = array.reshape(-1, array.shape[-1])
        step = max(1, _CHUNK // matrix.shape[1])
        for begin in range(0, len(matrix), step):
            yield torch.from_numpy(np.ascontiguousarray(matrix[begin : begin + step].astype(np.float32)))
