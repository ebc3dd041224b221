"""One call of a transformer at given sizes: its tokens, its products, and what of it lies in memory at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from fp4trt.errors import BadProfileError
from fp4trt.families import Family
from fp4trt.families.dim import OPTIONS
from fp4trt.families.family import Config, Sizes
from trt_build.profiles import as_text, make_profile, pictures_of

__all__ = ["Attention", "Call", "Model", "Product", "call_of"]

_QUERIES: Final = ("to_q", "add_q_proj")
_KEYS: Final = ("to_k", "add_k_proj")
_FUSED: Final = "to_qkv"
"""What the linears of queries, of keys, and of all three in one weight are called in diffusers' attentions."""

_ACTIVATION: Final = 2
"""Bytes of an activation between two GEMMs: BF16."""


@dataclass(frozen=True)
class Readers:
    """Linears of one input.

    Attributes:
        reads: whose tokens they read, as symbolic dimensions joined by ``+``; empty for one vector.
        linears: module path to N.
        columns: K.
    """

    reads: str
    linears: Mapping[str, int]
    columns: int

    @property
    def first(self) -> str:
        """Path of the first of them."""
        return next(iter(self.linears))


@dataclass(frozen=True, eq=False)
class Model:
    """A transformer, whose structure is found once for all sizes."""

    family: Family
    config: Config

    @functools.cached_property
    def readers(self) -> tuple[Readers, ...]:
        """The linears to quantize, in graph order; the others take next to no time."""
        shapes = self.family.linears(self.config)
        return tuple(
            Readers(self.family.stream(group[0]), {path: shapes[path][0] for path in group}, shapes[group[0]][1])
            for group in self.family.groups(self.config)
        )

    @functools.cached_property
    def first_blocks(self) -> tuple[tuple[Readers, ...], ...]:
        """Those over tokens of the first block of each stack; all of its blocks are as large."""
        firsts = [blocks[0] for stack in self.family.stacks if (blocks := stack.blocks(self.config))]
        inside = (
            tuple(each for each in self.readers if each.reads and each.first.startswith(f"{first}."))
            for first in firsts
        )
        return tuple(readers for readers in inside if readers)


