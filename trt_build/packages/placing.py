"""Fill a folder: hard links to what is large where the file system has them, copies otherwise, and what is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fp4trt.errors import TooLittleSpace
from fp4trt.file_output import naming
from fp4trt.progress import PATIENCE_S, tracking
from fp4trt.verb import Result
from trt_build.memory import size_text

__all__ = ["ALIGNMENT", "Content", "Copied", "Joined", "Linked", "Placed", "Written", "place"]

_CHUNK: Final = 8 << 20

ALIGNMENT: Final = 4096
"""Bytes, a multiple of which each part of a joined file begins at."""


@dataclass(frozen=True)
class Linked:
    """A file that is large, and that no program writes to: copied, or linked to where that is asked for.

    Attributes:
        source: the file.
        is_data: whether it is external data of a graph, which some readers refuse where a file has two names.
    """

    source: Path
    is_data: bool = False


@dataclass(frozen=True)
class Copied:
    """A small file, a copy of another."""

    source: Path


@dataclass(frozen=True)
class Joined:
    """Files one after another, each at a multiple of :data:`ALIGNMENT`."""

    sources: tuple[Path, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each begins."""
        found, end = [], 0
        for source in self.sources:
            found.append(end + -end % ALIGNMENT)
            end = found[-1] + source.stat().st_size
        return tuple(found)


@dataclass(frozen=True)
class Written:
    """A file with these bytes."""

    data: bytes


Content = Linked | Copied | Joined | Written


@dataclass(frozen=True, eq=False)
class Placed(Result):
    """A file of a package.

    Attributes:
        name: below the folder, with ``/``.
        bytes: its size.
        how: ``linked``, ``copied``, or ``written``.
    """

    name: str
    bytes: int
    how: str


def place(folder: Path, contents: Mapping[str, Content], *, link: bool) -> list[Placed]:
    """Write the files of a package into a folder that has none of them.

    Args:
        folder: where.
        contents: name to content.
        link: make hard links of large files where that is possible.

    Raises:
        TooLittleSpace: what has to be copied does not fit on the disk.
        OSError: naming the file.
    """
    how: dict[str, str] = {}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Linked) and link and _linked(content.source, folder / name):
            how[name] = "linked"
    rest = {name: content for name, content in contents.items() if name not in how}
    needed = sum(source.stat().st_size for content in rest.values() for source in _sources(content))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TooLittleSpace(
            f"{folder.parent} has {size_text(free)} free, and {size_text(needed)} have to be copied; make room, or "
            "choose another --output"
        )
    with tracking(needed, "copying", PATIENCE_S) as advance:
        for name, content in rest.items():
            how[name] = "written" if isinstance(content, Written) else "copied"
            _write(folder / name, content, advance)
    return [Placed(name, (folder / name).stat().st_size, how[name]) for name in contents]


def _sources(content: Content) -> Sequence[Path]:
    if isinstance(content, Written):
        return ()
    return content.sources if isinstance(content, Joined) else (content.source,)


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name, where its file system can; a link's own file gets it."""
    try:
        os.link(source.resolve(), target)
    except (OSError, NotImplementedError):  # another disk, no such links there, or too many
        return False
    return True


def _write(target: Path, content: Content, advance: Callable[[int], object]) -> None:
    """Write a file, synced."""
    with naming(target), target.open("wb") as file:
        if isinstance(content, Written):
            file.write(content.data)
        offsets = content.offsets if isinstance(content, Joined) else (0,)
        for source, offset in zip(_sources(content), offsets, strict=False):
            file.write(b"\0" * (offset - file.tell()))
            with source.open("rb") as part:
                while chunk := part.read(_CHUNK):
                    file.write(chunk)
                    advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
