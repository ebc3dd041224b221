"""Files that are to be read: what a message says of one that is none."""

from __future__ import annotations

from pathlib import Path

__all__ = ["what_it_lacks"]


def what_it_lacks(path: Path) -> str:
    """Return why a path is no file that could be read: nothing is there, or a folder, a device, a pipe is."""
    if path.is_dir():
        return "is a folder"
    return "is not a regular file" if path.exists() else "does not exist"
