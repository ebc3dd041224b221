"""Options of the commands that read a 16-bit source."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

__all__ = ["LIKE", "LORA"]

LIKE: Final = click.option(
    "--like",
    type=click.Path(path_type=Path),
    metavar="CONFIG|NAME",
    help="The config of a single file's model, where its shapes do not tell it: a config.json, a folder with one (a "
    "pipeline's, too), or the name of a published model, such as 'Qwen-Image'.",
)
"""As :func:`calibration.checkpoints.plain.find_source` takes it."""

LORA: Final = click.option(
    "--lora",
    multiple=True,
    metavar="FILE[:STRENGTH]",
    help="A LoRA file that is fused into the weights as they are read; more than once for several, in that order.  "
    "[strength: 1]",
)
"""Likewise."""
