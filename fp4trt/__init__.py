"""What all rooms share: the front door, model families, what a quantized checkpoint is. No torch, no numpy.

This package imports no room, and every room may import it; the command names the rooms as strings and loads one when a
sub-command of it is called.
"""

from __future__ import annotations

from fp4trt.cli import COMMANDS, EXTRAS, Entry, main, run
from fp4trt.version import __version__

__all__ = ["COMMANDS", "EXTRAS", "Entry", "__version__", "main", "run"]
