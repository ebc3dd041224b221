"""What is wrong with a config, in the words that all families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fp4trt.families.family import Config

__all__ = ["problem_of_blocks", "problem_of_sizes"]

_MOST: Final = 100_000
"""What no size of a model comes near: a config that asks for more is damaged."""

_MOST_BLOCKS: Final = 1000


def problem_of_sizes(config: Config, sizes: Sequence[str], *counts: str) -> str | None:
    """Return what is wrong with the sizes of a config, or None.

    Args:
        config: of the model.
        sizes: keys of whole numbers above 0.
        counts: keys of the numbers of blocks, likewise.
    """
    for key in (*sizes, *counts):
        if type(config.get(key)) is not int or not 0 < config[key] <= _MOST:
            return f"{key} is {config.get(key)!r}, expected a whole number above 0, {_MOST:,} at most"
    if (blocks := sum(config[key] for key in counts)) > _MOST_BLOCKS:
        return f"{' and '.join(counts)} add up to {blocks}, expected {_MOST_BLOCKS} blocks at most"
    return None


def problem_of_blocks(config: Config, sizes: Sequence[str], *counts: str, axes: Any) -> str | None:
    """Return what is wrong with the config of blocks whose attention has rotary positions, or None.

    Args:
        config: of the model.
        sizes: keys of whole numbers above 0.
        counts: keys of the numbers of blocks, likewise.
        axes: sizes of a head's rotary axes, as ``axes_dims_rope`` has them; they add up to ``attention_head_dim``.
    """
    if (wrong := problem_of_sizes(config, sizes, *counts)) is not None:
        return wrong
    width = config["attention_head_dim"]
    if not isinstance(axes, list | tuple) or not axes or any(type(n) is not int or n % 2 for n in axes):
        return f"axes_dims_rope is {axes!r}, expected even numbers"
    if sum(axes) != width:
        return f"axes_dims_rope {list(axes)} adds up to {sum(axes)}, expected attention_head_dim, {width}"
    return None
