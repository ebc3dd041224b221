"""The config of a single file's model, from the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from fp4trt.errors import BadCheckpoint, UnknownFamily
from fp4trt.families import family_of
from fp4trt.single_files.names import Config, SingleFile
from fp4trt.single_files.tables import SINGLE_FILES

__all__ = ["config_of", "fits", "published_config"]

Shapes = Mapping[str, tuple[int, ...]]

_WIDTH: Final = "width"
"""In :attr:`SingleFile.sizes`: heads times channels of a head."""


def published_config(name: str) -> dict[str, Any] | None:
    """Return the config of a published model by its name, as `--like` takes it, or None; case does not count."""
    known = {key.casefold(): config for table in SINGLE_FILES.values() for key, config in table.published.items()}
    found = known.get(name.casefold())
    return None if found is None else dict(found)


def config_of(where: str, table: SingleFile, shapes: Shapes, name_in_file: Callable[[str], str]) -> dict[str, Any]:
    """Return the config of the model whose tensors have these shapes.

    It is that of a published model, with the sizes and the numbers of blocks that the shapes tell. What they cannot
    tell is the published model's, so that only a file that fits it in every tensor is taken.

    Args:
        where: the file, for messages.
        table: the names of its class.
        shapes: of its tensors, by their names in the file.
        name_in_file: (name of a tensor of diffusers) to its name in the file.

    Raises:
        BadCheckpoint: no config fits, or several do that make other models.
    """
    fitting: dict[str, dict[str, Any]] = {}
    for name, published in table.published.items():
        config = _adapted(table, published, shapes, name_in_file)
        if config is not None and fits(table, config, shapes, name_in_file):
            fitting[name] = config
    exact = {name: config for name, config in fitting.items() if config == dict(table.published[name])}
    fitting = exact or fitting
    distinct = {str(sorted(config.items())) for config in fitting.values()}
    names = " or ".join(f"'{name}'" for name in fitting or table.published)
    if not fitting:
        raise BadCheckpoint(
            f"{where} is a {_class_name(table)} of other sizes or tensors than its published models ({names}), whose "
            "config its shapes alone do not tell; give the config.json of its diffusers model with --like, or put it "
            "beside"
        )
    if len(distinct) > 1:
        raise BadCheckpoint(f"{where} has the shapes of {names}, which compute differently; say which with --like")
    return next(iter(fitting.values()))


def _class_name(table: SingleFile) -> str:
    return str(next(iter(table.published.values()))["_class_name"])


def _adapted(
    table: SingleFile, published: Config, shapes: Shapes, name_in_file: Callable[[str], str]
) -> dict[str, Any] | None:
    """Return a published config with the sizes that the shapes tell, None where one of them is not there."""
    config, found = dict(published), {}
    for key, (name, axis) in table.sizes.items():
        shape = shapes.get(name_in_file(name))
        if shape is None or axis >= len(shape):
            return None
        found[key] = shape[axis]
    width = found.pop(_WIDTH, None)
    config |= {key: value for key, value in found.items() if key != "out_channels" or value != found["in_channels"]}
    if width is not None:
        config["num_attention_heads"] = width // config["attention_head_dim"]
    for key, pattern in table.counts.items():
        config[key] = _count(shapes, name_in_file, pattern)
    for key, name in table.present.items():
        config[key] = name_in_file(name) in shapes
    return config


def _count(shapes: Shapes, name_in_file: Callable[[str], str], pattern: str) -> int:
    """Return how many blocks have a tensor."""
    return sum(1 for _ in _consecutive(shapes, name_in_file, pattern))


def _consecutive(shapes: Shapes, name_in_file: Callable[[str], str], pattern: str) -> Iterator[str]:
    index = 0
    while (name := name_in_file(re.sub(r"\*", str(index), pattern))) in shapes:
        yield name
        index += 1


def fits(table: SingleFile, config: Config, shapes: Shapes, name_in_file: Callable[[str], str]) -> bool:
    """Return whether a file has the tensors of a config's model, all of them in their shapes, and no others."""
    try:
        state = family_of(config).state(config)
    except (BadCheckpoint, UnknownFamily):
        return False
    if all(name_in_file(name) == name for name in state):
        return dict(shapes) == state
    layout = table.layout(state)
    return shapes.keys() == layout.keys() and all(layout[name].is_stored_as(shape) for name, shape in shapes.items())
