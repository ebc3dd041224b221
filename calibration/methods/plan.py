"""What is to be quantized: a plain checkpoint held against a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from calibration.checkpoints.plain import open_plain, wide_tensors
from calibration.methods import registry
from calibration.recipes.linear_rules import require_whole_blocks
from calibration.recipes.recipe import Method, Quality, Recipe, attentions_in_fp8, linear_formats, with_ranks_placed
from calibration.recipes.servers import fitted
from fp4trt.families import Family
from fp4trt.number_formats import BF16, FORMATS, NVFP4
from fp4trt.safetensors_file import StoredTensor

__all__ = ["Plain", "checked", "require_whole_blocks"]


@dataclass(frozen=True)
class Plain:
    """What is to be quantized, and how.

    Attributes:
        folder: the plain checkpoint.
        config: its config.
        family: its family.
        model: empty.
        stored: its tensors, in the order of the model's own.
        recipe: how to quantize it.
        formats: module path of every linear that the family can quantize to its format; and of some others, where a
            model that is quantized already has them so.
        own_groups: the quantized linears by what they share, where that is not the family's to say.
        own_attentions: the attentions in FP8, where that is not the recipe's to say.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    model: nn.Module
    stored: Mapping[str, StoredTensor]
    recipe: Recipe
    formats: Mapping[str, str]
    own_groups: tuple[tuple[str, ...], ...] | None = None
    own_attentions: tuple[str, ...] | None = None

    @property
    def method(self) -> Method:
        """The recipe's method, whose rules for ranks hold for this model.

        Raises:
            BadRecipe: they do not.
        """
        method = self.recipe.method
        return with_ranks_placed(method, self.family, self.config) if isinstance(method, Quality) else method

    @cached_property
    def wide(self) -> frozenset[str]:
        """Names of the tensors that stay in FP32, and hold more than BF16 does."""
        return wide_tensors(self.model, self.stored)

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears in NVFP4."""
        return self.of_format(NVFP4.name)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Those of them that share their scales."""
        return tuple(group for group in self.quantized_groups if self.formats[group[0]] == NVFP4.name)

    @property
    def quantized_linears(self) -> dict[str, str]:
        """Module path of every quantized linear to its format."""
        return {path: kind for path, kind in self.formats.items() if kind != BF16}

    @property
    def quantized_groups(self) -> tuple[tuple[str, ...], ...]:
        """All quantized linears by the input that they read."""
        if self.own_groups is not None:
            return self.own_groups
        return tuple(group for group in self.family.groups(self.config) if self.formats[group[0]] != BF16)

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is quantized under a scale of an activation, which calibration gives."""
        kinds = set(self.quantized_linears.values())
        return bool(self.fp8_attentions) or any(FORMATS[kind].needs_input_amax for kind in kinds)

    def of_format(self, kind: str) -> tuple[str, ...]:
        """Return the linears in a format."""
        return tuple(path for path, found in self.formats.items() if found == kind)

    @property
    def fp8_attentions(self) -> tuple[str, ...]:
        """The attentions in FP8."""
        if self.own_attentions is not None:
            return self.own_attentions
        return attentions_in_fp8(self.recipe, self.family, self.config)


def checked(folder: Path, recipe: Recipe, server: str | None = None) -> Plain:
    """Check a plain checkpoint against its config, and a recipe against both.

    Args:
        folder: the checkpoint.
        recipe: for it.
        server: that is to load the result, to which the recipe is fitted (:func:`calibration.recipes.servers.fitted`).

    Raises:
        BadCheckpoint, BadRecipe, UnknownFamily, UnsupportedLinear: naming what is wrong.
    """
    source = open_plain(folder)
    config, family, stored = source.config, source.family, source.stored
    shapes = {path: stored[f"{path}.weight"].shape for path in family.quantized(config)}
    if server is not None:
        recipe = fitted(recipe, server, family, config, shapes)
    formats = linear_formats(recipe.formats, family, config, shapes)
    for path, kind in formats.items():
        if kind != BF16:
            require_whole_blocks(path, shapes[path][1], kind)
    ordered = {name: stored[name] for name in source.model.state_dict()}
    plain = Plain(folder, config, family, source.model, ordered, recipe, formats)
    attentions_in_fp8(recipe, family, config)
    registry.require_fit(plain.method, plain.groups, shapes)
    return plain
