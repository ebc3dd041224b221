"""Writing results: beside their place first, then renamed; errors name the path, and a failure leaves nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

__all__ = ["all_or_none", "check_writable", "made_folder", "naming", "partial_path", "write_texts"]


def partial_path(path: Path) -> Path:
    """Return the name that a result has until it is complete."""
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that names no file, as a full disk raises, this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; those that were made go again when something is raised.

    Raises:
        OSError: it cannot be made; the error names the path.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        _remove(missing)
        raise


def check_writable(path: Path) -> None:
    """Raise the OSError that writing a file would raise, whose folder need not exist; leave nothing behind."""
    folder = path.parent
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        with made_folder(folder):
            _probe(path)
    finally:
        _remove(missing)


def _probe(path: Path) -> None:
    """Write an empty file beside a path, of a name of its own: a partial file there may be somebody's."""
    try:
        handle, probe = tempfile.mkstemp(dir=path.parent)
    except OSError as error:
        error.filename = str(partial_path(path))
        raise
    os.close(handle)
    Path(probe).unlink()


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write files, UTF-8 with plain newlines, all of them or none: synced, then renamed.

    Raises:
        OSError: one cannot be written; the error names it.
    """
    with all_or_none(texts) as partials:
        for path, partial in partials.items():
            with naming(path), partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())


@contextlib.contextmanager
def all_or_none(paths: Iterable[Path]) -> Iterator[dict[Path, Path]]:
    """Give each file a name to be written under, and its own once all are complete; those of a failure are removed."""
    partials = {path: partial_path(path) for path in paths}
    try:
        yield partials
        for path, partial in partials.items():
            os.replace(partial, path)
    finally:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _remove(folders: list[Path]) -> None:
    """Remove folders, innermost first, as far as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
