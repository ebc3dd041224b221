"""What each group of linears costs in each format: error of the model's output, FLOPs and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from fp4trt.errors import BadInputs
from fp4trt.families import Family
from fp4trt.families.family import Config
from fp4trt.number_formats import BF16, FORMATS, FP8, NVFP4

__all__ = ["BITS", "Group", "Sensitivity", "groups_of"]

_TIME: Final = {**{name: kind.relative_time for name, kind in FORMATS.items() if kind.relative_time}, BF16: 4.0}
"""Format to the time of a FLOP, relative to NVFP4: each has half the peak throughput of the one before it (Blackwell,
dense)."""

BITS: Final = {name: FORMATS[name].bits if name in FORMATS else 16.0 for name in _TIME}
"""Format to the bits of a weight, with its share of the block scales; the formats from the cheapest to the dearest."""


@dataclass(frozen=True)
class Group:
    """Linears that read the same input and have one format, because TensorRT runs them as one GEMM.

    Attributes:
        linears: their module paths.
        parameters: of their weights.
        flops: for one picture of the family's default size.
        errors: format to the squared error of the model's output, relative to its own square, when these linears alone
            are quantized, beyond the sensitivity's base.
    """

    linears: tuple[str, ...]
    parameters: int
    flops: int
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """All groups of a model.

    Attributes:
        groups: in graph order.
        base: squared relative error of the output with no linear quantized: that of folds, which are rounded to 16 bit;
            without any, the least that exchanging a group's linears gives, which is that of rounding otherwise.
    """

    groups: tuple[Group, ...]
    base: float = 0.0

    def predicted(self, formats: Mapping[str, str]) -> float:
        """Return the relative error of the output that a choice should have, as the errors of groups add up.

        Args:
            formats: first linear of each group to its format.
        """
        return float((self.base + sum(group.errors[formats[group.linears[0]]] for group in self.groups)) ** 0.5)

    def spent(self, formats: Mapping[str, str], of: str) -> float:
        """Return what a choice costs beyond NVFP4, where everything in FP8 costs 1.

        Args:
            formats: first linear of each group to its format.
            of: ``flops`` or ``bytes``.
        """
        return sum(self.price(group, formats[group.linears[0]], of) for group in self.groups)

    def price(self, group: Group, format: str, of: str) -> float:
        """Return what a group in a format costs beyond NVFP4, in that unit."""
        per, sizes = (_TIME, "flops") if of == "flops" else (BITS, "parameters")
        whole = sum(getattr(each, sizes) for each in self.groups)
        extra = (per[format] - per[NVFP4.name]) / (per[FP8.name] - per[NVFP4.name])
        return float(getattr(group, sizes) / whole * extra)

    def weight_bytes(self, formats: Mapping[str, str]) -> int:
        """Return the bytes of all groups' weights under a choice."""
        return round(sum(group.parameters * BITS[formats[group.linears[0]]] / 8 for group in self.groups))

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Sensitivity:
        """Return what :meth:`as_dict` gave.

        Raises:
            BadInputs: it is something else.
        """
        try:
            groups = tuple(Group(**{**each, "linears": tuple(each["linears"])}) for each in value["groups"])
            base = value["base"]
            known = all(group.errors.keys() == BITS.keys() for group in groups)
            errors = [base, *(error for group in groups for error in group.errors.values())]
            if groups and known and all(math.isfinite(error) and error >= 0 for error in errors):
                return cls(groups, base)
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise BadInputs("the sensitivity holds no groups with errors in nvfp4, fp8 and bf16; search again")


def groups_of(
    family: Family, config: Config, shapes: Mapping[str, Sequence[int]], errors: Mapping[str, Mapping[str, float]]
) -> tuple[Group, ...]:
    """Return a model's groups with their sizes.

    Args:
        family: of the model.
        config: its config.
        shapes: of the linears' weights, [N, K].
        errors: first linear of each group to the errors by format.
    """
    found = []
    for group in family.groups(config):
        parameters = sum(shapes[path][0] * shapes[path][1] for path in group)
        found.append(Group(group, parameters, 2 * parameters * family.rows(group[0]), errors[group[0]]))
    return tuple(found)
