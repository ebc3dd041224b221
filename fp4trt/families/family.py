"""A family of diffusion transformers as data; all that the rest of the project has to know is derived from it here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal

from fp4trt.families.dim import Dim, Kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = ["Config", "Dtype", "Family", "Group", "Input", "Modulated", "Role", "Sizes", "Stack", "Transformer"]

Config = Mapping[str, Any]

Sizes = Mapping[str, int]
"""Name of a symbolic dimension to its size."""

Transformer = Callable[..., Any]
"""Called with the family's inputs by name and ``return_dict=False``; returns a tuple, the velocity first."""

Role = Literal["normal", "time", "guidance", "positions", "mask", "padding", "choice", "token"]
"""What example values of an input are: normal numbers, timesteps, guidance in [1, 5), positions, which tokens are no
padding, which are (some at the end), 0 and 1, or token ids below the config's ``vocab_size``."""

Size = str | int | Callable[[Config], int]
"""Size of an axis: a symbolic dimension's name, a key of the config, a number, or a function of the config."""

Dtype = Literal["bf16", "fp32", "bool", "int32", "int64"]


@dataclass(frozen=True)
class Input:
    """An input of the model, and of the graph.

    Attributes:
        shape: sizes of its axes.
        role: what its values are.
        dtype: ``bf16`` stands for the dtype that is computed in.
        given_by: key of the config that says whether the model has it; None where all of the family have.
        noise_at: of timesteps, that of pure noise; that of a picture is 0.
    """

    shape: tuple[Size, ...]
    role: Role = "normal"
    dtype: Dtype = "bf16"
    given_by: str | None = None
    noise_at: int = 1


