"""A pipeline's text encoders, which are loaded when a prompt is met whose embeddings are not known."""

from __future__ import annotations

import gc
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import PIPELINE
from generation.generate.embedding_cache import EmbeddingCache, identity_of_files

__all__ = ["TextEncoders", "encoder_parts"]

_READING: Final = ("text_encoder", "tokenizer", "processor")
"""How the parts begin that make embeddings of a prompt."""


def encoder_parts(root: Path) -> tuple[str, ...]:
    """Return the text encoders that a pipeline's folder has."""
    index = load_json(root / PIPELINE)
    return tuple(
        part
        for part, entry in index.items()
        if part.startswith("text_encoder") and isinstance(entry, list) and (root / part).is_dir()
    )


class _NotLoaded:
    """What stands in a pipeline for a text encoder: the little that is read of it elsewhere than in encoding."""

    def __init__(self, device: torch.device) -> None:
        self.dtype, self.device = torch.bfloat16, device


class TextEncoders:
    """Encodes the prompts of a pipeline in place of its own ``encode_prompt``, which it calls where it has to.

    Args:
        pipe: a pipeline that was loaded without its text encoders.
        root: its folder.
        device: where they compute.
        keep: whether they stay in memory for the next prompt.
        on_disk: whether embeddings are kept for later runs.

    Attributes:
        loaded: how often they were loaded.
        cache: of embeddings.
    """

    def __init__(self, pipe: Any, root: Path, device: torch.device, *, keep: bool, on_disk: bool) -> None:
        self._pipe, self._root, self._device, self._keep = pipe, root, device, keep
        self._parts = encoder_parts(root)
        self._own = pipe.encode_prompt
        self.loaded = 0
        self.cache = EmbeddingCache(_identity(pipe, root, device), on_disk)
        self.release()
        pipe.encode_prompt = self._encode

    def _encode(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the pipeline's ``encode_prompt`` returns."""
        bound = inspect.signature(self._own).bind(*args, **kwargs)
        bound.apply_defaults()
        key = self.cache.key({name: value for name, value in bound.arguments.items() if name != "device"})
        found = self.cache.get(key, self._device)
        if found is None:
            self._load()
            found = self._own(*args, **kwargs)
            self.cache.put(key, found)
            if not self._keep:
                self.release()
        return found

    def _load(self) -> None:
        absent = [part for part in self._parts if isinstance(getattr(self._pipe, part), _NotLoaded)]
        self.loaded += bool(absent)
        index = load_json(self._root / PIPELINE)
        for part in absent:
            library, name = index[part]
            made = getattr(importlib.import_module(library), name)
            encoder = made.from_pretrained(self._root / part, dtype=torch.bfloat16)
            setattr(self._pipe, part, encoder.eval().to(self._device))

    def release(self) -> None:
        """Let the encoders go."""
        for part in self._parts:
            setattr(self._pipe, part, _NotLoaded(self._device))
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _identity(pipe: Any, root: Path, device: torch.device) -> dict[str, str]:
    """Return all that decides what the encoders make of the same call."""
    import diffusers
    import transformers

    return {
        "pipeline": type(pipe).__name__,
        "files": identity_of_files(root, _reading_parts(root)),
        "device": device.type,
        "dtype": "bfloat16",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
    }


def _reading_parts(root: Path) -> Sequence[str]:
    return [path.name for path in root.iterdir() if path.is_dir() and path.name.startswith(_READING)]
