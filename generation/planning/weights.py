"""Bytes of a transformer's weights: in 16 bit, as a recipe would store them, or as a checkpoint does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from calibration.recipes.branches import added_tensors, require_fit
from calibration.recipes.linear_rules import require_whole_blocks
from calibration.recipes.recipe import (
    Quality,
    Recipe,
    attentions_in_fp8,
    deciding_method,
    linear_formats,
    with_ranks_placed,
)
from fp4trt.account import ATTENTION_SCALES, BRANCH, SCALE_LEAVES, SMOOTHING, Account
from fp4trt.families import Family
from fp4trt.families.family import Config
from fp4trt.number_formats import BF16, FORMATS, FP8, NVFP4
from fp4trt.safetensors_file import TensorPlan

__all__ = ["Weights", "plain_weights", "planned_weights", "stored_weights"]

_SIXTEEN_BIT: Final = 2
"""Bytes of what is not quantized: a graph holds it in BF16, whatever the file does."""

_SHARED: Final = (BRANCH[0], SMOOTHING)
"""Leaves of what linears of one input have each in a checkpoint, and together in a graph."""


class Tensor(Protocol):
    """A tensor of a checkpoint, there already or not."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes, as it is stored."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


@dataclass(frozen=True)
class Weights:
    """The weights of a transformer in one form.

    Attributes:
        name: of the form: a recipe's, ``fp16``, ``bf16``, or ``stored``.
        formats: module path of each quantized linear to its format.
        ranks: module path of each linear with a low-rank branch to its rank.
        fp8_attention: whether attentions are in FP8.
        checkpoint_bytes: of all tensors in a checkpoint.
        engine_bytes: of those that a graph has, as an engine stores them.
        largest_linear: elements of the largest linear.
    """

    name: str
    formats: Mapping[str, str]
    ranks: Mapping[str, int]
    fp8_attention: bool
    checkpoint_bytes: int
    engine_bytes: int
    largest_linear: int

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest linear, as wide as the widest format in use."""
        bits = max((FORMATS[kind].bits for kind in self.kinds), default=16)
        return int(self.largest_linear * bits / 8)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The quantized formats in it."""
        used = {*self.formats.values(), *((FP8.name,) if self.fp8_attention else ())}
        return tuple(name for name in FORMATS if name in used)


def plain_weights(name: str, family: Family, config: Config) -> Weights:
    """Return a transformer in 16 bit."""
    tensors = {name: TensorPlan(name, "BF16", shape) for name, shape in family.state(config).items()}
    return _weights(name, family, config, {}, {}, False, tensors)


def planned_weights(recipe: Recipe, family: Family, config: Config) -> Weights:
    """Return what quantization by a recipe would make of a transformer: the same tensors, but for their values.

    Raises:
        BadRecipe, UnsupportedLinear: the recipe is not for this model.
    """
    shapes = family.linears(config)
    method = deciding_method(recipe)
    if isinstance(method, Quality):
        method = with_ranks_placed(method, family, config)
    formats = linear_formats(recipe.formats, family, config, shapes)
    formats = {path: kind for path, kind in formats.items() if kind != BF16}
    for path, kind in formats.items():
        require_whole_blocks(path, shapes[path][1], kind)
    groups = [group for group in family.groups(config) if formats.get(group[0]) == NVFP4.name]
    require_fit(method, groups, shapes)
    added = {tensor.name: tensor for tensor in added_tensors(method, family, groups, shapes)}
    attentions = attentions_in_fp8(recipe, family, config)
    scales = (TensorPlan(f"{path}.{leaf}", "F32", ()) for path in attentions for leaf in ATTENTION_SCALES)
    tensors = {tensor.name: tensor for tensor in (*_planned(family, config, formats), *added.values(), *scales)}
    ranks = {path: added[name].shape[0] for path in formats if (name := f"{path}.{BRANCH[0]}") in added}
    return _weights(recipe.name, family, config, formats, ranks, bool(attentions), tensors)


def stored_weights(name: str, account: Account, tensors: Mapping[str, Tensor]) -> Weights:
    """Return what a quantized checkpoint holds, by its headers."""
    formats = {path: form.format for path, form in account.linears.items() if form.format in FORMATS}
    ranks = {path: form.rank for path, form in account.linears.items() if form.rank}
    return _weights(name, account.family, account.config, formats, ranks, bool(account.attentions), tensors)


def _planned(family: Family, config: Config, formats: Mapping[str, str]) -> Iterator[TensorPlan]:
    """Yield the tensors of a checkpoint whose linears are in some formats."""
    for name, shape in family.state(config).items():
        path = name.removesuffix(".weight")
        kind = FORMATS.get(formats.get(path, "")) if name.endswith(".weight") else None
        if kind is None:
            yield TensorPlan(name, "BF16", shape)
            continue
        rows, columns = shape
        yield TensorPlan(name, kind.codes, kind.codes_shape(rows, columns))
        for scale in kind.scales:
            yield TensorPlan(f"{path}.{scale.leaf}", scale.dtype, scale.shape(rows, columns))


def _weights(
    name: str,
    family: Family,
    config: Config,
    formats: Mapping[str, str],
    ranks: Mapping[str, int],
    fp8_attention: bool,
    tensors: Mapping[str, Tensor],
) -> Weights:
    kept = _in_a_graph(tensors, family, config)
    return Weights(
        name=name,
        formats=formats,
        ranks=ranks,
        fp8_attention=fp8_attention,
        checkpoint_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        engine_bytes=sum(_in_an_engine(name, tensor, formats) for name, tensor in kept),
        largest_linear=max((rows * columns for rows, columns in family.linears(config).values()), default=0),
    )


def _in_a_graph(tensors: Mapping[str, Tensor], family: Family, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint that its graph has."""
    leaders = {path: group[0] for group in family.groups(config) for path in group}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        doubled = leaf in _SHARED and leaders.get(path, path) != path
        if not doubled and not family.is_unused(config, name):
            yield name, tensor


def _in_an_engine(name: str, tensor: Tensor, formats: Mapping[str, str]) -> int:
    path, _, leaf = name.rpartition(".")
    as_stored = leaf in SCALE_LEAVES or (leaf == "weight" and path in formats)
    return tensor.nbytes if as_stored else _SIXTEEN_BIT * math.prod(tensor.shape)
