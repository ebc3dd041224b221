"""What the rest of the project has to know of a model family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Config", "Family", "Modulated", "Symbol", "Transformer"]

Config = Mapping[str, Any]

Transformer = Callable[..., Any]
"""Called with the family's inputs by name and ``return_dict=False``; returns a tuple, the velocity first."""


@dataclass(frozen=True)
class Symbol:
    """One symbolic dimension of the graph, with the bounds that an optimization profile may take.

    A ``batch`` or ``text_tokens`` symbol is bounded directly; an ``image_tokens`` symbol through the resolution in
    pixels: a picture of H x W pixels has (H / pixels_per_token) * (W / pixels_per_token) tokens.
    """

    kind: str
    min: int | None = None
    max: int | None = None
    default: int | None = None
    pixels_per_token: int | None = None
    min_resolution: int | None = None
    max_resolution: int | None = None
    default_resolution: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens by default."""
        if self.default_resolution is None or self.pixels_per_token is None:
            return self.default or 1
        return (self.default_resolution // self.pixels_per_token) ** 2

    def as_dict(self) -> dict[str, int | str]:
        """Return the fields that this kind of symbol has, as they stand in the graph's metadata."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Modulated:
    """Linears whose input is ``norm(x) * (1 + scale) + shift``, where a linear computes scale and shift.

    Attributes:
        modulation: path of that linear in its block.
        chunks: into how many equal parts its output is split.
        shift, scale: which of them these are.
        consumers: paths in the block of the linears that read the result, and nothing else does.
    """

    modulation: str
    chunks: int
    shift: int
    scale: int
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A family of diffusion transformers, as data.

    Attributes:
        name: what the manifest and the graph call it.
        class_name: the diffusers class.
        matches: whether a diffusers config belongs here.
        problem: what is wrong with a config of this class, in one sentence, or None.
        groups: the quantized linears of a config, in graph order, as groups whose members read the same input. A group
            shares its global scales, because only then does TensorRT run it as one FP4 GEMM.
        example_inputs: (config, batch, image tokens, text tokens, seed, dtype) to the model's inputs in graph order.
        attentions: module paths of a config's attentions, in graph order.
        stacks: path of each list of equal blocks to the key of the config that holds their number, in the order in
            which they run.
        input_shapes: (config) to the symbolic shape of every input, in graph order.
        symbols: name of a symbolic dimension to its bounds.
        outputs: names of the outputs.
        stream: module path of a quantized linear to whose tokens it reads, as names of symbols joined by ``+``, such as
            ``L+T``; empty where it reads one vector.
        modulated: module path of a block to its linears behind an adaptive norm.
        state: name to shape of every tensor of a config's plain checkpoint, in the order of the model's own state.
    """

    name: str
    class_name: str
    matches: Callable[[Config], bool]
    problem: Callable[[Config], str | None]
    groups: Callable[[Config], tuple[tuple[str, ...], ...]]
    attentions: Callable[[Config], tuple[str, ...]]
    example_inputs: Callable[[Config, int, int, int, int, torch.dtype], dict[str, torch.Tensor]]
    stacks: Mapping[str, str]
    input_shapes: Callable[[Config], dict[str, tuple[str | int, ...]]]
    symbols: Mapping[str, Symbol]
    outputs: tuple[str, ...]
    stream: Callable[[str], str]
    modulated: Callable[[str], tuple[Modulated, ...]]
    state: Callable[[Config], dict[str, tuple[int, ...]]]

    def quantized(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of the quantized linears, in graph order."""
        return tuple(path for group in self.groups(config) for path in group)

    def linears(self, config: Config) -> dict[str, tuple[int, int]]:
        """Return module path to [N, K] of every linear, the quantized ones first and in graph order.

        In these models linears alone have matrices.
        """
        matrices = {name: shape for name, shape in self.state(config).items() if len(shape) == 2}
        first = [f"{path}.weight" for path in self.quantized(config)]
        ordered = (*first, *(name for name in matrices if name not in set(first)))
        return {name.removesuffix(".weight"): (matrices[name][0], matrices[name][1]) for name in ordered}

    def groups_of(self, config: Config, paths: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """Return some linears by shared input; one outside :attr:`groups` is alone."""
        found = set(paths)
        kept = [tuple(path for path in group if path in found) for group in self.groups(config)]
        known = {path for group in kept for path in group}
        return (*(group for group in kept if group), *((path,) for path in paths if path not in known))

    def rows(self, path: str) -> int:
        """Return how many rows a linear multiplies for one picture of the default size."""
        names = self.stream(path).split("+")
        return sum(self.symbols[name].tokens for name in names) if names != [""] else 1

    def blocks(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of the blocks of all stacks, in the order in which the model runs them."""
        return tuple(f"{path}.{index}" for path, key in self.stacks.items() for index in range(config[key]))
