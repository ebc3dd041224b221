"""Linears that read one input, as the one linear that TensorRT runs them as, so that they are calibrated together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Fused", "fuse"]


@dataclass(frozen=True)
class Fused:
    """Where the linear of a group is, and how many of its rows belong to each member, in their order."""

    path: str
    rows: tuple[int, ...]


def fuse(module: nn.Module, group: Sequence[str]) -> Fused:
    """Replace the linears of a group by parts of one, in place.

    Its rows are the members' one after another, so that smoothing, amax and low-rank factors found for it hold for each
    member, and its rows of a result are the member's.

    Args:
        module: holds the linears, which have as many columns each, and all a bias or none.
        group: their paths; a group of one is left as it is.
    """
    members = [module.get_submodule(path) for path in group]
    linears = [member for member in members if isinstance(member, nn.Linear)]
    assert len(linears) == len(group), f"{group} are not all linears"
    rows = tuple(linear.out_features for linear in linears)
    if len(group) == 1:
        return Fused(group[0], rows)
    whole = _Whole(linears, rows)
    for index, path in enumerate(group):
        module.set_submodule(path, _Part(whole, index))
    return Fused(f"{group[0]}.whole.linear", rows)


class _Whole(nn.Module):
    """The linear of a group; answers the members that ask with the same input from one product."""

    def __init__(self, members: Sequence[nn.Linear], rows: Sequence[int]) -> None:
        super().__init__()
        self._rows = list(rows)
        weight = torch.cat([member.weight.data for member in members])
        with torch.device("meta"):
            self.linear = nn.Linear(weight.shape[1], weight.shape[0], members[0].bias is not None)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        if members[0].bias is not None:
            bias = torch.cat([member.bias.data for member in members])
            self.linear.bias = nn.Parameter(bias, requires_grad=False)
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    def part(self, input: torch.Tensor, index: int) -> torch.Tensor:
        if self._last is None or self._last[0] is not input:
            self._last = input, self.linear(input).split(self._rows, dim=-1)
        return self._last[1][index]


class _Part(nn.Module):
    """A member of a group; the first holds the whole as a module of its own, so that it is found once."""

    def __init__(self, whole: _Whole, index: int) -> None:
        super().__init__()
        self._parts = [whole]
        self._index = index
        if index == 0:
            self.whole = whole

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._parts[0].part(input, self._index)