@dataclass(frozen=True)
class Product(Readers):
    """Linears of one input at some size: GEMMs of [rows, columns] by [columns, N], of the whole batch."""

    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of what it reads and of what it writes, in 16 bit."""
        return _ACTIVATION * self.rows * (self.columns + sum(self.linears.values()))


@dataclass(frozen=True)
class Attention:
    """An attention of ``queries`` over ``keys`` tokens, of ``pictures`` and ``width`` channels in all heads."""

    pictures: int
    queries: int
    keys: int
    width: int

    @property
    def flops(self) -> int:
        """FLOPs of its two products."""
        return 4 * self.pictures * self.queries * self.keys * self.width

    @property
    def nbytes(self) -> int:
        """Bytes of queries, keys, values and the result, in 16 bit; scores never leave the kernel."""
        return _ACTIVATION * self.pictures * 2 * (self.queries + self.keys) * self.width


@dataclass(frozen=True)
class Call:
    """One call of a transformer.

    Attributes:
        model: the transformer.
        sizes: of the symbolic dimensions.
        width, height: of a picture, or of a frame, in pixels; 0 where the model has none.
        frames: of a video; 1 of a picture.
        resizable: whether another resolution makes it another size.
        divisible: whether another batch does.
        notes: what is to be told of the sizes.
    """

    model: Model
    sizes: Sizes
    width: int
    height: int
    frames: int
    resizable: bool = False
    divisible: bool = False
    notes: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Pictures that go in at once; both of a guided pair count."""
        return math.prod(self.sizes[name] for name, dim in self.model.family.dims.items() if dim.kind == "batch")

    @property
    def usual_batch(self) -> int:
        """What goes in at once for one picture: two where the pipeline lets both of a guided pair in together."""
        return next((dim.default or 1 for dim in self.model.family.dims.values() if dim.kind == "batch"), 1)

    @property
    def pictures(self) -> int:
        """Pictures that are decoded: half as many where the pipeline lets both of a guided pair in at once."""
        return -(-self.batch // self.usual_batch)

    def products(self) -> Iterator[Product]:
        """Yield the products of the linears to quantize, in graph order."""
        yield from map(self._product, self.model.readers)

    def attentions(self) -> Iterator[Attention]:
        """Yield the attentions, by the names that diffusers gives their linears."""
        found: dict[str, list[int]] = {}
        for product in self.products():
            tokens = product.rows // self.batch
            for path, rows in product.linears.items():
                place, _, leaf = path.rpartition(".")
                fused = leaf.startswith(_FUSED)
                queries, keys, width = found.setdefault(place, [0, 0, 0])
                is_query, is_key = leaf in _QUERIES or fused, leaf in _KEYS or fused
                width = (product.columns if fused else rows) if is_query else width
                found[place] = [queries + tokens * is_query, keys + tokens * is_key, width]
        for queries, keys, width in found.values():
            if queries and keys:
                yield Attention(self.batch, queries, keys, width)

    def activation_bytes(self) -> int:
        """Return the bytes of what a block holds at once: its streams, and what its widest GEMM reads and writes."""
        held = (self._streams(block) + max(product.nbytes for product in block) for block in self._blocks())
        return max(held, default=0)

    def stream_bytes(self) -> int:
        """Return the bytes of what one block gives the next."""
        return max(map(self._streams, self._blocks()), default=0)

    def _blocks(self) -> Iterator[Sequence[Product]]:
        for readers in self.model.first_blocks:
            yield [self._product(each) for each in readers]

    def _streams(self, block: Sequence[Product]) -> int:
        """Return the bytes of the tokens between blocks, of each kind as wide as the narrowest product of it."""
        widths: dict[str, tuple[int, int]] = {}
        for product in block:
            size = product.columns, product.rows
            widths[product.reads] = min(widths.get(product.reads, size), size)
        return _ACTIVATION * sum(columns * rows for columns, rows in widths.values())

    def _product(self, readers: Readers) -> Product:
        tokens = sum(self.sizes[name] for name in readers.reads.split("+")) if readers.reads else 1
        return Product(readers.reads, readers.linears, readers.columns, self.batch * tokens)


def call_of(model: Model, options: Mapping[str, Any]) -> Call:
    """Return a call at the sizes that are asked for, and at the family's default ones beyond.

    Args:
        model: the transformer.
        options: sizes as :func:`trt_build.profiles.make_profile` takes them, one value each.

    Raises:
        BadProfileError: a size is malformed, a range, or outside what the model takes.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    _require_one_size(given)
    family = model.family
    for said in sorted(_named_in(given) & family.inputs.keys()):
        raise BadProfileError(
            f"--shape {said}=...: a plan takes symbolic dimensions, not inputs: {', '.join(family.dims)}"
        )
    _require_said_once(family, given)
    symbols = {name: dim.as_dict() for name, dim in family.dims.items()}
    profile = make_profile(family.input_shapes(model.config), symbols, **given)
    sizes = {name: extent[1] for name, extent in profile.symbols.items()}
    divisible = not any(family.dims[name].kind == "batch" for name in _named_in(given) & family.dims.keys())
    call = Call(model, sizes, 0, 0, 1, divisible=divisible, notes=profile.notes)
    pictured = next((name for name, dim in family.dims.items() if dim.pixels_per_token), None)
    return call if pictured is None else _with_picture(call, pictured, given)


def _shapes(given: Mapping[str, Any]) -> tuple[str, ...]:
    shapes = given.get("shapes", ())
    return (shapes,) if isinstance(shapes, str) else tuple(shapes)


def _named_in(given: Mapping[str, Any]) -> set[str]:
    """Return what is named in the shapes that are asked for."""
    return {shape.partition("=")[0] for shape in _shapes(given)}


def _require_one_size(given: Mapping[str, Any]) -> None:
    said = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if name != "shapes"]
    for option, value in (*said, *(("--shape", shape) for shape in _shapes(given))):
        if ":" in (shown := as_text(option, value)):
            raise BadProfileError(f"{option} {shown}: a plan is of one size; give the largest of the range")


def _require_said_once(family: Family, given: Mapping[str, Any]) -> None:
    """Refuse a size that is said twice; a picture may be one of several whose tokens a shape counts together."""
    found: set[str] = set()
    for shape in _shapes(given):
        name = shape.partition("=")[0]
        options = OPTIONS[family.dims[name].kind] if name in family.dims else ()
        others = {"--reference-images"} if "--resolution" in options else set(options)
        for option in sorted(others & {f"--{key.replace('_', '-')}" for key in given}):
            raise BadProfileError(f"--shape {shape}: {option} says {name}, too; leave out one of them")
        if name in found:
            raise BadProfileError(f"--shape {shape}: {name} is given twice; leave out one of them")
        found.add(name)


def _with_picture(call: Call, name: str, given: Mapping[str, Any]) -> Call:
    """Return a call with the sides of its picture and its frames: those asked for, or the family's default ones.

    Where the number of tokens alone is asked for, the picture is a square of as many.

    Raises:
        BadProfileError: fewer tokens are asked for than the picture has.
    """
    dim = call.model.family.dims[name]
    frames = int(as_text("--frames", given.get("frames", dim.default_frames or 1)))
    latents, step = 1 + (frames - 1) // (dim.frames_per_token or 1), dim.pixels_per_token or 1
    counted = name in _named_in(given)
    if counted and "resolution" not in given:
        side = math.isqrt(call.sizes[name] // latents) * step
        return replace(call, width=side, height=side, frames=frames)
    width, height = pictures_of(given.get("resolution", dim.default_resolution))[1]
    tokens = (width // step) * (height // step) * latents
    if call.sizes[name] < tokens:
        raise BadProfileError(
            f"--shape {name}={call.sizes[name]}: {width}x{height} alone is {tokens} tokens; give as many or more"
        )
    return replace(call, width=width, height=height, frames=frames, resizable=not counted)
