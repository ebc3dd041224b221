"""What a LoRA file holds for one module, and what is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fp4trt.errors import BadLora
from fp4trt.safetensors_file import StoredTensor

__all__ = ["Adapter", "Added", "Replaced", "Rows", "Tensors"]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file that belong to one module.

    Attributes:
        path: of the file.
        stored: what each is to the module, to its key in the file and where it lies.
    """

    path: Path
    stored: Mapping[str, tuple[str, StoredTensor]]

    def __contains__(self, role: str) -> bool:
        return role in self.stored

    def shape(self, role: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.stored[role][1].shape

    def read(self, role: str) -> torch.Tensor:
        """Read a tensor in the dtype that it is stored in; FP8, in which torch does not compute, as BF16.

        Raises:
            BadLora: it is no floating-point number, or holds NaN or infinity.
        """
        key, stored = self.stored[role]
        value = stored.tensor()
        if value.numel() == 1 and not value.is_floating_point():
            value = value.float()
        if not value.is_floating_point():
            raise BadLora(f"{self.path}: {key} is stored as {stored.dtype}; expected floating-point numbers")
        if not value.float().isfinite().all():
            raise BadLora(f"{self.path}: {key} holds NaN or infinity; take another copy of the file")
        return value if value.element_size() > 1 else value.to(torch.bfloat16)

    def number(self, role: str) -> float:
        """Read a tensor of one number."""
        return float(self.read(role).reshape(()))


@dataclass(frozen=True)
class Rows:
    """Rows of a module's weight that are one tensor of diffusers.

    Attributes:
        begin, end: of the rows.
        index: which of the module's parts they are, from 0.
        sizes: the number of rows of each part.
    """

    begin: int
    end: int
    index: int
    sizes: tuple[int, ...]

    @property
    def all(self) -> bool:
        """Whether these are all of the module's rows."""
        return len(self.sizes) == 1

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """Return these rows of a tensor that has all of them."""
        return value[self.begin : self.end]


class Adapter(Protocol):
    """What a file does to a module's weight, or to its bias."""

    @property
    def by_rows(self) -> bool:
        """Whether some rows can be changed without the others."""

    def changed(self, weight: torch.Tensor, strength: float, rows: Rows, unchanged: torch.Tensor) -> torch.Tensor:
        """Return the changed weight, in its dtype.

        Args:
            weight: these rows of it, or all of them unless :attr:`by_rows`.
            strength: how much of the change; 1 is the change as it was trained.
            rows: which these are; all of them unless :attr:`by_rows`.
            unchanged: the same rows before any LoRA.
        """


@dataclass(frozen=True)
class Added:
    """A tensor that is added: LyCORIS' full weights and norms, changes of a bias, ComfyUI's ``diff``.

    Attributes:
        tensors: of the module.
        role: of the tensor that is added, of the changed tensor's shape.
        scale: what it is multiplied by besides the strength.
    """

    tensors: Tensors
    role: str
    scale: float = 1.0
    by_rows: bool = True

    def changed(self, weight: torch.Tensor, strength: float, rows: Rows, unchanged: torch.Tensor) -> torch.Tensor:
        """Return the weight with the tensor added, product and sum rounded to the weight's dtype."""
        added = rows.of(self.tensors.read(self.role).to(weight.dtype))
        return weight + added.reshape(weight.shape) * (strength * self.scale)


@dataclass(frozen=True)
class Replaced:
    """A tensor that is put in place of the model's, whatever the strength."""

    tensors: Tensors
    role: str
    by_rows: bool = True

    def changed(self, weight: torch.Tensor, strength: float, rows: Rows, unchanged: torch.Tensor) -> torch.Tensor:
        """Return the tensor in place of the weight."""
        return rows.of(self.tensors.read(self.role).to(weight.dtype)).reshape(weight.shape)
