"""A folder for what is finished of a long run: known by its mark, there after a kill, gone when all is done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4trt.errors import OutputExists
from fp4trt.folder_lock import alone
from fp4trt.progress import note
from fp4trt.publish import discard, write_json

__all__ = ["work_folder", "write_mark"]


@contextlib.contextmanager
def work_folder(
    folder: Path, mark: str, resume: Callable[[], bool], begin: Callable[[], None], keeps: Callable[[], str]
) -> Iterator[None]:
    """Give a scratch folder that is deleted on success; move what you want to keep out of it first.

    It stays where the process was killed, and, with something worth it, where it was interrupted or the system failed.

    Args:
        folder: is made, with its parents; one that an earlier run left is taken over.
        mark: name of the file that tells a folder of ours from one of the user's; :func:`write_mark` writes it.
        resume: whether what is there is of the same run, which can resume.
        begin: writes the mark into a new folder.
        keeps: what would be lost with the folder, in a few words; empty where that is nothing.

    Raises:
        OutputExists: the folder is there and is none of ours, or another command works in it.
    """
    with alone(folder):
        yield from _work_folder(folder, mark, resume, begin, keeps)


def _work_folder(
    folder: Path, mark: str, resume: Callable[[], bool], begin: Callable[[], None], keeps: Callable[[], str]
) -> Iterator[None]:
    if folder.exists() and not _is_ours(folder, mark):
        raise OutputExists(f"{folder} is in the way and was not written by fp4trt; move it, or choose another --output")
    missing = [path for path in folder.parents if not path.exists()]
    try:
        if not resume():
            discard(folder, mark)
            folder.mkdir(parents=True)
            begin()
        yield
    except (OSError, MemoryError, KeyboardInterrupt):
        if what := keeps():
            note(f"{folder} keeps {what}: the same command resumes from there")
        else:
            _leave_nothing(folder, mark, missing)
        raise
    except BaseException:
        _leave_nothing(folder, mark, missing)
        raise
    discard(folder, mark)


def write_mark(folder: Path, mark: str, value: Mapping[str, Any]) -> None:
    """Write or replace a folder's mark, JSON, in one step."""
    partial = folder / f"{mark}.partial"
    write_json(partial, value)
    os.replace(partial, folder / mark)


def _is_ours(folder: Path, mark: str) -> bool:
    """Whether a killed run left this; the first thing that it writes is the mark's ``.partial``."""
    if not folder.is_dir():
        return False
    return (folder / mark).is_file() or {path.name for path in folder.iterdir()} <= {f"{mark}.partial"}


def _leave_nothing(folder: Path, mark: str, made: Sequence[Path]) -> None:
    """Remove a folder, and those around it that were made for it."""
    discard(folder, mark)
    for path in made:
        with contextlib.suppress(OSError):  # of another's, or with something in it by now
            path.rmdir()
