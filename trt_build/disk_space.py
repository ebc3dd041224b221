"""Whether an engine can be written where it is asked for, known before anything is compiled."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fp4trt.errors import EngineWriteError
from fp4trt.file_output import check_writable
from trt_build.memory import size_text

__all__ = ["require_room"]

_MOST_FOLDED: Final = 8
"""How much smaller than in the graph weights may lie in an engine: FP32 ones that the builder folds to FP4."""


def require_room(engine: Path, weight_bytes: int) -> Iterator[str]:
    """Refuse a folder that an engine cannot be written into; yield a warning where it may not fit.

    Args:
        engine: the file; its folder need not exist.
        weight_bytes: of the graph, which the engine holds.

    Raises:
        EngineWriteError: the disk is too full for even the smallest engine.
        OSError: the folder cannot be written; the error names the file.
    """
    check_writable(engine)
    free = shutil.disk_usage(next(folder for folder in engine.parents if folder.exists())).free
    has = f"{engine.parent} has {size_text(free)} free, and the engine holds {size_text(weight_bytes)} of weights"
    if free <= weight_bytes // _MOST_FOLDED:
        raise EngineWriteError(f"{has}: make room, or choose another --output")
    if free < weight_bytes:
        yield f"warning: {has}: it may not fit"
