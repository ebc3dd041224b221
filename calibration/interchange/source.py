"""A quantized checkpoint of any producer that is converted: which layout it is in, of which model, and where from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from calibration.interchange.provenance import Provenance, manifest_of, read_header
from fp4trt.account import BRANCH, SCALE_LEAVES, SMOOTHING
from fp4trt.any_checkpoint import OpenCheckpoint, open_checkpoint
from fp4trt.checkpoint_manifest import MANIFEST, load_manifest
from fp4trt.errors import BadCheckpoint, BadOption, WrongPrecision
from fp4trt.families import Family, family_of
from fp4trt.layouts import Layout, recognised
from fp4trt.number_formats import NVFP4
from fp4trt.progress import note
from fp4trt.safetensors_file import StoredTensor
from fp4trt.single_files.config import config_of
from fp4trt.single_files.names import Original, SingleFile
from fp4trt.single_files.opening import NamedTensors, config_beside, config_like, named_tensors

__all__ = ["BFL", "COMFYUI", "DIFFUSERS", "LAYOUTS", "MODELOPT", "Source", "open_source"]

COMFYUI, DIFFUSERS, BFL, MODELOPT = "comfyui", "diffusers", "bfl", "modelopt"
LAYOUTS: Final = (COMFYUI, DIFFUSERS, BFL, MODELOPT)
"""What a checkpoint is converted to and from."""

_QUANTIZATION: Final = "quantization_config"
_LISTED: Final = "_quantization_metadata"
_MARK: Final = ".comfy_quant"
"""Where ComfyUI's marks stand: all in the header's metadata, or a tensor for each linear, whose bytes are JSON."""
_LONGEST: Final = 1 << 16
"""Bytes that a mark has at most."""
_OF_QUANTIZATION: Final = frozenset((*SCALE_LEAVES, SMOOTHING, *BRANCH, _MARK[1:]))
"""Last parts of the names of tensors that a plain model has not."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    Attributes:
        path: the file, or the transformer's folder.
        layout: one of :data:`LAYOUTS`.
        config: of diffusers, without what it says of quantization.
        family: of that.
        tensors: name, without the prefix of a single file, to tensor.
        originals: name to what it holds of diffusers' tensors.
        marks: of ComfyUI's layout: path of each linear that is marked as quantized to what the mark says.
        declared: its own config, with what that says of quantization.
        manifest: its fp4trt.json; empty without one.
        metadata: that of its headers, merged.
        provenance: what it says of itself.
    """

    path: Path
    layout: str
    config: dict[str, Any]
    family: Family
    tensors: Mapping[str, StoredTensor]
    originals: Mapping[str, Original]
    marks: Mapping[str, Mapping[str, Any]]
    declared: Mapping[str, Any]
    manifest: Mapping[str, Any]
    metadata: Mapping[str, str]
    provenance: Provenance

    @property
    def files(self) -> list[Path]:
        """The files that it consists of, in the order of their names."""
        found = {tensor.file for tensor in self.tensors.values()}
        beside = [self.path / "config.json", *([self.branch] if self.branch is not None else [])]
        return sorted({*found, *(file for file in beside if file.is_file())})

    @property
    def branch(self) -> Path | None:
        """The file beside it with its low-rank branches; None where it has them itself, or has none."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return folder / self.provenance.branch if self.provenance.branch else None


def open_source(artifact: str | Path, said: str | None = None, like: str | Path | None = None) -> Source:
    """Open a quantized checkpoint in any layout that is converted.

    Args:
        artifact: a folder or a safetensors file.
        said: what the user says its layout to be; None leaves it to names and metadata.
        like: what :func:`fp4trt.single_files.opening.config_like` takes, in place of what the checkpoint itself tells.

    Raises:
        UnknownArtifact, BadCheckpoint: it is none, damaged, or in a layout that is not converted or not certain.
        UnknownFamily: no family of ours has its config.
        WrongPrecision: nothing in it is quantized.
        BadOption: the layout is certain, and another than was said.
    """
    opened = open_checkpoint(artifact)
    known = recognised(opened.config, opened.metadata, opened.tensors)
    layout = _layout_of(opened.path, known, said)
    manifest = load_manifest(opened.path / MANIFEST) if (opened.path / MANIFEST).is_file() else {}
    provenance = manifest_of(manifest, opened.config) if manifest else read_header(opened.metadata)
    if layout == MODELOPT:
        provenance = replace(provenance, order=tuple(opened.tensors))
    config = _config_told(opened, provenance) if like is None else config_like(like)
    found = _transformer(opened, known, layout, config)
    return Source(
        path=opened.path,
        layout=layout,
        config=found.config,
        family=family_of(found.config, opened.path),
        tensors={name: one for name, one in found.tensors.items() if not name.endswith(_MARK)},
        originals=found.originals,
        marks=_marks(opened, found) if layout == COMFYUI else {},
        declared={**found.config, **(_quantization(opened.config) if layout == MODELOPT else {})},
        manifest=manifest,
        metadata=opened.metadata,
        provenance=replace(provenance, config=found.config),
    )


