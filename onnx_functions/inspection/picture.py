"""What a PNG file that ``fp4trt generate`` wrote says of how it was made."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import UnknownArtifact

__all__ = ["is_picture", "picture"]

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_KEYWORD: Final = b"fp4trt"
_LARGEST: Final = 1 << 20
"""Bytes of text that are taken for ours."""


def is_picture(path: Path) -> bool:
    """Return whether a file is a PNG."""
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


def picture(path: Path) -> dict[str, Any]:
    """Return what the metadata hold under ``fp4trt``, with ``kind`` and ``path``.

    Raises:
        UnknownArtifact: they hold nothing of fp4trt's, or are damaged.
    """
    try:
        texts = [text for text in _texts(path) if text.startswith(_KEYWORD + b"\0")]
        found = json.loads(_text_of(texts[0])) if texts else None
    except (struct.error, ValueError, zlib.error) as error:
        raise UnknownArtifact(f"{path} is a damaged PNG file ({error}); generate it again") from None
    if not isinstance(found, dict) or "prompt" not in found:
        raise UnknownArtifact(
            f"{path} is a PNG file that says nothing of fp4trt; expected one that fp4trt generate wrote"
        )
    return {"kind": "picture", "path": str(path.resolve()), **found}


def _texts(path: Path) -> Iterator[bytes]:
    """Yield the contents of the chunks iTXt, which stand before the picture's."""
    with path.open("rb") as file:
        file.seek(len(_SIGNATURE))
        while header := file.read(8):
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IDAT":
                return
            if kind == b"iTXt" and length <= _LARGEST:
                yield file.read(length)
                file.seek(4, 1)
            else:
                file.seek(length + 4, 1)


def _text_of(chunk: bytes) -> str:
    """Return the text behind keyword, compression, language and translated keyword."""
    rest = chunk[len(_KEYWORD) + 1 :]
    compressed, rest = rest[0], rest[2:]
    text = rest.split(b"\0", 2)[2]
    return (zlib.decompress(text) if compressed else text).decode("utf-8")
