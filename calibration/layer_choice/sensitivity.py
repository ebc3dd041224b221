"""What each group of linears costs in each choice: error of the model's output, FLOPs and bytes.

A choice is a format, or NVFP4 with a low-rank branch (:func:`ranked`), by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from fp4trt.errors import BadInputs
from fp4trt.families import Family
from fp4trt.families.family import Config
from fp4trt.number_formats import BF16, FORMATS, FP8, NVFP4

__all__ = ["BITS", "LAUNCH", "Branch", "Group", "Sensitivity", "groups_of", "parts", "ranked"]

_TIME: Final = {**{name: kind.relative_time for name, kind in FORMATS.items() if kind.relative_time}, BF16: 4.0}
"""Format to the time of a FLOP, relative to NVFP4: each has half the peak throughput of the one before it (Blackwell,
dense)."""

BITS: Final = {name: FORMATS[name].bits if name in FORMATS else 16.0 for name in _TIME}
"""Format to the bits of a weight, with its share of the block scales; the formats from the cheapest to the dearest."""

LAUNCH: Final = 2e9
"""What a kernel more costs beside its work, in FLOPs of NVFP4: 1.2 microseconds, by estimate what one takes in a CUDA
graph, at the 1.68 PFLOP/s of an RTX 5090 (its peak in FP4, dense)."""

_KERNELS: Final = 2
"""That a branch adds to a group; the second of them adds to the FP4 product too (``docs/svdquant.md``)."""


def ranked(rank: int) -> str:
    """Return the name of the choice NVFP4 with a branch, of this rank for each linear."""
    return f"{NVFP4.name}-r{rank}" if rank else NVFP4.name


def parts(choice: str) -> tuple[str, int]:
    """Return the format and the rank of a choice, 0 without a branch."""
    name, _, rank = choice.partition("-r")
    return name, int(rank or 0)


@dataclass(frozen=True)
class Branch:
    """A low-rank branch beside a group's FP4 GEMM.

    Attributes:
        rank: that the group shares, pooled and rounded up as the recipe has it.
        parameters: of its two factors; linears of a group share the first, which counts once.
        flops: of its two products, for one picture of the family's default size.
    """

    rank: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class Group:
    """Linears that read the same input and have one format, because TensorRT runs them as one GEMM.

    Attributes:
        linears: their module paths.
        parameters: of their weights.
        flops: for one picture of the family's default size.
        errors: choice to the squared error of the model's output, relative to its own square, when these linears alone
            are quantized, beyond the sensitivity's base.
        branches: choice to its branch, for those that have one.
    """

    linears: tuple[str, ...]
    parameters: int
    flops: int
    errors: Mapping[str, float]
    branches: Mapping[str, Branch] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """All groups of a model.

    Attributes:
        groups: in graph order.
        base: squared relative error of the output with no linear quantized: that of folds, which are rounded to 16 bit;
            without any, the least that exchanging a group's linears gives, which is that of rounding otherwise.
        launch_cost: of each kernel that a branch adds, in FLOPs of NVFP4.
    """

    groups: tuple[Group, ...]
    base: float = 0.0
    launch_cost: float = LAUNCH

    def predicted(self, formats: Mapping[str, str]) -> float:
        """Return the relative error of the output that should come of choices, as the errors of groups add up.

        Args:
            formats: first linear of each group to its choice.
        """
        return float((self.base + sum(group.errors[formats[group.linears[0]]] for group in self.groups)) ** 0.5)

    def spent(self, formats: Mapping[str, str], of: str) -> float:
        """Return what choices cost beyond NVFP4, where everything in FP8 costs 1.

        Args:
            formats: first linear of each group to its choice.
            of: ``flops`` or ``bytes``.
        """
        return sum(self.price(group, formats[group.linears[0]], of) for group in self.groups)

    def price(self, group: Group, format: str, of: str) -> float:
        """Return what a choice for a group costs beyond NVFP4, in that unit."""
        per, sizes = (_TIME, "flops") if of == "flops" else (BITS, "parameters")
        whole, unit = sum(getattr(each, sizes) for each in self.groups), per[FP8.name] - per[NVFP4.name]
        price = float(getattr(group, sizes) / whole * ((per[parts(format)[0]] - per[NVFP4.name]) / unit))
        if format not in group.branches:
            return price
        launches = _KERNELS * self.launch_cost if of == "flops" else 0.0
        return price + (per[BF16] * getattr(group.branches[format], sizes) + launches) / (unit * whole)

    def weight_bytes(self, formats: Mapping[str, str]) -> int:
        """Return the bytes of all groups' weights and branches under choices."""
        chosen = [(group, formats[group.linears[0]]) for group in self.groups]
        weights = sum(group.parameters * BITS[parts(choice)[0]] / 8 for group, choice in chosen)
        branches = [group.branches[choice] for group, choice in chosen if choice in group.branches]
        return round(weights + sum(branch.parameters * BITS[BF16] / 8 for branch in branches))

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON; of branches it tells where there are any."""
        found = asdict(self)
        if not any(group.branches for group in self.groups):
            del found["launch_cost"]
        for group in found["groups"]:
            if not group["branches"]:
                del group["branches"]
        return found

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Sensitivity:
        """Return what :meth:`as_dict` gave.

        Raises:
            BadInputs: it is something else.
        """
        try:
            groups = tuple(map(_group, value["groups"]))
            base, launch_cost = value["base"], value.get("launch_cost", LAUNCH)
            known = all(group.errors.keys() == BITS.keys() | group.branches.keys() for group in groups)
            errors = [base, launch_cost, *(error for group in groups for error in group.errors.values())]
            if groups and known and all(math.isfinite(error) and error >= 0 for error in errors):
                return cls(groups, base, launch_cost)
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise BadInputs("the sensitivity holds no groups with errors in nvfp4, fp8 and bf16; search again")


def _group(value: Mapping[str, Any]) -> Group:
    branches = {ranked(parts(choice)[1]): Branch(**each) for choice, each in value.get("branches", {}).items()}
    return Group(**{**value, "linears": tuple(value["linears"]), "branches": branches})


def groups_of(
    family: Family,
    config: Config,
    shapes: Mapping[str, Sequence[int]],
    errors: Mapping[str, Mapping[str, float]],
    pooled: Callable[[int, int], int] = int.__mul__,
) -> tuple[Group, ...]:
    """Return a model's groups with their sizes.

    Args:
        family: of the model.
        config: its config.
        shapes: of the linears' weights, [N, K].
        errors: first linear of each group to the errors by choice.
        pooled: number of a group's linears and rank of each to the rank of the branch that they share.
    """
    found = []
    for group in family.groups(config):
        rows, of_group = family.rows(group[0]), errors[group[0]]
        outputs, inputs = sum(shapes[path][0] for path in group), shapes[group[0]][1]
        branches = {}
        for choice, rank in ((choice, parts(choice)[1]) for choice in of_group):
            if rank:
                shared = pooled(len(group), rank)
                size = shared * (inputs + outputs)
                branches[choice] = Branch(shared, size, 2 * size * rows)
        parameters = inputs * outputs
        found.append(Group(group, parameters, 2 * parameters * rows, of_group, branches))
    return tuple(found)
