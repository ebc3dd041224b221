"""Folders that are slow to make and never changed, made once: shared by the workers of a run and kept for later runs.

A folder is made anew when the sources, the pinned versions or the file that makes it change.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "test-folders"
ROOMS = ("calibration", "exporter", "fp4trt", "generation", "onnx_functions")

SharedFolder = Callable[[str, Callable[[Path], object]], Path]


@functools.cache
def sources() -> bytes:
    """Return the hash of all that can change what a folder holds."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*")) if "__pycache__" not in path.parts]
    digest = hashlib.sha256()
    for path in (*files, ROOT / "constraints.txt", ROOT / "tests" / "conftest.py"):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


def _state(folder: Path) -> str:
    """Return the name, size and time of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = ((path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return json.dumps([list(fact) for fact in facts])


def _made(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder of this name; make it if nobody has, or if what is there is not as it was left."""
    key = hashlib.sha256(sources() + Path(inspect.getfile(make)).read_bytes()).hexdigest()[:12]
    folder, state = KEPT / name / key, KEPT / name / f"{key}.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / f"{name}.lock"):
        if not (state.is_file() and folder.is_dir() and state.read_text(encoding="utf-8") == _state(folder)):
            for old in _but_the_last_of_other_sources(folder):
                shutil.rmtree(old)
                old.with_suffix(".json").unlink(missing_ok=True)
            folder.mkdir()
            make(folder)
            state.write_text(_state(folder), encoding="utf-8")
    return folder


def _but_the_last_of_other_sources(folder: Path) -> list[Path]:
    """Return what is there of a folder, and of its older selves, but for the newest: a run may still read that."""
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    older = sorted(others, key=lambda path: path.stat().st_mtime_ns)[:-1]
    return [*older, *([folder] if folder.is_dir() else [])]


@pytest.fixture(scope="session")
def shared_folder(shared_traces: None) -> Iterator[SharedFolder]:
    """Return what makes a folder of a name once; ``make`` fills the empty folder that it is given."""
    used: set[Path] = set()

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        folder = _made(name, make)
        used.add(folder)
        return folder

    yield shared
    changed = [folder for folder in used if folder.with_suffix(".json").read_text(encoding="utf-8") != _state(folder)]
    assert changed == [], "a test changed a folder that others read"
