"""Pairs of low-rank factors, fused as diffusers and peft fuse them: bit for bit on a CPU.

diffusers loads a file's factors into peft's layers, which have the dtype of the layer that they change, and some of its
converters scale them before, in the file's dtype. peft multiplies BF16 factors in FP32, scales the product, rounds it
to BF16 and adds it to the weight, which is rounded again (``peft.tuners.lora.layer.Linear.merge``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from calibration.lora.adapter import Rows, Tensors

__all__ = ["Alpha", "Pair"]


@dataclass(frozen=True)
class Alpha:
    """Where the scale of a product comes from.

    Attributes:
        folded: whether a file's ``alpha`` goes into the factors before they are rounded to the weight's dtype, and not
            into the product.
        in_dtype: whether it is then divided by the rank in its own dtype.
        given: (alpha, rank) of a config of peft, in place of the file's; the rank as the scale divides by it.
    """

    folded: bool = False
    in_dtype: bool = False
    given: tuple[float, float] | None = None


@dataclass(frozen=True)
class Pair:
    """A product ``up @ down`` that is added to a weight, with DoRA's magnitudes where peft has trained some.

    Attributes:
        tensors: ``down`` [rank, K] and ``up`` [N, rank] (of a convolution [rank, K, ...] and [N, rank, 1, ...]);
            ``alpha`` [] and ``magnitude`` [N] where the file has them.
        alpha: what the scale is.
        sparse: whether a file that was made of the parts' own LoRAs is taken apart: ``up`` of a part then has its own
            columns alone, and ``down`` its own rows.
        padded: whether the weight may have more columns than ``down``.
    """

    tensors: Tensors
    alpha: Alpha
    sparse: bool = False
    padded: bool = False
    by_rows: bool = True

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.tensors.shape("down")[0]

    def factors(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (down, up) of some rows in the file's dtype, scaled where the scale goes into them."""
        down, up = self.tensors.read("down"), self.tensors.read("up")
        if self.alpha.folded and "alpha" in self.tensors:
            alpha = self.tensors.read("alpha").reshape(())
            scale = float(alpha / self.rank) if self.alpha.in_dtype else float(alpha) / self.rank
            for_down, for_up = _shared_out(scale)
            down, up = down * for_down, up * for_up
        if self.sparse and _is_block_diagonal(up, rows):
            rank = self.rank // len(rows.sizes)
            own = slice(rows.index * rank, (rows.index + 1) * rank)
            return down[own], rows.of(up)[:, own].contiguous()
        return down, rows.of(up)

    def scaling(self, strength: float) -> float | torch.Tensor:
        """Return what the product is multiplied by, as peft computes it: with alpha in the file's dtype."""
        if self.alpha.given is not None:
            alpha, rank = self.alpha.given
            return strength * alpha / rank
        if "alpha" in self.tensors and not self.alpha.folded:
            return strength * self.tensors.read("alpha").reshape(()) / self.rank
        return strength * self.rank / self.rank

    def product(self, weight: torch.Tensor, strength: float, rows: Rows) -> torch.Tensor:
        """Return what is added to a weight, in its dtype."""
        down, up = (factor.to(weight.dtype) for factor in self.factors(rows))
        if weight.dtype != torch.float32:
            down, up = down.float(), up.float()
        if self.padded:
            down = functional.pad(down, (0, weight.shape[1] - down.shape[1]))
        return (_product(down, up, weight.shape) * self.scaling(strength)).to(weight.dtype)

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is the product alone, and of a linear."""
        return "magnitude" not in self.tensors and len(self.tensors.shape("down")) == len(self.tensors.shape("up")) == 2

    def low_rank(self, strength: float, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (down [rank, K], up [rows, rank]), FP32, the scale in up."""
        down, up = self.factors(rows)
        return down.float(), up.float() * self.scaling(strength)

    def changed(self, weight: torch.Tensor, strength: float, rows: Rows, unchanged: torch.Tensor) -> torch.Tensor:
        """Return the changed rows; DoRA's norms are those of the weight before any LoRA."""
        added = self.product(weight, strength, rows)
        if "magnitude" not in self.tensors:
            return weight + added
        norm = torch.linalg.norm(unchanged + added, dim=1)
        magnitude = rows.of(self.tensors.read("magnitude").to(weight.dtype))
        return (magnitude / norm).view(-1, 1) * (weight + added)


def _product(down: torch.Tensor, up: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the product of factors; of a convolution as peft composes the two."""
    if down.dim() == 2 or math.prod(shape[2:]) == 1:
        return (up.flatten(1) @ down.flatten(1)).reshape(shape)
    convolution = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[down.dim()]
    return convolution(down.transpose(0, 1), up).transpose(0, 1)


def _shared_out(scale: float) -> tuple[float, float]:
    """Return the scales of down and up that make one scale, that of up a power of two, as diffusers shares it out."""
    down, up = scale, 1.0
    while 0 < down * 2 < up:
        down, up = down * 2, up / 2
    return down, up


def _is_block_diagonal(up: torch.Tensor, rows: Rows) -> bool:
    """Return whether each part's rows of ``up`` are zero but for as many columns of their own."""
    count = len(rows.sizes)
    if up.shape[1] % count:
        return False
    rank = up.shape[1] // count
    parts = up.split(list(rows.sizes))
    return not any(
        part[:, other * rank : (other + 1) * rank].any()
        for index, part in enumerate(parts)
        for other in range(count)
        if other != index
    )
