"""Whether a result fits on its disk, and how much is read and written, said before a long run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from fp4trt.errors import TooLittleSpace
from fp4trt.progress import note

__all__ = ["WORTH_SAYING", "foresee", "readable_size"]

WORTH_SAYING: Final = 1_000_000_000
"""Bytes of a source that takes long enough to say first what is going to happen."""


def foresee(folder: Path, reads: int, needed: int) -> None:
    """Say, before a long run, how many bytes it reads and writes.

    Args:
        folder: where the result is going to lie.
        reads: bytes of the source.
        needed: bytes still to be written.

    Raises:
        TooLittleSpace: the result does not fit on its disk.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TooLittleSpace(
            f"{folder} has {readable_size(free)} free, the result needs {readable_size(needed)}; make room, or "
            "choose another --output"
        )
    if reads >= WORTH_SAYING:
        note(f"reading {readable_size(reads)}, writing {readable_size(needed)} ({readable_size(free)} are free)")


def readable_size(count: int) -> str:
    """Return a number of bytes for people."""
    unit, name = next((unit for unit in ((1e9, "GB"), (1e6, "MB")) if count >= unit[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"
