"""The names that publishers, and ComfyUI, give a family's tensors in single files, against those of diffusers.

A file of this kind fuses q, k and v (and FLUX.1's MLP) into one linear, and holds shift before scale where diffusers
has scale before shift. Either way a tensor of diffusers is some rows of a tensor of the file, so that a table of names
is all that a conversion needs. Sources: diffusers' ``loaders/single_file_utils.py``; the tests run its converters.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Config", "Original", "Part", "SingleFile", "block"]

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

_LAST: Final = "<last>"
"""In a pattern: the index of the last block."""


@dataclass(frozen=True)
class Part:
    """A tensor of diffusers as it lies in a tensor of a single file.

    Attributes:
        name: of the tensor of diffusers.
        shape: its shape there.
        row: of the file's tensor, at which it begins.
        swapped: whether its halves of rows lie the other way round.
    """

    name: str
    shape: tuple[int, ...]
    row: int = 0
    swapped: bool = False


@dataclass(frozen=True)
class Original:
    """A tensor of a single file: its shape, and the tensors of diffusers that it is made of, in order."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def is_stored_as(self, shape: tuple[int, ...]) -> bool:
        """Return whether a stored shape holds the same numbers in the same order."""
        return shape == self.shape or shape == (math.prod(self.shape),)


@dataclass(frozen=True, eq=False)
class SingleFile:
    """How a family's tensors are named in single files.

    Attributes:
        names: pattern of a module's or a tensor's name in the file to the patterns of what it is made of in diffusers,
            in the order of its rows; ``*`` stands for the same text on both sides. What no pattern fits has the same
            name on both sides. The first that fits decides.
        key: a tensor that only files of this family have.
        swapped: patterns of names of diffusers whose halves of rows are swapped; ``<last>`` is the last block's index.
        ignored: prefixes of tensors that belong to the model's training, or to other models in the same file.
        sizes: key of the config to where its value is found: (tensor of diffusers, axis).
        counts: key of the config to a tensor of diffusers that each block has, with ``*`` for the index.
        present: key of the config to a tensor that is there where it is true.
        published: name of a published model to its config, as far as it decides names, shapes and the graph.
    """

    names: Mapping[str, tuple[str, ...]]
    key: str
    swapped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, Config] = field(default_factory=dict)

    def layout(self, state: Shapes) -> dict[str, Original]:
        """Return name to tensor of a single file that holds a model of these tensors of diffusers."""
        found: dict[str, dict[int, str]] = {}
        for name in state:
            original, index = self.place_of(name)
            found.setdefault(original, {})[index] = name
        swapped = {pattern.replace(_LAST, _last_block(state, pattern)) for pattern in self.swapped}
        return {
            original: _original([parts[index] for index in sorted(parts)], state, swapped)
            for original, parts in found.items()
        }

    def place_of(self, name: str) -> tuple[str, int]:
        """Return what a tensor of diffusers is called in a single file, and its index among the parts there."""
        path, dot, leaf = name.rpartition(".")
        for pattern, original, index in _inverted(self):
            if (found := pattern.fullmatch(name)) is not None:
                return _filled(original, found), index
            if (found := pattern.fullmatch(path)) is not None:
                return f"{_filled(original, found)}{dot}{leaf}", index
        return name, 0


@functools.cache
def _inverted(table: SingleFile) -> tuple[tuple[re.Pattern[str], str, int], ...]:
    return tuple(
        (re.compile(re.escape(part).replace(r"\*", "(.+)")), original, index)
        for original, parts in table.names.items()
        for index, part in enumerate(parts)
    )


def _filled(pattern: str, found: re.Match[str]) -> str:
    """Return a pattern with its stars replaced by what was found."""
    pieces = iter(found.groups())
    return re.sub(r"\*", lambda _: next(pieces), pattern)


def _original(parts: Sequence[str], state: Shapes, swapped: Container[str]) -> Original:
    """Return the tensor that holds some of diffusers' as its rows."""
    placed, row = [], 0
    for name in parts:
        shape = state[name]
        placed.append(Part(name, shape, row, name.rpartition(".")[0] in swapped))
        row += shape[0] if shape else 0
    first = state[parts[0]]
    return Original((row, *first[1:]) if len(parts) > 1 else first, tuple(placed))


def _last_block(state: Shapes, pattern: str) -> str:
    """Return the index of the last block of the list that a pattern speaks of; empty where it speaks of none."""
    before, found, _ = pattern.partition(f".{_LAST}.")
    names = (re.match(rf"{re.escape(before)}\.(\d+)\.", name) for name in state) if found else ()
    return str(max((int(match[1]) for match in names if match is not None), default=""))


def block(original: str, path: str, names: Mapping[str, tuple[str, ...] | str]) -> dict[str, tuple[str, ...]]:
    """Return the patterns of a block from those inside it.

    Args:
        original: path of the block in the file, with ``*`` for its index, or for its list and index.
        path: the same in diffusers.
        names: name in the file to one name, or to all that are fused, in diffusers; both in the block.
    """

    def inside() -> Iterator[tuple[str, tuple[str, ...]]]:
        for name, parts in names.items():
            yield f"{original}.{name}", tuple(f"{path}.{p}" for p in ((parts,) if isinstance(parts, str) else parts))

    return dict(inside())
