"""Black Forest Labs' flux (black-forest-labs/flux, src/flux/trt): the folder of one of its ONNX repositories.

Its command line looks for ``checkpoints/REPOSITORY`` and downloads what is missing there: a ``model.onnx`` and its
``backbone.onnx_data`` that are there already it takes. It builds no engine where one of the name is there, whatever it
was built of, so that the command has a folder of engines that is named after the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import onnx

from fp4trt.errors import UnfitArtifact
from onnx_functions.graph.external_data import span_of
from trt_build.graph import Graph, tensors_of
from trt_build.packages.artifacts import data_of, fingerprint, is_engine, open_graph
from trt_build.packages.contracts import TITLES, Contract, Variant
from trt_build.packages.fit import fit_of
from trt_build.packages.placing import Content, Joined, Linked, Written
from trt_build.packages.plan import PROMPT, Asked, Plan, require_plain, shell_line

__all__ = ["plan_for_bfl"]

_PROGRAM: Final = "bfl"
_WHERE: Final = "in a clone of black-forest-labs/flux"
_DATA: Final = "backbone.onnx_data"

_REPOSITORIES: Final[Mapping[Variant, str]] = {
    "dev": "FLUX.1-dev-onnx",
    "schnell": "FLUX.1-schnell-onnx",
    "canny": "FLUX.1-Canny-dev-onnx",
    "depth": "FLUX.1-Depth-dev-onnx",
    "kontext": "FLUX.1-Kontext-dev-onnx",
}

_FLUX: Final = ("python", "-m", "flux")
_CONTROL: Final = (*_FLUX, "control", "--img_cond_path", "PICTURE", "--static_shape=False", "--name")
_RUNS: Final[Mapping[Variant, Sequence[str]]] = {
    "dev": (*_FLUX, "t2i", "--name", "flux-dev"),
    "schnell": (*_FLUX, "t2i", "--name", "flux-schnell"),
    "canny": (*_CONTROL, "flux-dev-canny"),
    "depth": (*_CONTROL, "flux-dev-depth"),
    "kontext": (*_FLUX, "kontext", "--img_cond_path", "PICTURE"),
}
_BY_VARIABLE: Final = ("canny", "depth")
"""Those whose command reads the environment variable CUSTOM_ONNX_PATHS; the others overwrite it."""


def plan_for_bfl(artifact: Path, folder: Path, asked: Asked) -> Plan:
    """Return the plan of a repository's folder.

    Args:
        artifact: a graph, or its folder.
        folder: where, absolute.
        asked: ``variant``.

    Raises:
        UnfitArtifact, and what opening a graph raises.
    """
    if is_engine(artifact):
        raise UnfitArtifact(
            f"{artifact} is an engine, and {TITLES[_PROGRAM]} builds its own: give the graph that it was built from"
        )
    graph = open_graph(artifact, _PROGRAM)
    contract, precision = fit_of(graph, _PROGRAM, asked.variant)
    inside = f"transformer.opt/{precision}"
    files = data_of(graph)
    joined = Joined(tuple(files.values()))
    starts = dict(zip(files, joined.offsets, strict=True))
    contents: dict[str, Content] = {f"{inside}/model.onnx": Written(_with_one_file(graph, starts))}
    if len(files) == 1:
        contents[f"{inside}/{_DATA}"] = Linked(joined.sources[0], is_data=True)
    else:  # where none is there, the program would download its own
        contents[f"{inside}/{_DATA}"] = joined
    command, notes = _command(contract, precision, folder, fingerprint(graph))
    return Plan(contents, command, _WHERE, contract.model, precision, notes)


def _with_one_file(graph: Graph, starts: Mapping[str, int]) -> bytes:
    """Return the graph with all of its external data in one file.

    Args:
        graph: the graph.
        starts: each of its files to where it begins in the one.
    """
    folder = graph.path.parent
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for tensor in tensors_of(model.graph):
        span = span_of(tensor, folder)
        if span is not None:
            start = starts[span.file.relative_to(folder).as_posix()]
            del tensor.external_data[:]
            for key, value in (("location", _DATA), ("offset", start + span.offset), ("length", span.length)):
                tensor.external_data.add(key=key, value=str(value))
    return model.SerializeToString(deterministic=True)


def _command(contract: Contract, precision: str, folder: Path, named: str) -> tuple[str, Sequence[str]]:
    """Return the command line, and notes on it."""
    asks = ("--trt", "--trt_transformer_precision", precision, "--prompt", PROMPT)
    engines = {"TRT_ENGINE_DIR": f"checkpoints/trt_engines_{named}"}
    told = "the other models are downloaded; TensorRT builds the engines at the first run"
    if contract.variant in _BY_VARIABLE:
        path = require_plain(folder / f"transformer.opt/{precision}/model.onnx", _PROGRAM, ":,")
        words = (*_RUNS[contract.variant], *asks)
        return shell_line(*words, CUSTOM_ONNX_PATHS=f"transformer:{path}", **engines), [told]
    repository = f"checkpoints/black-forest-labs_{_REPOSITORIES[contract.variant]}"
    link = f"mkdir -p checkpoints && {shell_line('ln', '-sT', str(folder), repository)}"
    move = f"where {repository} exists already, move transformer.opt/{precision} into it in place of the link"
    return f"{link} && {shell_line(*_RUNS[contract.variant], *asks, **engines)}", [told, move]
