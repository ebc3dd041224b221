"""The changes that LyCORIS defines, merged as LyCORIS merges them: bit for bit on a CPU.

LyCORIS' ``merge_to`` moves a module's tensors to the weight's dtype and rounds each step to it. That is done here, but
for one thing: LyCORIS 4.1 multiplies a LoHa and a LoKr by alpha / rank twice when it merges, and once when it trains
and when it runs the model. Here it is once, as in ``get_weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from calibration.lora.adapter import Rows, Tensors

__all__ = ["KINDS", "Kind", "Lycoris"]

_Tensor = torch.Tensor


@dataclass(frozen=True)
class _Module:
    """A module's tensors in the dtype that is computed in; ``given`` is alpha and rank where the file has no alpha."""

    tensors: Tensors
    dtype: torch.dtype
    given: tuple[float, float] | None = None

    def __call__(self, role: str) -> _Tensor:
        return self.tensors.read(role).to(self.dtype)

    def maybe(self, role: str) -> _Tensor | None:
        return self(role) if role in self.tensors else None

    def scale(self, rank: int) -> float:
        """Return alpha / rank, 1 where alpha is absent or zero."""
        if "alpha" in self.tensors:
            return self.tensors.number("alpha") / rank or 1.0
        return self.given[0] / self.given[1] if self.given else 1.0


def _locon(module: _Module, shape: torch.Size) -> _Tensor:
    down, up, mid = module("down"), module("up"), module.maybe("mid")
    if mid is None:
        product = up.reshape(-1, up.shape[1]) @ down.reshape(down.shape[0], -1)
    else:
        product = _tucker(mid, up.flatten(1).transpose(0, 1), down.flatten(1))
    return product.reshape(shape) * module.scale(down.shape[0])


def _loha(module: _Module, shape: torch.Size) -> _Tensor:
    halves = []
    for half in ("1", "2"):
        a, b = module(f"hada_w{half}_a"), module(f"hada_w{half}_b")
        core = module.maybe(f"hada_t{half}")
        halves.append(a @ b if core is None else torch.einsum("i j ..., j r, i p -> p r ...", core, b, a))
    scale = torch.tensor(module.scale(module.tensors.shape("hada_w1_b")[0]), dtype=module.dtype)
    return (halves[0] * halves[1] * scale).reshape(shape)


def _lokr(module: _Module, shape: torch.Size) -> _Tensor:
    left, right = (_kronecker_factor(module, half) for half in ("1", "2"))
    while left.dim() < right.dim():
        left = left.unsqueeze(-1)
    product = torch.kron(left, right.contiguous())
    scale = _lokr_scale(module)
    return (product if scale == 1 else product * scale).reshape(shape)


def _kronecker_factor(module: _Module, half: str) -> _Tensor:
    whole = module.maybe(f"lokr_w{half}")
    if whole is not None:
        return whole
    a, b, core = module(f"lokr_w{half}_a"), module(f"lokr_w{half}_b"), module.maybe(f"lokr_t{half}")
    if core is not None:
        return _tucker(core, a, b)
    return (a @ b.reshape(b.shape[0], -1)).reshape(-1, *b.shape[1:])


def _lokr_scale(module: _Module) -> float:
    """Return alpha / rank, which counts where one of the two factors is a product itself."""
    for factor in ("lokr_w1_a", "lokr_w2_a"):
        if factor in module.tensors:
            return module.scale(module.tensors.shape(factor)[1])
    return 1.0


def _baked_lokr(module: _Module, shape: torch.Size) -> _Tensor:
    """Return a LoKr's product as diffusers makes it, which scales the left factor in the file's dtype."""
    scale = _lokr_scale(module)
    left = "lokr_w1" if "lokr_w1" in module.tensors else "lokr_w1_a"
    scaled = _Scaled(module.tensors, module.dtype, module.given, left, scale)
    return torch.kron(_kronecker_factor(scaled, "1"), _kronecker_factor(module, "2")).reshape(shape)


@dataclass(frozen=True)
class _Scaled(_Module):
    """A module one of whose tensors is scaled before it is rounded."""

    role: str = ""
    factor: float = 1.0

    def __call__(self, role: str) -> _Tensor:
        value = self.tensors.read(role)
        return (value * self.factor if role == self.role else value).to(self.dtype)


