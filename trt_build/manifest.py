"""The JSON beside an engine: what was asked and what was built, and whether that answers a new request.

It holds no time and no absolute path, so that a moved or repeated build keeps its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4trt.errors import OutputExistsError
from fp4trt.file_output import naming, partial_path
from fp4trt.number_formats import FP8, NVFP4
from trt_build.graph import Graph

__all__ = [
    "answering_manifest",
    "check_output",
    "describes",
    "file_sha256",
    "graph_sha256",
    "make_request",
    "manifest_path",
    "read_manifest",
    "write_manifest",
]

_FORMAT = 1
_CHUNK = 8 << 20


def manifest_path(engine: Path) -> Path:
    """Return the path of an engine's manifest: rtx5090.engine -> rtx5090.json."""
    return engine.with_suffix(".json")


def graph_sha256(graph: Graph) -> str:
    """Return the SHA-256 over model.onnx and then, in graph order, every external byte range it uses."""
    digest = hashlib.sha256(graph.path.read_bytes())
    for piece in graph.external_ranges:
        _add_range(digest, piece.file, piece.offset, piece.length)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file."""
    digest = hashlib.sha256()
    _add_range(digest, path, 0, path.stat().st_size)
    return digest.hexdigest()


def make_request(
    onnx_sha256: str,
    *,
    gpus: list[str],
    compute_capabilities: list[str],
    backend: str,
    tensorrt_version: str,
    profiles: Sequence[dict[str, list[list[int]]]],
    weight_streaming: bool,
    promised: Mapping[str, Sequence[str]],
    promised_attentions: Sequence[str],
) -> dict[str, Any]:
    """Return all that decides an engine's bytes and the verdict on it; equal requests are answered by one engine.

    `profile` is the first, as it was before there could be several, which `profiles` has all of.
    """
    return {
        "onnx_sha256": onnx_sha256,
        "gpus": gpus,
        "compute_capabilities": compute_capabilities,
        "backend": backend,
        "tensorrt_version": tensorrt_version,
        "profile": profiles[0],
        "promised_fp4": list(promised.get(NVFP4.name, ())),
        "promised_fp8": list(promised.get(FP8.name, ())),
        "promised": {kind: list(paths) for kind, paths in promised.items()},
        "promised_attentions": list(promised_attentions),
        "flags": {"strongly_typed": True, "weight_streaming": weight_streaming},
        **({"profiles": list(profiles)} if len(profiles) > 1 else {}),
    }


def read_manifest(engine: Path) -> dict[str, Any] | None:
    """Return the manifest beside an engine; None where there is none, or it is not one of fp4trt's."""
    try:
        found = json.loads(manifest_path(engine).read_bytes())
    except (OSError, ValueError):
        return None
    ours = isinstance(found, dict) and found.get("kind") == "fp4trt engine" and found.get("format") == _FORMAT
    return found if ours else None


def answering_manifest(engine: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest beside an engine when the engine is whole and was built for the same request."""
    found = read_manifest(engine)
    if found is None or found.get("request") != request or not describes(found, engine):
        return None
    return found


def check_output(engine: Path, graph: Graph, *, force: bool) -> None:
    """Refuse an output path that would cost the user something.

    An engine that its own manifest describes is ours to replace. Any other file needs `force`; the model, its
    external data and a JSON file that is no engine manifest (a checkpoint's config.json) are never replaced.

    Raises:
        OutputExistsError
    """
    if engine.suffix == ".json" or engine.is_dir():
        raise OutputExistsError(f"{engine} cannot be an engine; name a file such as rtx5090.engine")
    if engine.exists() and not engine.is_file():
        raise OutputExistsError(f"{engine} is not a regular file, which --force does not replace; name another file")
    if engine.exists() and any(
        path.samefile(engine) for path in (graph.path, *{piece.file for piece in graph.external_ranges})
    ):
        raise OutputExistsError(f"{engine} is a part of the model; name another file")
    beside = manifest_path(engine)
    found = read_manifest(engine)
    if found is None and beside.exists():
        raise OutputExistsError(f"{beside} exists and is not an engine's manifest; name another engine file")
    if engine.exists() and not force and not (found and describes(found, engine)):
        raise OutputExistsError(f"{engine} exists and was not built by fp4trt, or has changed; replace it with --force")


def write_manifest(engine: Path, request: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Write NAME.json.partial beside an engine, synced, and return the manifest; the caller renames it."""
    content = {
        "kind": "fp4trt engine",
        "format": _FORMAT,
        "engine": engine.name,
        "request": request,
        **result,
    }
    beside = manifest_path(engine)
    with naming(beside), partial_path(beside).open("w", encoding="utf-8", newline="\n") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    return content


def describes(manifest: dict[str, Any], engine: Path) -> bool:
    """Whether an engine is, byte for byte, the one that a manifest was written of."""
    return (
        engine.is_file()
        and engine.stat().st_size == manifest.get("engine_bytes")
        and file_sha256(engine) == manifest.get("engine_sha256")
    )


def _add_range(digest: hashlib._Hash, path: Path, offset: int, length: int) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        while length > 0 and (chunk := file.read(min(_CHUNK, length))):
            digest.update(chunk)
            length -= len(chunk)
