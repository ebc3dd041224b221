"""Resolution, batch and text length -> optimization profile, checked against what the model declares."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4trt.errors import BadModelError, BadProfileError
from fp4trt.families.dim import BOUNDS, OPTIONS, out_of_order
from trt_build.least_tokens import raised

__all__ = [
    "Count",
    "Extent",
    "InputShape",
    "Pixels",
    "Profile",
    "as_text",
    "check_symbol",
    "declared_range",
    "make_profile",
    "pictures_of",
]

Extent = tuple[int, int, int]
"""Minimum, optimum and maximum of one dimension."""

Count = int | Sequence[int] | str
"""One number, or minimum, optimum and maximum."""

Side = int | Sequence[int]
Pixels = Side | Sequence[Side] | str
"""A side or (width, height), or minimum, optimum and maximum of these."""

InputShape = tuple[int | str | None, ...]
"""Dimensions of a graph input: a number, a symbol, or None where the graph says nothing."""


@dataclass(frozen=True)
class Profile:
    """Minimum, optimum and maximum shape of every input, the extent of every symbol, and what is to be told of it.

    Messages call it by its label.
    """

    inputs: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    symbols: dict[str, Extent]
    notes: tuple[str, ...] = ()
    label: str = "the profile"


def make_profile(
    input_shapes: Mapping[str, InputShape],
    symbols: Mapping[str, Mapping[str, Any]],
    *,
    resolution: Pixels | None = None,
    batch: Count | None = None,
    text: Count | None = None,
    frames: Count | None = None,
    audio: Count | None = None,
    shapes: str | Sequence[str] = (),
    fp8_attention: bool = False,
    keys: Collection[Sequence[str]] = (),
    reference_images: Count | None = None,
) -> Profile:
    """Return the profile of a graph.

    Args:
        input_shapes: the graph's inputs with their dimensions.
        symbols: the model's `fp4trt.symbols`; empty for a graph that fp4trt did not write.
        resolution: pixels: one side, (width, height), or minimum, optimum and maximum of either; each side a multiple
            of the pixels that a token spans. As the command line has it "1024", "768x1360" or "512:1024:1360".
        batch: images: 1 or (1, 1, 4); "1" or "1:1:4".
        text: tokens: 512 or (1, 512, 512); "512" or "1:512:512".
        frames: of a video, the first one more than a multiple of those that a token spans: 81 or (33, 81, 121).
        audio: tokens: 126 or (32, 126, 512).
        shapes: "NAME=MIN:OPT:MAX" or several of them, NAME a symbol (numbers) or an input (shapes such as 1x256x64).
        fp8_attention: the graph wants 32 tokens or more: minima that no option names are raised to that.
        keys: symbols that add up to the keys of an attention in FP8, of each; nothing where it is not known.
        reference_images: pictures that the model reads as further image tokens, as Kontext, FLUX.2 and Qwen-Image-Edit
            do, each of the size that `resolution` says: 1 or (0, 1, 2); "1" or "0:1:2".

    A dimension that no option names covers all that the metadata declares.

    Raises:
        BadProfileError: malformed, outside the declared range, or a dynamic dimension left open.
        BadModelError: the symbols are not as fp4trt declares them.
    """
    for name, symbol in symbols.items():
        check_symbol(name, symbol)
    options = {"--resolution": resolution, "--frames": frames, "--audio": audio, "--batch": batch, "--text": text}
    given = {option: as_text(option, value) for option, value in options.items() if value is not None}
    known = {option for symbol in symbols.values() for option in OPTIONS[symbol["kind"]]}
    for option, value in given.items():
        if option not in known:
            raise BadProfileError(
                f"{option} {value}: the model declares no such dimension; give --shape NAME=MIN:OPT:MAX"
            )
    extents = {name: _symbol_extent(symbol, given) for name, symbol in symbols.items()}
    if reference_images is not None:
        extents |= _with_references(extents, symbols, as_text("--reference-images", reference_images))
    named = {name for name, symbol in symbols.items() if given.keys() & set(OPTIONS[symbol["kind"]])}
    whole: dict[str, tuple[tuple[int, ...], ...]] = {}
    for shape in (shapes,) if isinstance(shapes, str) else shapes:
        name, _, value = shape.partition("=")
        if name in input_shapes:
            whole[name] = _input_extent(shape, input_shapes[name])
            named.update(dimension for dimension in input_shapes[name] if isinstance(dimension, str))
        elif any(name in dimensions for dimensions in input_shapes.values()):
            extents[name] = _extent(f"--shape {shape}", value, declared_range(symbols.get(name)))
            named.add(name)
        else:
            there = ", ".join([*_free_symbols(input_shapes), *input_shapes])
            raise BadProfileError(f"--shape {shape}: the graph has no input or symbol {name!r}; it has {there}")
    extents, notes = raised(extents, symbols, named, keys) if fp8_attention else (extents, ())
    notes = (*notes, *_beyond_a_picture(extents, symbols))
    if reference_images is not None:
        notes = (*notes, *_of_one_length(extents, symbols))
    inputs = {
        name: whole[name] if name in whole else _resolve(name, dimensions, extents)
        for name, dimensions in input_shapes.items()
    }
    return Profile({name: (low, best, high) for name, (low, best, high) in inputs.items()}, extents, notes)


def as_text(option: str, value: Any) -> str:
    """Return an option's value as the command line has it, which messages quote; of --resolution with 768x1360."""
    if not isinstance(value, tuple | list):
        return str(value)
    if option == "--resolution" and len(value) == 2:
        return "x".join(map(str, value))
    return ":".join(as_text(option, part) for part in value)


