"""What a picture's file says of how it was made: the same command gives the same bytes, so no time and no path."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fp4trt.safetensors_file import sha256_of
from fp4trt.version import __version__
from generation.generate.request import Drawn, Request
from generation.pipelines import Model

__all__ = ["described", "parameters_of"]

_PACKAGES: Final = ("torch", "diffusers", "transformers")


def described(
    model: Model,
    request: Request,
    drawn: Drawn,
    *,
    pipeline: str | None,
    loras: Sequence[tuple[Path, float]],
    second: Model | None = None,
) -> dict[str, Any]:
    """Return what the metadata hold under ``fp4trt``, as JSON.

    Args:
        model: that drew it.
        request: what was asked for.
        drawn: what came of it.
        pipeline: the class; None of a model without one.
        loras: files and strengths.
        second: the pipeline's second transformer.
    """
    files = {**{file.name: sha256_of(file) for file in request.pictures}}
    found = {
        "prompt": drawn.wanted.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": drawn.wanted.seed,
        "steps": drawn.steps,
        "guidance": drawn.guidance,
        "true_cfg_scale": request.true_cfg_scale,
        "size": list(drawn.pictures[0].size),
        "frames": len(drawn.pictures) if drawn.kind == "video" else None,
        "pictures": files or None,
        "mask": None if request.mask is None else {request.mask.name: sha256_of(request.mask)},
        "model": _of_model(model),
        "second_model": None if second is None else _of_model(second),
        "pipeline": pipeline,
        "loras": [{"file": file.name, "strength": strength, "sha256": sha256_of(file)} for file, strength in loras],
        "versions": _versions(model),
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


def parameters_of(described: Mapping[str, Any]) -> str:
    """Return the line ``parameters`` that other programs' readers of metadata show."""
    model = described["model"]
    negative = f"\nNegative prompt: {described['negative_prompt']}" if "negative_prompt" in described else ""
    width, height = described["size"]
    settings = {
        "Steps": described["steps"],
        "CFG scale": described.get("guidance"),
        "Seed": described["seed"],
        "Size": f"{width}x{height}",
        "Model": model["name"],
        "Model hash": _hash_of(model["hashes"]),
        "Version": f"fp4trt {__version__}",
    }
    line = ", ".join(
        f"{key}: {value:g}" if isinstance(value, float) else f"{key}: {value}"
        for key, value in settings.items()
        if value is not None
    )
    return f"{described['prompt']}{negative}\n{line}"


def _hash_of(hashes: Mapping[str, str]) -> str | None:
    """Return the beginning of the hash of a graph, an engine, or the weights."""
    kinds = ("engine", "graph", "diffusion_pytorch_model", "weights")
    found = (digest for kind in kinds for name, digest in hashes.items() if name.startswith(kind))
    return next(found, "")[:10] or None


def _of_model(model: Model) -> dict[str, Any]:
    place = model.path.resolve()
    in_folder = not model.runs_in_torch or place.name.startswith("transformer")
    name = f"{place.parent.name}/{place.name}" if in_folder else place.name
    found = {"name": name, "kind": model.kind, "family": model.family.name, "recipe": model.recipe}
    return {key: value for key, value in found.items() if value is not None} | {"hashes": dict(model.hashes)}


def _versions(model: Model) -> dict[str, str]:
    packages = (*_PACKAGES, *(("onnxruntime",) if model.kind == "onnx" else ()))
    found = {"fp4trt": __version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
