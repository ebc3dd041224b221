"""Where an unquantized checkpoint lies; found without torch, unless LoRA files are fused into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibration.checkpoints import hub
from calibration.lora.option import parse_lora
from fp4trt.built_in import BUILT_IN, path_of
from fp4trt.errors import BadCheckpoint, BadLora, BadOption
from fp4trt.file_kind import what_it_lacks
from fp4trt.make_source import make_source_folder
from fp4trt.pipeline_folder import transformer_folder
from fp4trt.single_files.opening import SUFFIXES

__all__ = ["find_source", "names_a_file"]


def find_source(
    source: str | Path, like: str | Path | None = None, lora: str | Path | Sequence[str | Path] = ()
) -> Path:
    """Return the folder of a transformer: config.json beside its weights.

    Args:
        source: a folder with diffusion_pytorch_model*.safetensors, a pipeline's folder with a ``transformer``
            sub-folder, ``digits`` for the built-in model, a single file (:mod:`fp4trt.single_files`), for which a small
            folder is made that stands for it, or the name of a hub repository (``OWNER/NAME``, or
            ``OWNER/NAME/FILE``), which is taken from the hub's cache or downloaded.
        like: of a single file: a config.json, a folder with one, or the name of a published model
            (:func:`fp4trt.single_files.opening.config_like`), where the shapes do not tell its config.
        lora: one or several files that are fused into the weights as they are read, as ``FILE`` or ``FILE:STRENGTH``
            (:mod:`calibration.lora`).

    Raises:
        BadCheckpoint: there is none.
        BadLora: a LoRA is damaged, or is another model's.
        BadOption: ``like`` is given for something else than a single file.
    """
    found = _found(source, like)
    loras = [parse_lora(str(one)) for one in ((lora,) if isinstance(lora, str | Path) else lora)]
    if absent := next((path for path, _ in loras if not path.is_file()), None):
        raise BadLora(f"{absent} {what_it_lacks(absent)}; expected a LoRA file there")
    if not loras and found.is_dir():
        return found
    return make_source_folder(found, like, loras)


def _found(source: str | Path, like: str | Path | None) -> Path:
    """Return a single file, or the folder of a transformer."""
    folder = path_of(source)
    if folder.is_file():
        return folder
    if not folder.is_dir() and folder.suffix in SUFFIXES and not names_a_file(source):
        raise BadCheckpoint(f"{source} {what_it_lacks(folder)}; expected a single file there")
    if like is not None and not names_a_file(source):
        raise BadOption(f"like is {str(like)!r}, which gives a single file its config; {source} has its own: drop it")
    if folder.is_dir():
        found = transformer_folder(folder)
        config = found / "config.json"
        if not config.is_file():
            lacks = what_it_lacks(config)
            if not lacks.startswith("does not exist"):
                raise BadCheckpoint(f"{config} {lacks}; expected that of a diffusers checkpoint")
            lacks = lacks.removeprefix("does not exist")
            raise BadCheckpoint(
                f"{folder} has no config.json (nor transformer/config.json){lacks}; expected a diffusers checkpoint"
            )
        return found
    if names_a_file(source):
        return hub.file_of(str(source))
    if str(source).count("/") == 1 and not folder.is_absolute():
        return hub.transformer_of(str(source))
    raise BadCheckpoint(
        f"{source} is not a folder or file here; expected a diffusers checkpoint, a single file, a hub name or "
        f"'{BUILT_IN}'"
    )


def names_a_file(source: str | Path) -> bool:
    """Return whether a source is the name of a file in a repository of the hub."""
    place = Path(source)
    is_repository = len(place.parts) > 2 and not place.is_absolute() and not place.parent.exists()
    return is_repository and place.suffix in SUFFIXES and not str(source).startswith((".", "~"))
