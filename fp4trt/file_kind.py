"""What a file is that cannot be read as what it should be: by its first bytes, or by what lies in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["is_file", "shortened", "what_it_is", "what_it_lacks"]

_KINDS: Final = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file that it stands for: run git lfs pull"),
    (b"GGUF", "is a GGUF file, which is read as a source in 16 bit alone: take the model's safetensors"),
    (b"PK\x03\x04", "is a zip archive, as torch.save writes, which fp4trt does not read: save it as safetensors"),
    (b"\x80\x02", "is a pickle, which fp4trt does not read: save it as safetensors"),
    (b"\x80\x04", "is a pickle, which fp4trt does not read: save it as safetensors"),
    (b"\x80\x05", "is a pickle, which fp4trt does not read: save it as safetensors"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"<!doctype html", "is a web page, not the file: download it again"),
    (b"<html", "is a web page, not the file: download it again"),
)
"""First bytes, in lower case where they are letters of a page, to what the file is and what to do."""

_LONGEST: Final = 120
"""Characters of somebody else's name that a message repeats."""


def what_it_is(path: Path) -> str | None:
    """Return what a file is, and what to do, where its first bytes tell that it is not JSON, ONNX or safetensors."""
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin:
        return "is empty: copy or download it again"
    if begin[8:9] == b"{":  # safetensors, whose length may begin like anything
        return None
    for magic, kind in _KINDS:
        if begin.startswith(magic) or begin.lstrip().lower().startswith(magic):
            return kind
    return None


def what_it_lacks(path: Path) -> str:
    """Return why a path is not a file that could be read: nothing is there yet, or a folder, a device, a pipe is."""
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except ValueError:  # a zero byte
        return "has a name that no file can have"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if path.is_dir():
        return "is a folder"
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist: the download is not complete, run it again"
    if path.exists():
        return "is not a regular file"
    # Where huggingface_hub, and others by the file's own name, keep what has not arrived whole.
    places = (path.parent, path.parent / ".cache" / "huggingface" / "download")
    begun = [found for place in places for found in place.glob("*.incomplete") if found.name.startswith(path.stem)]
    if begun:
        return f"does not exist, and {begun[0].name} is there: the download is not complete, run it again"
    return "does not exist"


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