def pictures_of(resolution: Pixels) -> list[tuple[int, int]]:
    """Return width and height of minimum, optimum and maximum of a resolution that a profile was made of."""
    parts = [part.split("x") for part in as_text("--resolution", resolution).lower().split(":")]
    pictures = [(int(part[0]), int(part[-1])) for part in parts]
    return pictures if len(pictures) > 1 else 3 * pictures


def check_symbol(name: str, symbol: Mapping[str, Any]) -> None:
    """Raise BadModelError unless a symbol has a kind of ours, and with it an ordered range of positive numbers."""
    kind = symbol.get("kind")
    if not isinstance(kind, str) or kind not in BOUNDS:
        raise BadModelError(
            f"the graph's symbol {name!r} has the kind {kind!r}; expected {', '.join(BOUNDS)}: export it again"
        )
    if out_of_order(symbol, kind):
        keys = [key for keys in BOUNDS[kind] for key in keys]
        declared = ", ".join(repr(symbol.get(key)) for key in keys)
        raise BadModelError(
            f"the graph's symbol {name!r} declares {declared} as its {', '.join(keys)}; "
            "expected positive numbers in order: export it again"
        )


def _symbol_extent(symbol: Mapping[str, Any], given: Mapping[str, str]) -> Extent:
    option, *others = OPTIONS[symbol["kind"]]
    if "min_resolution" in symbol:
        low, best, high = _image_tokens(symbol, given.get(option))
        for other in others:
            least, usual, most = _latent_frames(symbol, given.get(other))
            low, best, high = low * least, best * usual, high * most
        return low, best, high
    return _range(symbol, option, given, ("min", "default", "max"))


def _range(symbol: Mapping[str, Any], option: str, given: Mapping[str, str], keys: Sequence[str]) -> Extent:
    low, usual, high = (int(symbol[key]) for key in keys)
    if option not in given:
        return low, usual, high
    return _extent(f"{option} {given[option]}", given[option], (low, high))