@dataclass(frozen=True)
class Group:
    """Linears that read the same input: with shared scales TensorRT runs them as one GEMM, in FP4, and in FP8 for SM89.

    Attributes:
        reads: whose tokens they read, as symbolic dimensions joined by ``+``, such as ``L+T``; empty for one vector.
        linears: their module paths, in graph order.
        gated: whether these are two whose results are multiplied, one of them behind an activation.
    """

    reads: str
    linears: tuple[str, ...]
    gated: bool = False


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
class Stack:
    """A list of equal blocks, one run after the other.

    Attributes:
        path: of the list in the model.
        count: key of the config that holds the number of its blocks.
        groups: the linears to quantize of a block, in graph order, by paths in the block.
        attentions: paths in the block.
        masked: those of them that hide some tokens by a mask, which attention in FP8 does not take.
        modulated: linears of a block behind an adaptive norm of the block's own; of all kinds of its blocks.
        read_by: path of the stack that reads what this one gives, where others run in between.
        unused_in_last: modules of the last block whose result nothing reads: in the checkpoint, but not in a graph.
        lacks: (config, index of a block) to the modules that this block does not have.
        equal: whether its blocks compute alike, so that a graph of the first is repeated; else all are traced.
        tail: whether the last block is of another kind than the equal ones before it.
    """

    path: str
    count: str
    groups: tuple[Group, ...]
    attentions: tuple[str, ...] = ("attn",)
    masked: tuple[str, ...] = ()
    modulated: tuple[Modulated, ...] = ()
    read_by: str | None = None
    unused_in_last: tuple[str, ...] = ()
    lacks: Callable[[Config, int], tuple[str, ...]] = lambda _config, _index: ()
    equal: bool = True
    tail: bool = False

    def blocks(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of its blocks, in the order in which they run."""
        return tuple(f"{self.path}.{index}" for index in range(config[self.count]))

    @cached_property
    def reads(self) -> dict[str, str]:
        """Path in the block of each linear to quantize to what it reads."""
        return {path: group.reads for group in self.groups for path in group.linears}


@dataclass(frozen=True)
class Family:
    """A family of diffusion transformers, as data.

    Attributes:
        name: what the manifest and the graph call it.
        class_name: the diffusers class.
        matches: whether a diffusers config belongs here.
        problem: what is wrong with a config of this class, in one sentence, or None.
        stacks: the blocks, in the order in which they run.
        dims: name of a symbolic dimension to its bounds.
        inputs: name to input, in graph order.
        outputs: name of each output to its shape, as that of an input, or with a multiple of a symbolic dimension, such
            as ``8*H``; None for a size that belongs to the model.
        positions: (sizes) to the values of the inputs whose role is ``positions``, FP32 whatever their dtype.
        state: name to shape of every tensor of a config's plain checkpoint, in the order of the model's own state.
        outside: linears to quantize that lie in no block.
        adapter: ``module:class`` of what is run and exported in place of the diffusers class; None for that class.
        make: (config) to the empty model, in place of such a class.
        lookups: modules with a matrix that is no linear's: embeddings, whose rows are looked up.
        unused: modules that are in every checkpoint, and for whose inputs a graph has no place.
        special: whether its configs are some of another family's, which is tried after it.
        reorders: whether a token's channels come out in another order than they go in.
        unsupported: in one sentence, which model a config of this class describes that is not supported, and what to
            take in its place; None where it is one that is.
        remark: a note on a config that belongs here, in one line, or None.
    """

    name: str
    class_name: str
    matches: Callable[[Config], bool]
    problem: Callable[[Config], str | None]
    stacks: tuple[Stack, ...]
    dims: Mapping[str, Dim]
    inputs: Mapping[str, Input]
    outputs: Mapping[str, tuple[str | int | None, ...]]
    positions: Callable[[Sizes], Mapping[str, npt.NDArray[np.float32]]]
    state: Callable[[Config], dict[str, tuple[int, ...]]]
    outside: tuple[Group, ...] = ()
    adapter: str | None = None
    make: Callable[[Config], torch.nn.Module] | None = None
    lookups: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    special: bool = False
    reorders: bool = False
    unsupported: Callable[[Config], str | None] = lambda _config: None
    remark: Callable[[Config], str | None] = lambda _config: None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process find the family by its name: what it is made of are functions."""
        from fp4trt.families import family_named

        return family_named, (self.name,)

    @property
    def noise_at(self) -> int:
        """The timestep of pure noise; that of a picture is 0."""
        return max((each.noise_at for each in self.inputs.values() if each.role == "time"), default=1)

    def blocks(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of the blocks of all stacks, in the order in which the model runs them."""
        return tuple(block for stack in self.stacks for block in stack.blocks(config))

    @property
    def read_by(self) -> dict[str, str]:
        """Path of a stack to that of the one that reads what it gives, where others run in between."""
        return {stack.path: stack.read_by for stack in self.stacks if stack.read_by is not None}

    def groups(self, config: Config) -> tuple[tuple[str, ...], ...]:
        """Return the linears to quantize, in graph order, as groups whose members read the same input."""
        unused = self._unused(config)
        inside = (
            tuple(
                path
                for path in (f"{block}.{leaf}" for leaf in group.linears if not _is_in(leaf, lacks))
                if not _is_in(path, unused)
            )
            for block, stack, lacks in self._blocks(config)
            for group in stack.groups
        )
        return (*(group.linears for group in self.outside), *(group for group in inside if group))

    def gated(self, config: Config) -> tuple[tuple[str, str], ...]:
        """Return the linears to quantize whose results are multiplied in pairs, one of them behind an activation."""
        return tuple(
            (f"{block}.{group.linears[0]}", f"{block}.{group.linears[1]}")
            for block, stack, _ in self._blocks(config)
            for group in stack.groups
            if group.gated
        )

    def _blocks(self, config: Config) -> Iterator[tuple[str, Stack, tuple[str, ...]]]:
        """Yield each block's path, its stack, and the modules that it lacks."""
        for stack in self.stacks:
            for index, block in enumerate(stack.blocks(config)):
                yield block, stack, stack.lacks(config, index)

    def _unused(self, config: Config) -> tuple[str, ...]:
        """Return the modules whose result nothing reads."""
        last = (
            f"{stack.path}.{config[stack.count] - 1}.{path}"
            for stack in self.stacks
            for path in (stack.unused_in_last if config[stack.count] else ())
        )
        return (*self.unused, *last)

    def is_unused(self, config: Config, name: str) -> bool:
        """Return whether a module, or a tensor, is of a part whose result nothing reads, so that no graph has it."""
        return _is_in(name, self._unused(config))

    def quantized(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of the linears to quantize, in graph order."""
        return tuple(path for group in self.groups(config) for path in group)

    def attentions(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of the attentions, in graph order."""
        return tuple(f"{block}.{path}" for block, _, path in self._attentions(config))

    def fp8_attentions(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of the attentions that can be in FP8, in graph order: those without a mask."""
        return tuple(f"{block}.{path}" for block, stack, path in self._attentions(config) if path not in stack.masked)

    def _attentions(self, config: Config) -> Iterator[tuple[str, Stack, str]]:
        """Yield each attention's block, its stack, and its path in the block."""
        for block, stack, lacks in self._blocks(config):
            for path in stack.attentions:
                if not _is_in(path, lacks):
                    yield block, stack, path

    def stream(self, path: str) -> str:
        """Return whose tokens a linear to quantize reads, as :attr:`Group.reads`."""
        for group in self.outside:
            if path in group.linears:
                return group.reads
        stack, inside = self._place(path)
        return stack.reads[inside]

    def modulated(self, config: Config, block: str) -> tuple[Modulated, ...]:
        """Return a block's linears behind an adaptive norm: those whose modulation has as many parts in this block."""
        state = self.state(config)

        def is_here(place: Modulated) -> bool:
            modulation, consumer = (f"{block}.{path}.weight" for path in (place.modulation, place.consumers[0]))
            return consumer in state and state[modulation][0] == place.chunks * state[consumer][1]

        return tuple(place for place in self._place(f"{block}.")[0].modulated if is_here(place))

    def _place(self, path: str) -> tuple[Stack, str]:
        """Return the stack that a path lies in, and the path in its block."""
        for stack in self.stacks:
            if path.startswith(f"{stack.path}."):
                return stack, path.removeprefix(f"{stack.path}.").partition(".")[2]
        raise AssertionError(f"{path} is in no stack of {self.name}")

    def rows(self, path: str) -> int:
        """Return how many rows a linear multiplies for one picture of the default size."""
        names = self.stream(path).split("+")
        return sum(self.dims[name].tokens for name in names) if names != [""] else 1

    def linears(self, config: Config) -> dict[str, tuple[int, int]]:
        """Return module path to [N, K] of every linear, the ones to quantize first and in graph order."""
        others = {f"{path}.weight" for path in self.lookups}
        matrices = {
            name: shape
            for name, shape in self.state(config).items()
            if len(shape) == 2 and name.endswith(".weight") and name not in others
        }
        first = [f"{path}.weight" for path in self.quantized(config)]
        ordered = (*first, *(name for name in matrices if name not in set(first)))
        return {name.removesuffix(".weight"): (matrices[name][0], matrices[name][1]) for name in ordered}

    def groups_of(self, config: Config, paths: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """Return some linears by shared input; one outside :meth:`groups` is alone."""
        found = set(paths)
        kept = [tuple(path for path in group if path in found) for group in self.groups(config)]
        known = {path for group in kept for path in group}
        return (*(group for group in kept if group), *((path,) for path in paths if path not in known))

    def input_shapes(self, config: Config) -> dict[str, tuple[str | int, ...]]:
        """Return each input's symbolic shape, in graph order."""

        def known(size: Size) -> str | int:
            if isinstance(size, str):
                return size if size in self.dims else int(config[size])
            return size if isinstance(size, int) else size(config)

        return {
            name: tuple(known(size) for size in each.shape)
            for name, each in self.inputs.items()
            if each.given_by is None or config.get(each.given_by)
        }

    def sizes(self, batch: int, image_tokens: int, text_tokens: int) -> dict[str, int]:
        """Return the symbolic dimensions' sizes by what they count: a video's as an image's, audio's 4 above text's.

        Rows and columns of a picture are those of a rectangle of about its tokens, one column more than rows. Sizes of
        no kind begin at an image's too, each 4 above the one before it.
        """
        counts: dict[Kind, int] = {"batch": batch, "image_tokens": image_tokens, "text_tokens": text_tokens}
        counts |= {"video_tokens": image_tokens, "audio_tokens": text_tokens + 4}
        counts |= {"image_rows": isqrt(image_tokens), "image_columns": isqrt(image_tokens) + 1}
        others = [name for name, dim in self.dims.items() if dim.kind == "size"]
        free = {name: image_tokens + 4 * index for index, name in enumerate(others)}
        return {name: free[name] if name in free else counts[dim.kind] for name, dim in self.dims.items()}

    def example_inputs(
        self, config: Config, sizes: Sizes | tuple[int, int, int], seed: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Return seeded random inputs in graph order.

        Args:
            config: of the model.
            sizes: of the symbolic dimensions, or what :meth:`sizes` takes: batch, image tokens, text tokens.
            seed: of the random numbers.
            dtype: of the inputs that are in the dtype to compute in.
        """
        import torch

        if isinstance(sizes, tuple):
            sizes = self.sizes(*sizes)
        random = torch.Generator().manual_seed(seed)
        positions = self.positions(sizes)
        found = {}
        for name, symbolic in self.input_shapes(config).items():
            shape = [sizes[size] if isinstance(size, str) else size for size in symbolic]
            match self.inputs[name].role:
                case "normal":
                    value = torch.randn(shape, generator=random)
                case "time":
                    value = self.inputs[name].noise_at * (1 - 0.9 * torch.rand(shape, generator=random))
                case "guidance":
                    value = 1 + 4 * torch.rand(shape, generator=random)
                case "positions":
                    value = torch.from_numpy(positions[name])
                case "mask" | "padding":
                    value = torch.arange(shape[-1]).expand(shape) < max(1, shape[-1] - shape[-1] // 4)
                    value = ~value if self.inputs[name].role == "padding" else value
                case "token":
                    value = torch.randint(0, config["vocab_size"], shape, generator=random)
                case "choice":
                    value = torch.randint(0, 2, shape, generator=random)
            kinds = {"bool": torch.bool, "int32": torch.int32, "int64": torch.int64}
            found[name] = value.to(kinds.get(self.inputs[name].dtype, dtype))
            if self.inputs[name].dtype == "fp32":
                found[name] = value
        return found


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module, or a tensor, is one of some modules, or of a part of one."""
    return f"{name}.".startswith(tuple(f"{path}." for path in modules))
