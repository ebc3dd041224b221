"""Pack BF16 weights into NVFP4 at the speed of integer comparisons.

A BF16 magnitude is a 15-bit integer that grows with the value, and there are only 32,640 finite ones. So everything
that :mod:`calibration.formats.nvfp4` computes fits into two small tables, made by that very code once for each global
scale:

- the scale code of every magnitude that can be the largest of a block;
- for each of the 127 scale codes, the seven smallest magnitudes that round to code 1, 2, ... 7.

A code is then the number of thresholds that a magnitude reaches. It is bit-identical to the reference, because the
tables were asked of it and rounding is monotonic. The comparisons are compiled by Numba into the processor's vector
instructions, and other threads run meanwhile.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from calibration.formats import nvfp4
from calibration.formats.compiled import compiled

__all__ = ["DevicePacker", "Packer"]

_FINITE: Final = 0x7F80
"""The magnitudes below are finite numbers; this one is infinity, those above are NaN."""

_SCALES: Final = 127
"""E4M3 codes 0..126: the finite ones that are not negative."""

_TOGETHER: Final = 64
"""Blocks whose codes are counted before they are put together, two a byte: they stay in the nearest cache."""


class Packer:
    """Packs weights under one global scale; may be used by several threads at once.

    Args:
        scale: the FP32 global scale, above 0.
    """

    def __init__(self, scale: float | np.float32) -> None:
        g = torch.tensor(float(scale), dtype=torch.float32)
        largest = _values(np.arange(_FINITE, dtype=np.uint16))
        self._scale_codes = nvfp4.block_scales(largest, g).view(torch.uint8).numpy()
        self._thresholds = np.ascontiguousarray(_thresholds(g).T)
        self._compiled = compiled(_pack)

    def pack(self, bits: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Quantize rows of a weight; bit-identical to :func:`calibration.formats.nvfp4.quantize_reference`.

        Args:
            bits: BF16 values as their bits, shape [N, K], K a multiple of 16, all finite.

        Returns:
            codes, two a byte, the first in the low nibble, uint8 [N, K / 2]; block scales, the bytes of E4M3 values,
            uint8 [N, K / 16].
        """
        rows, columns = bits.shape
        blocks = np.ascontiguousarray(bits).reshape(-1, nvfp4.BLOCK_SIZE)
        codes = np.empty((len(blocks), nvfp4.BLOCK_SIZE // 2), np.uint8)
        scales = np.empty(len(blocks), np.uint8)
        self._compiled(blocks, self._scale_codes, self._thresholds, codes, scales)
        return codes.reshape(rows, columns // 2), scales.reshape(rows, columns // nvfp4.BLOCK_SIZE)


def _pack(
    blocks: npt.NDArray[np.uint16],
    scale_codes: npt.NDArray[np.uint8],
    thresholds: npt.NDArray[np.uint16],
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
) -> None:
    """Pack blocks [M, 16] into codes [M, 8] and scales [M]; scale_codes [32640], thresholds [127, 7].

    Every sum is made 16 bits wide again at once: only so does the compiler keep as many numbers in a vector.
    """
    short: Any = np.uint16
    magnitude, sign = short(0x7FFF), short(8)
    counted = np.empty((_TOGETHER, 16), np.uint16)
    for start in range(0, len(blocks), _TOGETHER):
        together = min(_TOGETHER, len(blocks) - start)
        for index in range(together):
            block = blocks[start + index]
            largest = short(0)
            for place in range(16):
                value = block[place] & magnitude
                largest = value if value > largest else largest
            scale = scale_codes[largest]
            scales[start + index] = scale
            t = thresholds[scale]
            t1, t2, t3, t4, t5, t6, t7 = t[0], t[1], t[2], t[3], t[4], t[5], t[6]
            for place in range(16):
                value = block[place] & magnitude
                code = short((block[place] >> short(12)) & sign)
                code = short(code + short(value >= t1))
                code = short(code + short(value >= t2))
                code = short(code + short(value >= t3))
                code = short(code + short(value >= t4))
                code = short(code + short(value >= t5))
                code = short(code + short(value >= t6))
                code = short(code + short(value >= t7))
                counted[index, place] = code
        pairs = counted.view(np.uint32)
        for index in range(together):
            for place in range(8):
                pair = pairs[index, place]  # the first code in its low half, the second in its high one
                codes[start + index, place] = np.uint8(pair | (pair >> np.uint32(12)))


class DevicePacker:
    """Packs as :class:`Packer` does, with torch on a device: what a GPU is better at.

    Args:
        scale: the FP32 global scale, above 0.
        device: such as ``cuda``.
    """

    def __init__(self, scale: float | np.float32, device: str) -> None:
        self._scale = torch.tensor(float(scale), dtype=torch.float32, device=device)

    def pack(self, bits: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Quantize rows of a weight; see :meth:`Packer.pack`."""
        weight = torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16).to(self._scale.device)
        codes, scales = nvfp4.quantize(weight, self._scale)
        return nvfp4.pack_codes(codes).cpu().numpy(), scales.view(torch.uint8).cpu().numpy()


def _values(bits: npt.NDArray[np.uint16]) -> torch.Tensor:
    """Return BF16 numbers, given by their bits, in FP32."""
    return torch.from_numpy((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def _thresholds(g: torch.Tensor) -> npt.NDArray[np.uint16]:
    """Return, for codes 1..7 and each scale code, the smallest magnitude of at least that code: uint16 [7, 127].

    Found by bisection; infinity where no finite magnitude gets so far.
    """
    s8 = torch.arange(_SCALES, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    d = (s8 * g).expand(7, _SCALES)
    wanted = torch.arange(1, 8, dtype=torch.uint8)[:, None]
    low, high = np.zeros((7, _SCALES), np.uint16), np.full((7, _SCALES), _FINITE, np.uint16)
    while (low < high).any():
        middle = (low + high) // 2
        reaches = (nvfp4.codes_under(_values(middle), d) >= wanted).numpy()
        low, high = np.where(reaches, low, np.minimum(middle + 1, high)), np.where(reaches, middle, high)
    return high.astype(np.uint16)