def _config_told(opened: OpenCheckpoint, provenance: Provenance) -> dict[str, Any]:
    """Return the config that a checkpoint has, in its header or beside it; empty where the shapes have to tell it."""
    told = opened.config or provenance.config
    beside = config_beside(opened.path) if not told and opened.path.is_file() else None
    return dict(beside or told)


@dataclass(frozen=True)
class _Transformer:
    """The transformer in what was opened: its config, its tensors behind a prefix, and what they hold of diffusers'."""

    config: dict[str, Any]
    prefix: str
    tensors: Mapping[str, StoredTensor]
    originals: Mapping[str, Original]


def _transformer(opened: OpenCheckpoint, known: Layout, layout: str, config: dict[str, Any]) -> _Transformer:
    if opened.config and layout == MODELOPT:  # a folder of diffusers, of any class
        state = family_of(config, opened.path).state(config)
        return _Transformer(_plain(config), "", opened.tensors, SingleFile({}, "").layout(state))
    named = named_tensors(opened.path, opened.tensors, config.get("_class_name"))
    _refuse_undecided_names(named, known, layout)
    if named.others:
        note(f"{len(named.others)} tensors of {opened.path.name} lie outside {named.prefix}, other models'; left out")
    config = _plain(config or _config_of(named))
    kept = {name: tensor for name, tensor in named.tensors.items() if not name.startswith(named.table.ignored)}
    return _Transformer(config, named.prefix, kept, named.layout(family_of(config, opened.path).state(config)))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != _QUANTIZATION}


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key == _QUANTIZATION}


def _layout_of(path: Path, known: Layout, said: str | None) -> str:
    asked, said = said, MODELOPT if said == DIFFUSERS else said  # the same names and bytes, save FP8's scales
    if known.is_read and not known.convertible:
        raise WrongPrecision(f"{path} holds no quantized linear; expected a quantized checkpoint")
    if said is not None and said in (known.convertible, *known.choices):
        return said
    if said is not None and known.convertible and not known.is_read:
        raise _contradicted(path, known, str(asked))
    if not known.convertible:
        raise BadCheckpoint(f"{path} is in the layout of {known.name} ({known.evidence}); {known.what_to_do}")
    return said or known.convertible


def _contradicted(path: Path, known: Layout, said: str) -> BadOption:
    return BadOption(f"--from says {said}, and {path} is {known.convertible} ({known.evidence}); leave --from out")


def _refuse_undecided_names(named: NamedTensors, known: Layout, layout: str) -> None:
    """Refuse a publisher's names without a mark where nobody says whose bytes they are, and diffusers' as ComfyUI's.

    Raises:
        BadCheckpoint: saying what to say.
        BadOption: diffusers' names, without a mark, were said to be ComfyUI's.
    """
    if layout == MODELOPT and not named.diffusers:
        raise BadCheckpoint(
            f"{named.path} has a single file's names, such as {named.table.key}, and no mark of ComfyUI's; say which "
            "it is: --from comfyui (tiles, high nibble first) or --from bfl (row-major, low nibble first)"
        )
    if known.is_read and layout == COMFYUI and named.diffusers:
        raise _contradicted(named.path, known, layout)


def _config_of(named: NamedTensors) -> dict[str, Any]:
    """Return the config that the shapes tell, those of packed weights in elements."""
    shapes = {
        name: _unpacked_shape(name, tensor)
        for name, tensor in named.tensors.items()
        if name.rpartition(".")[2] not in _OF_QUANTIZATION and not name.startswith(named.table.ignored)
    }
    return config_of(str(named.path), named.table, shapes, named.name_in_file)


def _unpacked_shape(name: str, tensor: StoredTensor) -> tuple[int, ...]:
    is_packed = tensor.dtype == NVFP4.codes and len(tensor.shape) == 2 and name.endswith(".weight")
    return (tensor.shape[0], tensor.shape[1] * NVFP4.codes_per_byte) if is_packed else tensor.shape


def _marks(opened: OpenCheckpoint, inside: _Transformer) -> dict[str, Mapping[str, Any]]:
    """Return what ComfyUI's marks say of each linear.

    Raises:
        BadCheckpoint: a mark is damaged.
    """
    marked = {name.removesuffix(_MARK): one for name, one in inside.tensors.items() if name.endswith(_MARK)}
    try:
        found = {path: json.loads(bytes(one.bytes(0, min(one.nbytes, _LONGEST)))) for path, one in marked.items()}
        listed = json.loads(opened.metadata[_LISTED])["layers"] if _LISTED in opened.metadata else {}
        found |= {str(path).removeprefix(inside.prefix): mark for path, mark in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{opened.path} has a damaged mark of ComfyUI's ({error}); copy it again") from None
    damaged = next((path for path, mark in found.items() if not isinstance(mark, dict)), None)
    if damaged is not None:
        raise BadCheckpoint(f"{opened.path} marks {damaged} with {found[damaged]!r}; expected an object: copy it again")
    return found
