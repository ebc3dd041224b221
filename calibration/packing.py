"""Pack BF16 weights into NVFP4 at the speed of integer comparisons.

A BF16 magnitude is a 15-bit integer that grows with the value, and there are only 32,640 finite ones. So everything
that :mod:`calibration.nvfp4` computes fits into two small tables, made by that very code once for each global scale:

- the scale code of every magnitude that can be the largest of a block;
- for each of the 127 scale codes, the seven smallest magnitudes that round to code 1, 2, ... 7.

A code is then the number of thresholds that a magnitude reaches. It is bit-identical to the reference, because the
tables were asked of it and rounding is monotonic. Blocks lie side by side while they are packed, so that one comparison
serves thousands of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from calibration import nvfp4

__all__ = ["DevicePacker", "Packer"]

_MAGNITUDE: Final = np.uint16(0x7FFF)
"""The bits of a BF16 number without its sign."""

_FINITE: Final = 0x7F80
"""The magnitudes below are finite numbers; this one is infinity, those above are NaN."""

_SIGN: Final = np.uint16(0x8000)
_SCALES: Final = 127
"""E4M3 codes 0..126: the finite ones that are not negative."""

_TOGETHER: Final = 16384
"""Blocks that are packed at a time: 512 KiB of weights, which stay in the cache."""


class Packer:
    """Packs weights under one global scale; may be used by several threads at once.

    Args:
        scale: the FP32 global scale, above 0.
    """

    def __init__(self, scale: float | np.float32) -> None:
        g = torch.tensor(float(scale), dtype=torch.float32)
        largest = _values(np.arange(_FINITE, dtype=np.uint16))
        self._scale_codes = nvfp4.block_scales(largest, g).view(torch.uint8).numpy()
        self._thresholds = _thresholds(g)

    def pack(self, bits: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Quantize rows of a weight; bit-identical to :func:`calibration.nvfp4.quantize_reference`.

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
        for start in range(0, len(blocks), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            codes[part], scales[part] = self._pack_blocks(blocks[part])
        return codes.reshape(rows, columns // 2), scales.reshape(rows, columns // nvfp4.BLOCK_SIZE)

    def _pack_blocks(self, blocks: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Pack blocks [M, 16]; returns codes [M, 8] and scales [M]."""
        half = nvfp4.BLOCK_SIZE // 2
        across = np.empty((nvfp4.BLOCK_SIZE, len(blocks)), np.uint16)  # even places first, then the odd ones
        across[:half], across[half:] = blocks[:, 0::2].T, blocks[:, 1::2].T
        magnitude = across & _MAGNITUDE
        scales = self._scale_codes.take(magnitude.max(axis=0))
        reached = np.empty(across.shape, bool)
        codes = np.greater_equal(across, _SIGN, out=reached).view(np.uint8) * np.uint8(8)
        for threshold in self._thresholds.take(scales, axis=1):
            codes += np.greater_equal(magnitude, threshold, out=reached).view(np.uint8)
        # numpy multiplies bytes faster than it shifts them.
        return (codes[half:] * np.uint8(16) | codes[:half]).T, scales


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
