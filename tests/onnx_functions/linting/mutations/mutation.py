"""A mutation of an exported graph, and the places in the built-in model that most of them change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from tests.onnx_functions.linting.damage import Damaged

OUT: Final = "transformer_blocks.0.attn.to_out.0"  # [128, 128], in no group
WIDE: Final = "transformer_blocks.0.ff.net.0.proj"  # [512, 128], in no group
DEEP: Final = "transformer_blocks.0.ff.net.2"  # [128, 512], in no group
MODULATION: Final = "transformer_blocks.0.norm1.linear"  # [768, 128], its input has two axes
Q: Final = "transformer_blocks.0.attn.to_q"  # leads a group of three
K: Final = "transformer_blocks.0.attn.to_k"
TRT: Final = "TRT_FP4DynamicQuantize"


@dataclass(frozen=True)
class Mutation:
    """One way to damage a graph: of the built-in model all in FP4, or with its modulation in FP8 (`base` is fp8)."""

    rule: str
    where: str
    tensorrt: str
    base: str
    apply: Callable[[Damaged], None]

    @property
    def name(self) -> str:
        """The function's name, read as words: what it does."""
        return self.apply.__name__.replace("_", " ")

    def __call__(self, graph: Damaged) -> None:
        """Damage a graph, as a part of another mutation."""
        self.apply(graph)


def mutation(
    rule: str, where: str, tensorrt: str, base: str = "fp4"
) -> Callable[[Callable[[Damaged], None]], Mutation]:
    """Return what makes a mutation of a function."""
    return lambda function: Mutation(rule, where, tensorrt, base, function)


def mutations_of(topic: ModuleType) -> list[Mutation]:
    """Return the mutations that a module defines, in its order; not those that it imports."""
    found = (value for value in vars(topic).values() if isinstance(value, Mutation))
    return [each for each in found if each.apply.__module__ == topic.__name__]
