"""fp4trt.json, the manifest of a quantized checkpoint, as far as this room and the engine builder rely on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import lists_of_strings, load_json, object_of, strings, strings_by_name
from fp4trt.number_formats import FORMATS

__all__ = ["MANIFEST", "CheckpointManifest", "load_manifest", "read_checkpoint_manifest"]

MANIFEST: Final = "fp4trt.json"


@dataclass(frozen=True)
class CheckpointManifest:
    """What a quantized checkpoint says of itself.

    Attributes:
        family: of the model.
        recipe: name of the recipe.
        method: name of its method.
        formats: name of a number format to the module paths of the linears in it.
        fp8_attentions: module paths of the attentions whose products are in FP8.
        groups: those that share global scales.
        files: file name to SHA-256.
        versions: package to version.
    """

    family: str | None
    recipe: str | None
    method: str | None
    formats: Mapping[str, tuple[str, ...]]
    fp8_attentions: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    files: Mapping[str, str]
    versions: Mapping[str, str]

    def quantized(self, kind: str) -> tuple[str, ...]:
        """Return the linears in a format."""
        return self.formats[kind]


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest | None:
    """Return the manifest of a folder, None where it has none.

    Raises:
        BadCheckpoint: it is damaged, or something else of that name.
    """
    path = folder / MANIFEST
    return _described(path, load_json(path)) if path.is_file() else None


def load_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest as it is in its file, having checked the shape of what is read from it.

    Raises:
        BadCheckpoint: it is damaged.
    """
    manifest = load_json(path)
    _described(path, manifest)
    return manifest


def _described(path: Path, value: Mapping[str, Any]) -> CheckpointManifest:
    try:
        recipe = object_of(value.get("recipe", {}), "recipe")
        quantized = object_of(value.get("quantized", {}), "quantized")
        linears = {name: strings(paths, f"quantized.{name}") for name, paths in quantized.items()}
        attentions = object_of(value.get("attention", {}), "attention")
        return CheckpointManifest(
            family=value.get("family"),
            recipe=recipe.get("name"),
            method=method.get("name") if isinstance(method := recipe.get("method"), dict) else None,
            formats={name: linears.get(name, ()) for name in FORMATS},
            fp8_attentions=strings(attentions.get("fp8", []), "attention.fp8"),
            groups=lists_of_strings(value.get("groups", []), "groups"),
            files=strings_by_name(value.get("files", {}), "files"),
            versions=strings_by_name(value.get("versions", {}), "versions"),
        )
    except TypeError as error:
        raise BadCheckpoint(f"{path} is not a manifest of fp4trt ({error}); quantize again") from None
