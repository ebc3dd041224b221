"""Make the folder that stands for a single file, or for a source with LoRAs (:mod:`fp4trt.source_folder`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fp4trt.built_in import path_of
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadEnvironment
from fp4trt.fused_tensors import fused, named
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import index_of, transformer_folder
from fp4trt.progress import note
from fp4trt.safetensors_file import sha256_of
from fp4trt.single_files.opening import config_beside, config_like, open_file
from fp4trt.source_folder import SOURCE, Lora, Source

__all__ = ["cache_folder", "folder_of", "make_source_folder"]


def cache_folder() -> Path:
    """Return where fp4trt keeps what it can make again: ``$FP4TRT_CACHE``, else ``fp4trt`` in the user's cache."""
    if given := os.environ.get("FP4TRT_CACHE"):
        return Path(given)
    local = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(local) if local else Path.home() / ".cache") / "fp4trt"


def make_source_folder(weights: Path, like: str | Path | None = None, loras: Sequence[tuple[Path, float]] = ()) -> Path:
    """Return the folder that stands for a single file, or for anything with LoRAs, and say how it is read.

    Args:
        weights: safetensors or GGUF, or the folder of a transformer.
        like: of a single file: what :func:`fp4trt.single_files.opening.config_like` takes; None finds the config by the
            shapes.
        loras: (file, strength), in the order in which they are fused.

    Raises:
        BadCheckpoint, UnknownFamily: a file is damaged, quantized, of no known model, or not of this config.
        BadLora: a LoRA is, or is another model's.
    """
    if weights.is_dir():
        config, tensors = load_json(weights / "config.json"), tensors_in_folder(weights)
    else:
        opened = open_file(weights, config_like(like) if like is not None else config_beside(weights))
        config, tensors = opened.config, dict(opened.tensors)
        note(f"{weights.name}: {config['_class_name']} under {opened.described}")
    found = tuple(Lora(path.resolve(), strength, sha256_of(path)) for path, strength in loras)
    source = Source(weights.resolve(), found, _in_place_of(weights, like))
    if loras:
        changed = fused(source, tensors, config)
        note(f"{named(found)}: {len(changed.makers)} of {len(tensors)} tensors are changed as they are read")
        if changed.left_out:
            counted = ", ".join(f"{count} of {begin}" for begin, count in changed.left_out.items())
            note(f"keys that are left out: {counted}")
        source = replace(source, loras=tuple(lora for lora in found if lora.strength))
    texts = {"config.json": config, SOURCE: source.described()}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / "sources" / f"{weights.stem or weights.name}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in texts.items():
            beside = folder / f"{name}.{os.getpid()}"
            beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, folder / name)
    except OSError as error:
        raise BadEnvironment(
            f"{cache_folder()} cannot be written to ({error.strerror}); name another folder in FP4TRT_CACHE"
        ) from None
    return folder


def _in_place_of(weights: Path, like: str | Path | None) -> Path | None:
    """Return the transformer's folder in a pipeline that the weights are of, or the config is from."""
    if weights.is_dir():
        places: tuple[Path, ...] = (weights,)
    elif like is None:
        return None
    else:
        places = (Path(like) / "transformer", Path(like), Path(like).parent)
    found = (each for each in places if (each / "config.json").is_file() and index_of(each.parent) is not None)
    return next((each.resolve() for each in found), None)


def folder_of(artifact: str | Path) -> Path:
    """Return the folder of a transformer: a folder, that in a pipeline's, or one that stands for a single file.

    Raises:
        BadCheckpoint: it is a pipeline's without a transformer, or as :func:`make_source_folder`.
    """
    path = path_of(artifact)
    return make_source_folder(path) if path.is_file() else transformer_folder(path)
