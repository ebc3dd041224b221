"""Several optimization profiles of one engine: each of its own options and, beyond them, of the plain ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from fp4trt.errors import BadProfileError
from fp4trt.families.dim import OPTIONS
from trt_build.least_tokens import require_tokens
from trt_build.profiles import InputShape, Profile, as_text, make_profile, pictures_of

__all__ = ["Asked", "are_profiles", "make_profiles"]

Asked = str | Mapping[str, Any]
"""One profile: "resolution=1024 batch=1", or the same as arguments of :func:`make_profile`."""

_ARGUMENTS: Final = {
    "resolution": "resolution",
    "batch": "batch",
    "text": "text",
    "frames": "frames",
    "audio": "audio",
    "reference-images": "reference_images",
    "shape": "shapes",
}
"""Key of a profile to the argument; a key is the option's name without dashes."""
_EXAMPLE: Final = '"resolution=1024 batch=1 text=512"'


def are_profiles(value: Any) -> str | None:
    """Allow a profile, or several in a list."""
    each = (value,) if isinstance(value, str | Mapping) else value
    fit = isinstance(each, list | tuple) and all(isinstance(asked, str | Mapping) for asked in each)
    return None if fit else f"{_EXAMPLE}, a mapping that says the same, or several such in a list"


@dataclass(frozen=True)
class _Wanted:
    """What a profile is made of, and how messages call it; nothing where it is the only one."""

    options: dict[str, Any]
    label: str = ""

    def lead(self, line: str) -> str:
        return f"{self.label}: {line}" if self.label else line


def make_profiles(
    input_shapes: Mapping[str, InputShape],
    symbols: Mapping[str, Mapping[str, Any]],
    plain: Mapping[str, Any],
    profiles: Asked | Sequence[Asked] = (),
    *,
    fp8_attention: bool = False,
    keys: Collection[Sequence[str]] = (),
    short_allowed: bool = False,
) -> tuple[Profile, ...]:
    """Return the profiles of an engine, in order; that of the plain options where none is asked for.

    Args:
        input_shapes: the graph's inputs with their dimensions.
        symbols: the model's `fp4trt.symbols`; empty for a graph that fp4trt did not write.
        plain: arguments of :func:`make_profile`, for all that a profile does not say.
        profiles: what is asked for.
        fp8_attention: the graph wants 32 tokens or more.
        keys: symbols that add up to the keys of an attention in FP8, of each; nothing where it is not known.
        short_allowed: a profile that begins below is not refused.

    Two pictures with as many tokens, such as 768x1360 and 1360x768, are one profile, which has a note of it.

    Raises:
        BadProfileError: a profile is malformed, equal to another, or not to be made of this graph.
    """
    made: list[tuple[list[_Wanted], Profile]] = []
    for wanted in _wanted(profiles, plain, symbols, input_shapes):
        try:
            profile = make_profile(input_shapes, symbols, **wanted.options, fp8_attention=fp8_attention, keys=keys)
            if fp8_attention and not short_allowed:
                minima = {name: low for name, (low, _, _) in profile.inputs.items()}
                require_tokens(minima, input_shapes, symbols, keys)
        except BadProfileError as error:
            raise BadProfileError(wanted.lead(str(error))) from None
        profile = replace(profile, notes=tuple(map(wanted.lead, profile.notes)), label=wanted.label or profile.label)
        served = next((served for served, other in made if other.inputs == profile.inputs), None)
        if served is None:
            made.append(([wanted], profile))
        else:
            _require_other_pictures(wanted, served)
            served.append(wanted)
    return tuple(replace(profile, notes=(*profile.notes, *_serves(served))) for served, profile in made)


def _require_other_pictures(wanted: _Wanted, served: Sequence[_Wanted]) -> None:
    """Refuse a profile whose shapes are those of others, unless it is of pictures of other sides than theirs."""
    for other in served:
        one, another = (each.options.get("resolution") for each in (wanted, other))
        if one is None or another is None or pictures_of(one) == pictures_of(another):
            raise BadProfileError(f"{wanted.label} is equal to {other.label}; leave one of them out")


def _serves(served: Sequence[_Wanted]) -> Iterator[str]:
    """Yield a line for each profile that another one serves too."""
    for other in served[1:]:
        yield f"{other.label}: pictures of as many tokens as those of {served[0].label}, whose profile serves them too"


def _wanted(
    profiles: Asked | Sequence[Asked],
    plain: Mapping[str, Any],
    symbols: Mapping[str, Mapping[str, Any]],
    input_shapes: Mapping[str, InputShape],
) -> Iterator[_Wanted]:
    """Yield the options of each profile."""
    each = (profiles,) if isinstance(profiles, str | Mapping) else tuple(profiles)
    if not each:
        yield _Wanted(dict(plain))
    for asked in each:
        pairs = _pairs(asked)
        label = f"--profile {' '.join(key + '=' + as_text('--' + key, value) for key, value in pairs)!r}"
        try:
            own = _options(pairs)
        except BadProfileError as error:
            raise BadProfileError(f"{label}: {error}") from None
        named = _named(own, symbols)
        kept = (shape for shape in _shapes(plain["shapes"]) if not _dimensions(shape, input_shapes) & named)
        yield _Wanted({**plain, **own, "shapes": (*kept, *own.get("shapes", ()))}, label)


def _pairs(asked: Asked) -> list[tuple[str, Any]]:
    """Return the keys, as the command line has them, and values of a profile.

    Raises:
        BadProfileError: malformed.
    """
    if isinstance(asked, str):
        words = [word.partition("=") for word in asked.split()]
        wrong = [repr("".join(word)) for word in words if not (word[0] and word[2])] if words else ["nothing"]
        if wrong:
            raise BadProfileError(f"--profile {asked!r}: found {wrong[0]}; expected KEY=VALUE, such as {_EXAMPLE}")
        return [(key, value) for key, _, value in words]
    keys = {argument: key for key, argument in _ARGUMENTS.items()}
    pairs = ((keys.get(name, str(name)), value) for name, value in asked.items() if value is not None)
    return [
        pair
        for key, value in pairs
        for pair in ([(key, shape) for shape in _shapes(value)] if key == "shape" else [(key, value)])
    ]


def _options(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a profile as arguments of `make_profile`."""
    options: dict[str, Any] = {}
    for key, value in pairs:
        if key not in _ARGUMENTS:
            raise BadProfileError(f"there is no key {key!r}; expected one of: {', '.join(_ARGUMENTS)}")
        if key == "shape":
            options["shapes"] = (*options.get("shapes", ()), value)
        elif _ARGUMENTS[key] in options:
            raise BadProfileError(f"{key} is given twice; expected it once, as one value or MIN:OPT:MAX")
        else:
            options[_ARGUMENTS[key]] = value
    return options


def _named(own: Mapping[str, Any], symbols: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the symbols and inputs that a profile itself says something of: plain shapes of these do not count."""
    given = {f"--{key}" for key, argument in _ARGUMENTS.items() if argument in own}
    if "--reference-images" in given:  # they are tokens of what --resolution sets
        given.add("--resolution")
    named = (name for name, symbol in symbols.items() if given & {*OPTIONS.get(str(symbol.get("kind")), ())})
    return {*named, *(shape.partition("=")[0] for shape in own.get("shapes", ()))}


def _dimensions(shape: str, input_shapes: Mapping[str, InputShape]) -> set[int | str | None]:
    """Return the symbol, or the input and its symbols, that a --shape says something of."""
    name = shape.partition("=")[0]
    return {name, *input_shapes.get(name, ())}


def _shapes(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