def _tucker(core: _Tensor, a: _Tensor, b: _Tensor) -> _Tensor:
    return torch.einsum("i j ..., i p, j r -> p r ...", core, a, b)


def _glora(module: _Module, weight: _Tensor, strength: float) -> _Tensor:
    a1, a2, b1, b2, core = module("a1"), module("a2"), module("b1"), module("b2"), module.maybe("bm")
    if core is None:
        added = (b1.flatten(1) @ b2.flatten(1)).reshape(weight.shape)
    else:
        added = torch.einsum("m n ..., i m, n j -> i j ...", core, b1.flatten(1), b2.flatten(1))
    a1, a2 = a1.flatten(1), a2.flatten(1)
    if weight.dim() > 2:
        turned = torch.einsum("o i ..., i j -> o j ...", torch.einsum("o i ..., i j -> o j ...", weight, a1), a2)
    else:
        turned = (weight @ a1) @ a2
    return weight + (added + turned) * module.scale(a2.shape[0]) * strength


def _ia3(module: _Module, weight: _Tensor, strength: float) -> _Tensor:
    scale = module("value") * strength + 1
    if module.tensors.number("on_input"):
        return weight * scale
    return (weight.transpose(0, 1) * scale).transpose(0, 1)


def _oft(module: _Module, weight: _Tensor, strength: float) -> _Tensor:
    blocks, rescale = module("oft_blocks"), module.maybe("rescale")
    eye = torch.eye(blocks.shape[-1])
    turn = _rotation(module, blocks, eye, weight.shape[0])
    rows = weight.to(turn.dtype).view(blocks.shape[0], blocks.shape[1], *weight.shape[1:])
    if strength != 1:
        turned = torch.einsum("k n m, k n ... -> k m ...", turn * strength - strength * eye + eye, rows)
        turned = turned.reshape(weight.shape)
        return (turned if rescale is None else rescale * turned).to(weight.dtype)
    added = torch.einsum("k n m, k n ... -> k m ...", turn - eye, rows).reshape(weight.shape)
    if rescale is not None:
        added = rescale * added
        added = added + (rescale - 1) * rows.reshape(weight.shape)
    return (added + weight.to(added.dtype)).to(weight.dtype)