def _latent_frames(symbol: Mapping[str, Any], value: str | None) -> Extent:
    """Return how many times a video has the tokens of a picture."""
    given = {} if value is None else {"--frames": value}
    extent = _range(symbol, "--frames", given, ("min_frames", "default_frames", "max_frames"))
    step = int(symbol["frames_per_token"])
    for frames in extent:
        if (frames - 1) % step:
            raise BadProfileError(f"--frames {value}: {frames} is not 1 more than a multiple of {step}")
    low, best, high = (1 + (frames - 1) // step for frames in extent)
    return low, best, high


def _image_tokens(symbol: Mapping[str, Any], value: str | None) -> Extent:
    names = ("min_resolution", "default_resolution", "max_resolution")
    parts = value.split(":") if value is not None else [str(symbol[name]) for name in names]
    tokens = [_tokens(symbol, part, value or part) for part in parts]
    return _ordered(f"--resolution {value}", tokens, parts)


def _with_references(
    extents: Mapping[str, Extent], symbols: Mapping[str, Mapping[str, Any]], value: str
) -> dict[str, Extent]:
    """Return the extents of image tokens where so many pictures of the same size are read beside the new one."""
    given = f"--reference-images {value}"
    pictures = _extent(given, value, None, least=0)
    if any(
        symbol.get("references") is False for symbol in symbols.values()
    ):  # a graph of earlier versions says nothing
        raise BadProfileError(f"{given}: the model reads no pictures beside the one that it makes; leave it out")
    found = [name for name, symbol in symbols.items() if symbol["kind"] == "image_tokens"]
    if not found:
        raise BadProfileError(f"{given}: the model declares no image tokens; give --shape NAME=MIN:OPT:MAX")
    low, best, high = pictures
    return {
        name: (extents[name][0] * (1 + low), extents[name][1] * (1 + best), extents[name][2] * (1 + high))
        for name in found
    }


def _beyond_a_picture(extents: Mapping[str, Extent], symbols: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is to be told of more image tokens than the model's largest picture has."""
    for name, symbol in symbols.items():
        largest = _largest_picture(symbol)
        if largest and extents[name][2] > largest:
            yield (
                f"{name} goes to {extents[name][2]} image tokens, beyond the {largest} of the model's largest picture, "
                "as pictures to edit or to refer to need"
            )


def _of_one_length(extents: Mapping[str, Extent], symbols: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is to be told where pictures to refer to have to be of one size, which pipelines do not give them."""
    for name, symbol in symbols.items():
        low, _, high = extents[name]
        if symbol["kind"] == "image_tokens" and low == high:
            yield (
                f"{name} is {low} image tokens and no other number, which pictures to refer to have to add up to: "
                "give --resolution MIN:OPT:MAX where they may differ"
            )


def _largest_picture(symbol: Mapping[str, Any]) -> int | None:
    if symbol["kind"] != "image_tokens":
        return None
    return (int(symbol["max_resolution"]) // int(symbol["pixels_per_token"])) ** 2


def _tokens(symbol: Mapping[str, Any], resolution: str, given: str) -> int:
    """Return the image tokens, or the rows or columns of latents, of "1024" or "768x1360"."""
    sides = resolution.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise BadProfileError(f"--resolution {given}: expected 1024, 768x1360 or MIN:OPT:MAX of such")
    width, height = int(sides[0]), int(sides[-1])
    step, low, high = (int(symbol[key]) for key in ("pixels_per_token", "min_resolution", "max_resolution"))
    if symbol["kind"] == "video_tokens" and not low * low <= width * height <= high * high:
        between = f"{low}x{low} to {high}x{high} pixels of a frame"
        raise BadProfileError(f"--resolution {given}: {width}x{height} is outside the model's {between}")
    for side in (width, height):
        if symbol["kind"] != "video_tokens" and not low <= side <= high:
            raise BadProfileError(f"--resolution {given}: {side} is outside the model's {low} to {high} pixels")
        if side % step:
            raise BadProfileError(f"--resolution {given}: {side} is not a multiple of {step} pixels")
    sides_of = {"image_rows": height // step, "image_columns": width // step}
    return sides_of.get(symbol["kind"], (width // step) * (height // step))


def declared_range(symbol: Mapping[str, Any] | None) -> tuple[int, int | None] | None:
    """Return the range of a symbol; that of a picture's tokens is open, because pictures to refer to are tokens too."""
    if symbol is None:
        return None
    if "min_resolution" in symbol:
        low, high = (
            int(symbol[key]) // int(symbol["pixels_per_token"]) for key in ("min_resolution", "max_resolution")
        )
        return (low, high) if symbol["kind"] in ("image_rows", "image_columns") else (low**2, None)
    return int(symbol["min"]), int(symbol["max"])


def _extent(given: str, value: str, declared: tuple[int, int | None] | None, least: int = 1) -> Extent:
    parts = value.split(":")
    if not all(part.isdecimal() for part in parts):
        raise BadProfileError(f"{given}: expected a number or MIN:OPT:MAX")
    extent = _ordered(given, [int(part) for part in parts], least=least)
    low, high = declared or (0, None)
    if extent[0] < low or (high is not None and extent[2] > high):
        wrong = f"outside the model's range {low} to {high}" if high is not None else f"below the model's least, {low}"
        raise BadProfileError(f"{given}: {wrong}")
    return extent


def _ordered(given: str, values: Sequence[int], said: Sequence[object] = (), least: int = 1) -> Extent:
    """Return one value, or three, as an extent; `said` is how the user put them, where that is in another unit."""
    if len(values) not in (1, 3):
        raise BadProfileError(f"{given}: expected one value or MIN:OPT:MAX, found {len(values)} values")
    low, best, high = values[0], values[len(values) // 2], values[-1]
    if high < least and len(values) == 1:
        raise BadProfileError(f"{given}: expected {least} or more")
    if not 0 <= low <= best <= high or high < least:
        raise BadProfileError(
            f"{given}: expected minimum <= optimum <= maximum, found {', '.join(map(str, said or values))}"
        )
    return low, best, high


def _input_extent(given: str, dimensions: InputShape) -> tuple[tuple[int, ...], ...]:
    value = given.partition("=")[2]
    columns = [part.lower().split("x") for part in value.split(":")]
    if any(len(column) != len(dimensions) or not all(n.isdecimal() for n in column) for column in columns):
        raise BadProfileError(f"--shape {given}: expected {len(dimensions)} numbers such as 1x256x64, or MIN:OPT:MAX")
    for column in columns:
        for number, dimension in zip(column, dimensions, strict=True):
            if isinstance(dimension, int) and int(number) != dimension:
                raise BadProfileError(f"--shape {given}: {number} where the graph has {dimension}")
    rows = [_ordered(f"--shape {given}", [int(n) for n in numbers]) for numbers in zip(*columns, strict=True)]
    return tuple(zip(*rows, strict=True)) if rows else ((), (), ())


def _resolve(name: str, dimensions: InputShape, extents: Mapping[str, Extent]) -> tuple[tuple[int, ...], ...]:
    rows: list[Extent] = []
    for axis, dimension in enumerate(dimensions):
        if isinstance(dimension, int):
            rows.append((dimension, dimension, dimension))
        elif dimension is not None and dimension in extents:
            rows.append(extents[dimension])
        else:
            what = f"--shape {dimension}=MIN:OPT:MAX" if dimension else f"--shape {name}=SHAPE"
            raise BadProfileError(f"input {name!r}: axis {axis} is dynamic and has no range; give {what}")
    return tuple(zip(*rows, strict=True)) if rows else ((), (), ())


def _free_symbols(input_shapes: Mapping[str, InputShape]) -> list[str]:
    names = (dimension for shape in input_shapes.values() for dimension in shape if isinstance(dimension, str))
    return list(dict.fromkeys(names))
