"""Which blocks, and at which sizes, a validation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fp4trt.errors import BadSelection

__all__ = ["Blocks", "Tokens", "chosen_blocks", "token_counts"]

Blocks = int | Sequence[str] | str
"""How many blocks of each stack, or their module paths; as the command line has it, a string of either."""

Tokens = tuple[int, int] | str
"""Image and text tokens; as the command line has it, ``IMAGE,TEXT``."""


def chosen_blocks(blocks: Sequence[str], asked: Blocks | None) -> tuple[str, ...]:
    """Return the blocks to check, in the order in which they run.

    The first block of each stack and the last of all are always among them: what they hand on tells which tensors of
    the graph lie between the other blocks, and before what follows.

    Args:
        blocks: module paths of all blocks, in the order in which they run.
        asked: how many of each stack, spread evenly; or module paths; None for all.

    Raises:
        BadSelection: it is neither.
    """
    if asked is None:
        return tuple(blocks)
    stacks = [list(stack) for _, stack in groupby(blocks, lambda path: path.rpartition(".")[0])]
    wanted = {stack[0] for stack in stacks} | {blocks[-1]}
    if isinstance(asked, str):
        asked = int(asked) if asked.isdecimal() and int(asked) else [path.strip() for path in asked.split(",")]
    if isinstance(asked, bool | float) or (isinstance(asked, int) and asked < 1):
        raise BadSelection(f"--blocks is {asked}; expected a number above 0, or paths, as {blocks[0]}")
    if isinstance(asked, int):
        wanted |= {path for stack in stacks for path in _spread(stack, asked)}
        return tuple(path for path in blocks if path in wanted)
    for path in asked:
        if path not in blocks:
            raise BadSelection(
                f"--blocks: '{path}' is not a block of this model; give a number or paths, as {blocks[0]}"
            )
        wanted.add(path)
    return tuple(path for path in blocks if path in wanted)


def _spread(stack: Sequence[str], count: int) -> set[str]:
    steps = max(1, min(count, len(stack)) - 1)
    return {stack[index * (len(stack) - 1) // steps] for index in range(min(count, len(stack)))}


def token_counts(asked: Tokens | None) -> tuple[int, int] | None:
    """Return image and text tokens; None for None.

    Raises:
        BadSelection: it is something else, or the two are equal, so that one stream could be taken for the other.
    """
    if asked is None:
        return None
    given = asked.split(",") if isinstance(asked, str) else asked if isinstance(asked, Sequence) else ()
    parts = [str(part).strip() for part in given]
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise BadSelection(f"--tokens is '{asked}'; expected image and text tokens above 0, such as 512,128")
    image, text = (int(part) for part in parts)
    if image == text:
        raise BadSelection(f"--tokens is '{asked}'; expected unlike numbers: one stream could be taken for the other")
    return image, text
