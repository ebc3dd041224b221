"""Which linears of a model a rule of a recipe is for: by patterns of module paths, and by the place of their block."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from fp4trt.errors import BadRecipe
from fp4trt.families import Family

__all__ = ["Blocks", "Patterns", "Selection", "Strict", "listed"]

Patterns = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""A shell pattern, such as ``*.norm*.linear``, held against the whole module path; or a list of them."""


class Strict(BaseModel):
    """Takes no key that it does not know, and never changes; a ``ValueError`` of its checks says what was expected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def listed(linears: Patterns) -> tuple[str, ...]:
    """Return patterns as a tuple."""
    return (linears,) if isinstance(linears, str) else linears


class Blocks(Strict):
    """The first and the last blocks of a model, whatever its depth.

    Attributes:
        first: how many from the start.
        last: how many from the end.
        stack: module path of the list that they are counted in; None for the blocks of all of them, in the order in
            which the model runs them.
    """

    first: StrictInt = Field(default=0, ge=0)
    last: StrictInt = Field(default=0, ge=0)
    stack: str | None = None

    @model_validator(mode="after")
    def _names_some(self) -> Blocks:
        if not self.first + self.last:
            raise ValueError("first, last or both")
        return self

    def __str__(self) -> str:
        """Return how a message calls them, such as ``the first 3 blocks and the last block``."""
        counts = {"the first": self.first, "the last": self.last}
        ends = (f"{end} block" if count == 1 else f"{end} {count} blocks" for end, count in counts.items() if count)
        return " and ".join(ends) + ("" if self.stack is None else f" of {self.stack}")

    def paths(self, family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return their module paths in a model of a family.

        Raises:
            BadRecipe: the model has no such stack, or fewer blocks.
        """
        stacks = {stack.path: stack.blocks(config) for stack in family.stacks}
        if self.stack is not None and self.stack not in stacks:
            raise BadRecipe(f"{family.name} has no stack {self.stack!r}; expected one of: {', '.join(stacks)}")
        blocks = family.blocks(config) if self.stack is None else stacks[self.stack]
        if self.first + self.last > len(blocks):
            raise BadRecipe(
                f"a rule is for {self}, and this model ({family.name}) has {len(blocks)}; expected no more than that"
            )
        return tuple(path for i, path in enumerate(blocks) if i < self.first or i >= len(blocks) - self.last)


class Selection(Strict):
    """Some linears of a model: those that a pattern matches and, if blocks are named, that lie in one of these.

    Attributes:
        linears: a shell pattern, such as ``*.norm*.linear``, held against the whole path; or a list of them. All
            where blocks are named alone.
        blocks: the first and the last ones; None for linears anywhere.
    """

    linears: Patterns = "*"
    blocks: Blocks | None = None

    @model_validator(mode="after")
    def _names_some(self) -> Selection:
        if self.blocks is None and "linears" not in self.model_fields_set:
            raise ValueError("linears, blocks or both")
        return self

    def matching(self, family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield each pattern, as a message calls it, with the linears that it picks of those the family can quantize.

        Raises:
            BadRecipe: one picks none, or the model has no such blocks.
        """
        inside = self._inside(family, config)
        for pattern in listed(self.linears):
            said = repr(pattern) if self.blocks is None else f"{pattern!r} in {self.blocks}"
            matching = tuple(path for path in inside if fnmatch.fnmatchcase(path, pattern))
            if not matching:
                raise BadRecipe(
                    f"the rule for {said} matches no linear that {family.name} can quantize; "
                    f"expected a pattern such as {(*inside, '*')[0]!r}: fp4trt inspect lists them"
                )
            yield said, matching

    def _inside(self, family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the linears in the blocks that are named, or all."""
        paths = family.quantized(config)
        if self.blocks is None:
            return paths
        return tuple(p for p in paths if p.startswith(tuple(f"{path}." for path in self.blocks.paths(family, config))))