def _boft(module: _Module, weight: _Tensor, strength: float) -> _Tensor:
    blocks, rescale = module("oft_blocks"), module.maybe("rescale")
    size = blocks.shape[-1]
    eye = torch.eye(size)
    turns = _rotation(module, blocks, eye, weight.shape[0])
    turned = before = weight.to(turns.dtype)
    for stage, turn in enumerate(turns):
        part = turn if strength == 1 else turn * strength + (1 - strength) * eye
        stride = 2**stage * (size // 2)
        turned = turned.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        turned = torch.einsum("b i j, b j ... -> b i ...", part, turned)
        turned = turned.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    if rescale is not None:
        turned = turned * rescale
    return (turned - before + before).to(weight.dtype)


def _rotation(module: _Module, blocks: _Tensor, eye: _Tensor, rows: int) -> _Tensor:
    """Return Cayley's orthogonal matrices of blocks, FP32; alpha, times the weight's rows, bounds the blocks' norm."""
    skew = blocks - blocks.transpose(-1, -2)
    bound = (module.tensors.number("alpha") if "alpha" in module.tensors else 0.0) * rows
    if bound > 0:
        norm = torch.norm(skew) + 1e-8
        if norm > bound:
            skew = skew * bound / norm
    return (eye + skew) @ (eye - skew).float().inverse()


@dataclass(frozen=True)
class Kind:
    """A kind of change.

    Attributes:
        name: for messages.
        needed: sets of roles of which a module has one.
        optional: roles that it may have besides.
        product: (module, shape) to what is added to a weight of this shape.
        merged: (module, weight, strength) to the changed weight, where that is no sum.
    """

    name: str
    needed: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ("alpha", "dora_scale")
    product: Callable[[_Module, torch.Size], _Tensor] | None = None
    merged: Callable[[_Module, _Tensor, float], _Tensor] | None = None


_LOKR_NEEDED: Final = tuple(
    (*left, *right)
    for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
)
_LOHA_NEEDED: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

KINDS: Final[Mapping[str, Kind]] = {
    "locon": Kind("LoCon", (("down", "up"),), ("mid", "alpha", "dora_scale"), product=_locon),
    "loha": Kind("LoHa", ((*_LOHA_NEEDED, "hada_t1", "hada_t2"), _LOHA_NEEDED), product=_loha),
    "lokr": Kind("LoKr", _LOKR_NEEDED, ("lokr_t2", "alpha", "dora_scale"), product=_lokr),
    "baked_lokr": Kind("LoKr", _LOKR_NEEDED, ("lokr_t2", "alpha"), product=_baked_lokr),
    "glora": Kind("GLoRA", (("a1", "a2", "b1", "b2"),), ("bm", "alpha"), merged=_glora),
    "ia3": Kind("IA3", (("value", "on_input"),), (), merged=_ia3),
    "oft": Kind("OFT", (("oft_blocks",),), ("rescale", "alpha"), merged=_oft),
    "boft": Kind("BOFT", (("oft_blocks",),), ("rescale", "alpha"), merged=_boft),
}


@dataclass(frozen=True)
class Lycoris:
    """A change of one of LyCORIS' kinds.

    Attributes:
        kind: a key of :data:`KINDS`.
        tensors: of the module.
        shape: of the module's weight.
        given: (alpha, rank) of a config of peft, where the file has no alpha.
    """

    kind: str
    tensors: Tensors
    shape: tuple[int, ...]
    given: tuple[float, float] | None = None

    @property
    def by_rows(self) -> bool:
        """Whether a row depends on no other: not where rows are turned, or where columns have a magnitude."""
        return KINDS[self.kind].product is not None and not self._by_columns

    @property
    def _by_columns(self) -> bool:
        """Whether DoRA's magnitudes are those of columns."""
        return "dora_scale" in self.tensors and self.tensors.shape("dora_scale")[0] != self.shape[0]

    @property
    def is_low_rank(self) -> bool:
        """Whether the change is the product of two factors alone, and of a linear."""
        others = {"dora_scale", "mid"} & self.tensors.stored.keys()
        return self.kind == "locon" and not others and len(self.tensors.shape("down")) == 2

    def low_rank(self, strength: float, rows: Rows) -> tuple[_Tensor, _Tensor]:
        """Return (down [rank, K], up [rows, rank]), FP32, the scale in up."""
        module = _Module(self.tensors, torch.float32, self.given)
        down = module("down")
        return down, rows.of(module("up")) * (module.scale(down.shape[0]) * strength)

    def changed(self, weight: _Tensor, strength: float, rows: Rows, unchanged: _Tensor) -> _Tensor:
        """Return the changed weight, each step rounded to its dtype."""
        kind, module = KINDS[self.kind], _Module(self.tensors, weight.dtype, self.given)
        if kind.merged is not None:
            return kind.merged(module, weight, strength)
        assert kind.product is not None
        added = kind.product(module, torch.Size(self.shape))
        added = rows.of(added) if self.by_rows else added
        if "dora_scale" not in self.tensors:
            return weight + added * strength
        magnitude = module("dora_scale")
        by_columns = self._by_columns
        return _decomposed(weight + added, magnitude if by_columns else rows.of(magnitude), strength, by_columns)


def _decomposed(weight: _Tensor, magnitude: _Tensor, strength: float, by_columns: bool) -> _Tensor:
    """Return a weight whose rows, or columns, have been given magnitudes."""
    ones = [1] * (weight.dim() - 1)
    if by_columns:
        norm = weight.transpose(0, 1).flatten(1).norm(dim=1, keepdim=True).reshape(weight.shape[1], *ones)
        norm = norm.transpose(0, 1)
    else:
        norm = weight.flatten(1).norm(dim=1).reshape(weight.shape[0], *ones)
    scale = magnitude / (norm + torch.finfo(weight.dtype).eps)
    if strength != 1:
        scale = strength * (scale - 1) + 1
    return weight * scale
