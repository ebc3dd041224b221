"""The files that pictures, layers, videos and sound are written to."""

from __future__ import annotations

import glob
import json
import os
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fp4trt.errors import BadOption
from fp4trt.file_output import all_or_none, check_writable, naming
from fp4trt.publish import refuse_existing
from generation.generate.metadata import parameters_of
from generation.generate.request import Drawn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SUFFIXES", "refuse_output", "write"]

SUFFIXES: Final = (".png", ".webp")
"""Suffixes of image files. A video is an animated one, or a folder of PNGs."""

_DESCRIPTION: Final = 0x010E
"""EXIF's ImageDescription."""


def refuse_output(output: Path, count: int, force: bool) -> None:
    """Refuse an output before anything is drawn.

    Args:
        output: a file, or a folder.
        count: of pictures.
        force: replace files that are there.

    Raises:
        BadOption: it is a file of another kind.
        OutputExists: a file is there.
        OSError: nothing can be written there.
    """
    if output.suffix and not output.is_dir() and output.suffix.lower() not in SUFFIXES:
        raise BadOption(f"-o {output} is a {output.suffix} file; expected one of {', '.join(SUFFIXES)}, or a folder")
    for index in range(count):
        place = _place(output, index, count)
        made = [
            path
            for kind in ("frame", "layer")
            for path in place.parent.glob(f"{glob.escape(place.stem)}-{kind}-*{place.suffix}")
        ]
        for file in (place, place.with_suffix(".wav"), *sorted(made)):
            if os.path.lexists(file):
                refuse_existing(file, force)
    check_writable(_place(output, 0, count))


def _place(output: Path, index: int, count: int) -> Path:
    """Return where a picture goes: NAME-3.png of several, FOLDER/image-3.png in a folder."""
    if output.is_dir() or not output.suffix:
        return output / f"image-{index}.png"
    return output if count == 1 else output.with_name(f"{output.stem}-{index}{output.suffix}")


def write(
    output: Path, index: int, count: int, drawn: Drawn, said: Mapping[str, Any], *, rate: float, force: bool
) -> list[Path]:
    """Write what was drawn, all its files or none, and return them, the sound's last.

    Args:
        output: as the user named it: a file, or a folder, into which a video goes frame by frame.
        index: among all that is drawn.
        count: of all that is drawn.
        drawn: the picture, the layers, or the video.
        said: its metadata.
        rate: frames a second, of a video in one file.
        force: replace files that are there.

    Raises:
        OutputExists: a file is there.
    """
    place = _place(output, index, count)
    whole = drawn.kind == "picture" or (drawn.kind == "video" and not (output.is_dir() or not output.suffix))
    if whole:
        files: dict[Path, Sequence[Image.Image]] = {place: drawn.pictures}
    else:
        names = {"layers": "layer", "video": "frame"}
        stem = f"{place.stem}-{names[drawn.kind]}"
        files = {
            place.with_name(f"{stem}-{number:04d}{place.suffix}"): (picture,)
            for number, picture in enumerate(drawn.pictures)
        }
    sound = place.with_suffix(".wav") if drawn.sound is not None else None
    for file in (*files, *((sound,) if sound is not None else ())):
        refuse_existing(file, force)
    with all_or_none((*files, *((sound,) if sound is not None else ()))) as partials:
        for file, pictures in files.items():
            _save(partials[file], file.suffix.lower(), pictures, said, rate)
        if sound is not None:
            _save_sound(partials[sound], drawn)
    return [*files, *((sound,) if sound is not None else ())]


def _save(path: Path, suffix: str, pictures: Sequence[Image.Image], said: Mapping[str, Any], rate: float) -> None:
    options: dict[str, Any] = {}
    if len(pictures) > 1:
        options = {"save_all": True, "append_images": list(pictures[1:]), "duration": 1000 / rate, "loop": 0}
    save: Callable[..., None] = pictures[0].save
    with naming(path):
        if suffix == ".png":
            save(path, format="PNG", pnginfo=_text(said), **options)
        else:
            exif = Image.Exif()
            exif[_DESCRIPTION] = json.dumps(said, sort_keys=True)
            save(path, format="WEBP", lossless=True, exif=exif, **options)


def _text(said: Mapping[str, Any]) -> PngInfo:
    """Return the chunks of text: ``parameters``, as other programs have it, and ``fp4trt``, JSON."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_of(said))
    info.add_itxt("fp4trt", json.dumps(said, sort_keys=True, ensure_ascii=False))
    return info


def _save_sound(path: Path, drawn: Drawn) -> None:
    """Write sound as a WAV file in 16 bits."""
    assert drawn.sound is not None
    samples, rate = drawn.sound
    values = (np.clip(samples.T, -1, 1) * 32767).round().astype("<i2")
    with naming(path), wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
