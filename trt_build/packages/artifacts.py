"""What is handed over: a graph with its external data, or an engine with its JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.errors import UnfitArtifact
from fp4trt.linked_files import real_file
from fp4trt.pipeline_folder import graph_in
from fp4trt.progress import note
from trt_build.graph import Graph, read_graph
from trt_build.manifest import describes, graph_sha256, manifest_path, read_manifest
from trt_build.memory import GIB, size_text
from trt_build.packages.contracts import TITLES, Program
from trt_build.signature import Signature, signature_in

__all__ = ["Engine", "data_of", "fingerprint", "graph_of", "is_engine", "open_engine", "open_graph"]

_MODEL: Final = "model.onnx"
_ASKED: Final = {"onnx_sha256", "backend", "tensorrt_version", "compute_capabilities", "profile", "promised"}
"""What an engine's JSON has to tell of the request."""


@dataclass(frozen=True)
class Engine:
    """An engine that is, byte for byte, what its JSON tells of.

    Attributes:
        path: its file.
        manifest: the JSON beside it.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def backend(self) -> str:
        """The package that built it: ``tensorrt_rtx`` or ``tensorrt``."""
        return str(self.manifest["request"]["backend"])

    @property
    def version(self) -> str:
        """The version of that package."""
        return str(self.manifest["request"]["tensorrt_version"])

    @property
    def promised(self) -> Mapping[str, Sequence[str]]:
        """Linears by number format."""
        promised: Mapping[str, Sequence[str]] = self.manifest["request"]["promised"]
        return promised

    @property
    def shapes(self) -> Mapping[str, Sequence[Sequence[int]]]:
        """Minimum, optimum and maximum of each input in the first profile, which programs choose that choose none."""
        shapes: Mapping[str, Sequence[Sequence[int]]] = self.manifest["request"]["profile"]
        return shapes

    @property
    def is_static(self) -> bool:
        """Whether that profile has one size alone."""
        return all(low == best == high for low, best, high in self.shapes.values())

    def signature(self, graph: Path | None = None) -> Signature:
        """Return its inputs and outputs, of its JSON or else of its graph (see :func:`graph_of`)."""
        return signature_in(self.manifest) or graph_of(self, graph).signature


def is_engine(path: Path) -> bool:
    """Whether a path is a file that is called an engine, or has an engine's JSON beside it."""
    with_json = path.suffix not in (".onnx", ".json") and read_manifest(path) is not None
    return path.is_file() and (path.suffix == ".engine" or with_json)


def open_engine(path: Path) -> Engine:
    """Return an engine, all of which is read, and hashed.

    Args:
        path: for which :func:`is_engine` holds.

    Raises:
        UnfitArtifact: it has no JSON beside it, or is not the one that this describes.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise UnfitArtifact(
            f"{path} has no {manifest_path(path).name} of fp4trt build beside it; expected an engine with its JSON"
        )
    if not manifest.get("request", {}).keys() >= _ASKED:
        raise UnfitArtifact(
            f"{manifest_path(path)} is of an earlier version of fp4trt, or damaged; build {path.name} again"
        )
    _say_hashing(path.name, path.stat().st_size)
    if not describes(manifest, path):
        raise UnfitArtifact(f"{path} is not the engine that {manifest_path(path).name} describes; build it again")
    return Engine(path, manifest)


def graph_of(engine: Engine, path: Path | None) -> Graph:
    """Return the graph that an engine was built from, with all of its weights.

    Args:
        engine: the engine.
        path: the ONNX file or its folder; None for the ``model.onnx`` beside the engine.

    Raises:
        UnfitArtifact: it is not there, or is another.
        BadModelError: it, or its external data, cannot be used.
    """
    place = path or engine.path.parent
    if path is None and not graph_in(place).is_file():
        raise UnfitArtifact(
            f"{engine.path} has no {_MODEL} beside it; name the graph that it was built from with --graph"
        )
    graph = read_graph(place)
    _say_hashing(graph.path.name, graph.weight_bytes)
    if graph_sha256(graph) != engine.manifest["request"]["onnx_sha256"]:
        raise UnfitArtifact(
            f"{engine.path} was built from another graph, or other weights, than {graph.path}; build it again"
        )
    return graph


def _say_hashing(name: str, count: int) -> None:
    if count > GIB:
        note(f"hashing {size_text(count)} of {name}, to see that it is what the engine's JSON describes")


def open_graph(path: Path, program: Program) -> Graph:
    """Return a graph.

    Raises:
        UnfitArtifact: the path is no graph's.
        BadModelError: the graph cannot be used.
    """
    if path.is_file() and path.suffix != ".onnx":
        raise UnfitArtifact(f"{path} is no graph, which {TITLES[program]} takes; give an ONNX file, or its folder")
    return read_graph(path)


def data_of(graph: Graph) -> dict[str, Path]:
    """Return the files of a graph's external data: the name below the graph's folder to the file, links followed.

    Raises:
        BadModelError: one is missing, too short, or lies elsewhere.
    """
    folder = graph.path.parent
    names = {span.file.relative_to(folder).as_posix(): None for span in graph.external_ranges}
    found = {name: real_file(folder, name) for name in names}
    return {name: file for name, file in found.items() if file is not None}


def fingerprint(graph: Graph) -> str:
    """Return eight digits that tell a graph and its checkpoint from others, for the names of what is built of them."""
    digest = hashlib.sha256(graph.path.read_bytes())
    manifest = graph.path.with_name(MANIFEST)
    if manifest.is_file():  # which has the hashes of the weights
        digest.update(manifest.read_bytes())
    return digest.hexdigest()[:8]
