"""Files that are to be read: what a message says of one that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["is_file", "shortened", "what_it_lacks"]

_LONGEST: Final = 120
"""Characters of somebody else's name that a message repeats."""


def what_it_lacks(path: Path) -> str:
    """Return why a path is no file that could be read: nothing is there, or a folder, a device, a pipe is."""
    try:
        path.stat()
    except FileNotFoundError:
        return "does not exist"
    except ValueError:  # a zero byte
        return "has a name that no file can have"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "is a folder" if path.is_dir() else "is not a regular file"


def is_file(path: Path) -> bool:
    """Return whether a path is a file; one that no file can be called by is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def shortened(name: str) -> str:
    """Return a name on one line, without its middle where it is too long for a message."""
    line = name if name.isprintable() else ascii(name)[1:-1]
    return line if len(line) <= _LONGEST else f"{line[:80]}...{line[-20:]} ({len(name)} characters)"
