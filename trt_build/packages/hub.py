"""A folder for the hub: a quantized checkpoint that is, byte for byte, what its manifest says, and its model card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fp4trt.checkpoint_manifest import MANIFEST, load_manifest
from fp4trt.errors import BadOption, UnfitArtifact
from fp4trt.linked_files import real_file
from fp4trt.pipeline_folder import transformer_folder
from fp4trt.progress import PATIENCE_S, note, tracking
from fp4trt.safetensors_file import sha256_of
from trt_build.graph import read_graph
from trt_build.lint_notes import lint_notes
from trt_build.packages.artifacts import data_of
from trt_build.packages.model_card import Facts, absolute_paths, model_card
from trt_build.packages.placing import Content, Copied, Linked, Written
from trt_build.packages.plan import Asked, Plan, shell_line

__all__ = ["plan_for_hub"]

_GRAPH: Final = "model.onnx"
_CARD: Final = "README.md"
_SAID: Final = ("family", "recipe", "quantized", "calibration", "files", "source", "versions")
"""What a card needs of the manifest."""

_HUB_NAME: Final = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def plan_for_hub(artifact: Path, folder: Path, asked: Asked) -> Plan:
    """Return the plan of a folder for the hub.

    Args:
        artifact: a checkpoint's folder, or a pipeline's.
        folder: where, absolute.
        asked: ``base_model``, ``license`` and ``license_name``.

    Raises:
        BadOption: a name is none.
        UnfitArtifact: the folder is no checkpoint of ``fp4trt quantize``, or a file is not the one that it wrote.
        BadCheckpoint: the manifest is damaged.
        LintError: TensorRT would accept the graph beside it wrongly.
    """
    _require_names(asked)
    source = transformer_folder(artifact)
    if not (source / MANIFEST).is_file():
        raise UnfitArtifact(f"{source} has no {MANIFEST}; expected a checkpoint that fp4trt quantize wrote")
    manifest = load_manifest(source / MANIFEST)
    if missing := [key for key in _SAID if key not in manifest]:
        raise UnfitArtifact(f"{source / MANIFEST} says nothing of {', '.join(missing)}; quantize again")
    files = _files(source, manifest)
    graph = _graph(source, files)
    found = {**files, MANIFEST: source / MANIFEST, **graph}
    sizes = {name: file.stat().st_size for name, file in found.items()}
    facts = Facts(sizes, asked.base_model, asked.license, asked.license_name, has_graph=bool(graph))
    contents: dict[str, Content] = {
        name: Linked(file, is_data=True) if name.endswith(".safetensors") else Copied(file)
        for name, file in found.items()
    }
    contents[_CARD] = Written(_card(source, manifest, facts))
    command = shell_line("hf", "upload", "OWNER/NAME", str(folder), ".")
    return Plan(contents, command, "anywhere, after hf auth login", notes=tuple(_notes(source, manifest, found, asked)))


def _card(source: Path, manifest: Mapping[str, Any], facts: Facts) -> bytes:
    try:
        return model_card(manifest, facts).encode()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnfitArtifact(f"{source / MANIFEST} is not as fp4trt writes it ({error!r}); quantize again") from None


def _require_names(asked: Asked) -> None:
    if asked.base_model is not None and not _HUB_NAME.fullmatch(asked.base_model):
        raise BadOption(
            f"base_model is {asked.base_model!r}; expected a hub name such as 'black-forest-labs/FLUX.1-dev'"
        )
    for name, value in (("license", asked.license), ("license_name", asked.license_name)):
        if value is not None and not _LICENSE.fullmatch(value):
            raise BadOption(f"{name} is {value!r}; expected an identifier such as 'apache-2.0', in small letters")
    if asked.license_name is not None and asked.license != "other":
        raise BadOption(
            f"license_name is {asked.license_name!r}, which is for the license 'other'; leave one of them out"
        )


def _files(source: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files of a checkpoint itself, not those of its sub-folders, each of which is hashed."""
    names = [name for name in manifest["files"] if Path(name).name == name and "\\" not in name]
    found: dict[str, Path] = {}
    for name in names:
        file = real_file(source, name)
        if file is None or not file.is_file():
            raise UnfitArtifact(f"{source} has no {name}, which {MANIFEST} lists; copy it there, or quantize again")
        found[name] = file
    with tracking(sum(file.stat().st_size for file in found.values()), "hashing", PATIENCE_S) as advance:
        for name, file in found.items():
            if sha256_of(file) != manifest["files"][name]:
                raise UnfitArtifact(f"{source / name} is not the file that {MANIFEST} lists; quantize again")
            advance(file.stat().st_size)
    return found


def _graph(source: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the graph beside a checkpoint, where its weights are the checkpoint's own files."""
    if not (source / _GRAPH).is_file():
        return {}
    graph = read_graph(source / _GRAPH)
    if not data_of(graph).keys() <= files.keys():
        return {}
    for line in lint_notes(graph.path, allow_slow=True):
        note(line)
    return {_GRAPH: graph.path}


def _notes(source: Path, manifest: Mapping[str, Any], found: Mapping[str, Path], asked: Asked) -> Iterator[str]:
    """Yield notes on a folder for the hub."""
    left = [name for name in manifest["files"] if name not in found]
    if left:
        yield f"left out, as no reader needs them: {', '.join(left)}"
    if (source / _GRAPH).is_file() and _GRAPH not in found:
        yield f"left out: {_GRAPH}, whose weights are copies of the checkpoint's"
    for path in absolute_paths(manifest):
        yield f"{MANIFEST} names {path}, a path of this machine; the card does not"
    absent = [
        option for option, value in (("--base-model", asked.base_model), ("--license", asked.license)) if not value
    ]
    if absent:
        yield f"the card does not say what {' and '.join(absent)} would tell"
