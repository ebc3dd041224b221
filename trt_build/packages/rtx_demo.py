"""The cache of TensorRT-RTX's demo (NVIDIA/TensorRT-RTX, demo/flux1.dev): a graph, and the engine of it.

The demo takes an ONNX file that is there in place of the one that it would download, and an engine whose metadata say
that it was built by the demo's own version of TensorRT-RTX for the sizes that are asked for. Any other it deletes, and
builds its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import UnfitArtifact
from trt_build.packages.artifacts import Engine, data_of, graph_of, is_engine, open_engine, open_graph
from trt_build.packages.contracts import TITLES, Contract
from trt_build.packages.fit import extents_in, fit_of, picture_of
from trt_build.packages.placing import Content, Copied, Linked, Written
from trt_build.packages.plan import PROMPT, TOKEN, Asked, Plan, require_plain, shell_line

__all__ = ["plan_for_rtx_demo"]

_PROGRAM: Final = "rtx-demo"
_WHERE: Final = "in a clone of NVIDIA/TensorRT-RTX"


def plan_for_rtx_demo(artifact: Path, folder: Path, asked: Asked) -> Plan:
    """Return the plan of a cache.

    Args:
        artifact: a graph, its folder, or an engine of TensorRT-RTX.
        folder: the cache, absolute.
        asked: ``variant``, which may be None or ``dev``, and ``graph``.

    Raises:
        UnfitArtifact, and what opening a graph raises.
    """
    engine = open_engine(artifact) if is_engine(artifact) else None
    if engine is not None:
        _require_rtx(engine)
    opened = graph_of(engine, asked.graph) if engine is not None else open_graph(artifact, _PROGRAM)
    contract, precision = fit_of(opened, _PROGRAM, asked.variant)
    cache = require_plain(folder, _PROGRAM)
    model = contract.model
    onnx = f"shared/onnx/{model}/{precision}/{model}.onnx"
    contents: dict[str, Content] = {onnx: Copied(opened.path)}
    contents |= {
        f"{Path(onnx).parent.as_posix()}/{name}": Linked(file, is_data=True) for name, file in data_of(opened).items()
    }
    words = ["--hf-token", TOKEN, "--precision", precision, "--cache-dir", cache, "--prompt", PROMPT]
    notes: list[str] = []
    if engine is not None:
        mode, sizes = _mode(engine, contract, cache)
        beside = f"shared/engines/{model}/{precision}/{model}_{mode}"
        contents[f"{beside}.engine"] = Linked(engine.path)
        contents[f"{beside}.metadata.json"] = Written(_metadata(engine, model, precision, onnx))
        words += sizes
        notes += _notes(engine, mode)
    command = shell_line("python", "demo/flux1.dev/flux_demo.py", *words)
    return Plan(contents, command, _WHERE, model, precision, notes)


def _require_rtx(engine: Engine) -> None:
    if engine.backend != "tensorrt_rtx":
        raise UnfitArtifact(
            f"{engine.path} is an engine of {engine.backend}, and {TITLES[_PROGRAM]} runs those of TensorRT for RTX: "
            "build one with --gpu rtx5090"
        )


def _mode(engine: Engine, contract: Contract, cache: str) -> tuple[str, list[str]]:
    """Return whether the demo takes an engine as static or dynamic, and the options that ask for its sizes."""
    extents = extents_in(str(engine.path), engine.shapes, contract)
    batch, tokens = extents["B"][1], extents["L"][1]
    picture = picture_of(tokens, contract.sides)
    if picture is None:
        raise UnfitArtifact(
            f"{engine.path} is for {tokens} image tokens, which no picture of {contract.sides[0]} to "
            f"{contract.sides[1]} pixels has: build it with another --resolution"
        )
    sizes = ["--height", str(picture[0]), "--width", str(picture[1]), "--batch-size", str(batch)]
    if engine.is_static:
        return "static", sizes
    if "_static." in cache:  # by which the demo knows the others
        raise UnfitArtifact(
            f"{cache} has '_static.' in its path, by which {TITLES[_PROGRAM]} would take a dynamic engine for a static "
            "one; choose another --output"
        )
    return "dynamic", [*sizes, "--dynamic-shape"]


def _metadata(engine: Engine, model: str, precision: str, onnx: str) -> bytes:
    """Return what the demo writes beside an engine that it has built: without the time, which it does not read."""
    shapes = {name: extent[0] if engine.is_static else extent for name, extent in engine.shapes.items()}
    found: Mapping[str, Any] = {
        "model_name": model,
        "precision": precision,
        "onnx_path": onnx,
        "input_shapes": shapes,
        "extra_args": [],
        "build_timestamp": 0.0,
        "tensorrt_version": engine.version,
    }
    return (json.dumps(found, indent=2) + "\n").encode()


def _notes(engine: Engine, mode: str) -> Iterator[str]:
    yield (
        f"the engine is taken by TensorRT-RTX {engine.version} alone, on {', '.join(_capabilities(engine))}; another "
        "version deletes it and builds its own from the graph"
    )
    if mode == "static":
        yield "the engine is static: for other sizes than those of the command the demo deletes it and builds its own"
    profiles = len(engine.manifest["request"].get("profiles", ())) or 1
    if profiles > 1:
        yield f"of the engine's {profiles} profiles the demo runs the first"


def _capabilities(engine: Engine) -> list[str]:
    return [str(name) for name in engine.manifest["request"]["compute_capabilities"]]
