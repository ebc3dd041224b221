"""Give a finished folder its name, replace only what fp4trt wrote, and resume where a killed run stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fp4trt.checkpoint_manifest import MANIFEST, load_manifest
from fp4trt.errors import BadCheckpoint, OutputExists
from fp4trt.folder_lock import alone
from fp4trt.json_file import load_json
from fp4trt.progress import note
from fp4trt.safetensors_file import naming, sha256_of

__all__ = [
    "discard",
    "forget_progress",
    "note_progress",
    "progress_of",
    "refuse_existing",
    "refuse_foreign",
    "replacing",
    "write_json",
    "write_text",
]

_DERIVED: Final = (
    "model.onnx",
    "model.onnx.data",
    "validation/report.json",
    "validation/report.html",
    "digits.png",
    "demo.json",
    "teacache.yaml",
)
"""What later stages, and the demo, write into a checkpoint's folder."""

_MARK: Final = ".fp4trt-partial"
"""Tells a folder that fp4trt left unfinished from one of the user's; holds the identity of the result."""

_PROGRESS: Final = ".fp4trt-progress.json"


@contextlib.contextmanager
def replacing(directory: Path, force: bool, identity: str = "", ours: Collection[str] = ()) -> Iterator[Path]:
    """Give a ``DIR.partial`` to write into, which becomes ``DIR`` when nothing was raised, and goes otherwise.

    Args:
        directory: the result.
        force: replace one that is there.
        identity: what tells this result from any other, in one line. Whatever an earlier run of the same identity
            left is given again, so that it can resume; and where this one fails, what it has finished (see
            :func:`note_progress`) stays for the next. Empty: every run begins anew.

    Raises:
        OutputExists: as :func:`refuse_foreign`; or ``DIR.partial`` is there and is none of ours, or is in use.
    """
    refuse_foreign(directory, force, ours)
    partial = directory.with_name(f"{directory.name}.partial")
    with alone(partial):
        yield from _replacing(partial, directory, identity)


def _replacing(partial: Path, directory: Path, identity: str) -> Iterator[Path]:
    mark = partial / _MARK
    if partial.exists() and not mark.is_file() and (not partial.is_dir() or any(partial.iterdir())):
        raise OutputExists(
            f"{partial} is in the way and was not written by fp4trt; move it, or choose another --output"
        )
    if not (identity and mark.is_file() and mark.read_text(encoding="utf-8") == identity):
        forget_progress(partial)
        discard(partial, _MARK)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with naming(mark):
            mark.write_text(identity, encoding="utf-8")
        yield partial
        _publish(partial, directory)
        forget_progress(directory)
        (directory / _MARK).unlink()
    finally:
        if identity and (partial / _PROGRESS).exists():
            note(f"{partial} keeps what is finished: the same command resumes from there")
        else:
            discard(partial, _MARK)


def discard(folder: Path, last: str) -> None:
    """Remove a folder of ours, if it is there, and its file ``last`` after all others: by that a later run knows it.

    What the system does not let go stays, and ``last`` with it: this often happens while another error is on its way.
    """
    if not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name != last]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (folder / last).unlink(missing_ok=True)
        folder.rmdir()


def forget_progress(folder: Path) -> None:
    """Let nothing of a :func:`replacing` folder count as finished."""
    for name in (_PROGRESS, f"{_PROGRESS}.partial"):  # the second where a kill met it half-written
        (folder / name).unlink(missing_ok=True)


def note_progress(partial: Path, done: Mapping[str, Any]) -> None:
    """Note what of a :func:`replacing` folder is finished and on disk: from now on it is kept if anything fails."""
    beside = partial / f"{_PROGRESS}.partial"
    write_json(beside, done)
    os.replace(beside, partial / _PROGRESS)


def progress_of(partial: Path) -> dict[str, Any]:
    """Return what an earlier run of the same identity noted last; nothing where there was none."""
    try:
        return load_json(partial / _PROGRESS)
    except BadCheckpoint:
        return {}


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to replace a file, unless ``force`` was given; make the folder that it will stand in.

    Raises:
        OutputExists: naming it.
    """
    if path.is_dir():
        raise OutputExists(f"{path} is a folder; expected a file to write: choose another --output")
    if path.exists() and not path.is_file():
        raise OutputExists(f"{path} is not a regular file, which --force does not replace; choose another --output")
    if path.exists() and not force:
        raise OutputExists(f"{path} exists; choose another --output, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)


def refuse_foreign(directory: Path, force: bool, ours: Collection[str] = ()) -> None:
    """Refuse to replace a folder, and even with ``force`` one that holds anything that fp4trt did not write.

    Args:
        directory: the result.
        force: replace one that is there.
        ours: files that it consists of, besides those that a checkpoint's manifest lists.

    Raises:
        OutputExists: naming the folder, or what is in it.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputExists(f"{directory} is a file; expected a folder to write: choose another --output")
    if not directory.exists():
        return
    if not force:
        raise OutputExists(f"{directory} exists; choose another --output, or replace it with --force")
    manifest = directory / MANIFEST
    known = {MANIFEST, *_DERIVED, *load_manifest(manifest).get("files", {})} if manifest.exists() else set()
    known |= set(ours)
    known |= {_MARK, _PROGRESS} if known else set()  # where a kill met a result that had just got its name
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_dir() and name not in known and not (known and _is_engine(path)):
            raise OutputExists(f"{directory} holds {name}, which fp4trt did not write; choose another --output")


def _is_engine(path: Path) -> bool:
    """Whether a file is an engine with its manifest, that manifest, or a build script of ours."""
    if path.name.endswith(".build.py"):
        return path.read_bytes().startswith(b"# Written by fp4trt")
    if path.suffix not in (".engine", ".json"):
        return False
    engine, beside = path.with_suffix(".engine"), path.with_suffix(".json")
    try:
        return engine.exists() and "engine_sha256" in load_json(beside)
    except BadCheckpoint:
        return False


def _publish(partial: Path, directory: Path) -> None:
    """Give a finished folder its name; what stood there before goes only once the new one is in place."""
    if not directory.exists():
        os.replace(partial, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{directory.name}.old-", dir=directory.parent))
    os.replace(directory, old / directory.name)
    try:
        os.replace(partial, directory)
    except OSError:
        os.replace(old / directory.name, directory)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> str:
    """Write JSON, synced to disk; return its SHA-256."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
    return sha256_of(path)


def write_text(path: Path, text: str) -> None:
    """Write a text, with the same bytes on every system, synced to disk."""
    with naming(path), path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
