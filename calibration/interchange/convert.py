"""``fp4trt convert``: a quantized checkpoint in one program's layout in, in another's out; nothing is rounded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calibration.interchange.branch_file import branch_path
from calibration.interchange.byte_rows import ByteRows
from calibration.interchange.provenance import header_of, source_hashes
from calibration.interchange.single_file import SingleFileTensors, single_file
from calibration.interchange.source import BFL, DIFFUSERS, LAYOUTS, MODELOPT, Source, open_source
from calibration.interchange.unified import unified
from calibration.interchange.writing import DIFFUSERS_FILES, Advance, unusual_order, write_checkpoint, write_tensors
from fp4trt.built_in import path_of
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.disk_space import foresee
from fp4trt.errors import BadCheckpoint, BadOption, OutputExists
from fp4trt.file_output import all_or_none, made_folder
from fp4trt.layouts import PROVENANCE
from fp4trt.number_formats import counted_by_format
from fp4trt.options import file_name, file_names, one_of, takes
from fp4trt.progress import PATIENCE_S, Progress, note, tracking
from fp4trt.publish import refuse_existing, refuse_foreign, replacing, write_json
from fp4trt.safetensors_file import metadata_in_file, tensors_in_file
from fp4trt.verb import Result, verb

if TYPE_CHECKING:
    from calibration.by_block.calibration import Calibration

__all__ = ["convert"]

_IN_FOLDERS: Final = (DIFFUSERS, MODELOPT)
"""Layouts that are a folder; the others are one file."""

_SUFFIX: Final = ".safetensors"


@dataclass(frozen=True, eq=False)
class Converted(Result):
    """A checkpoint in another layout.

    Attributes:
        output: the file or folder that was written.
        branch: the file beside it with the low-rank branches; None without.
        layout_from, layout_to: the two layouts.
        family: of the model.
        recipe: name of the recipe that it was quantized by; None where its source does not say.
        formats: how many linears are in each format that any is in.
        bytes: of the result's tensors.
        source: file name to SHA-256 of what was converted.
    """

    output: str
    branch: str | None
    layout_from: str
    layout_to: str
    family: str
    recipe: str | None
    formats: Mapping[str, int]
    bytes: int
    source: Mapping[str, str]


@verb
@takes(
    checkpoint=file_name,
    output=file_name,
    to=one_of(*LAYOUTS),
    from_layout=one_of(*LAYOUTS),
    like=file_name,
    calibration=file_names,
)
def convert(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    to: str,
    from_layout: str | None = None,
    like: str | Path | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    force: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Converted:
    """Write a quantized checkpoint in the layout of another program: bytes are moved, no weight is rounded again.

    Args:
        checkpoint: a quantized checkpoint's folder, or a single safetensors file, in any of these layouts.
        output: the file (``comfyui``, ``bfl``) or folder (``diffusers``, ``modelopt``) to write; None for one beside
            the checkpoint, by its name and the layout's.
        to: ``comfyui``, ``diffusers``, ``bfl`` or ``modelopt``.
        from_layout: the layout of a single file that does not say it itself.
        like: a config.json, a folder with one, or the name of a published model, in place of what the checkpoint
            itself tells of its model.
        calibration: files of amax that :func:`fp4trt.calibrate` wrote, for a checkpoint without scales of its inputs.
        force: replace an existing result.
        progress: called with each step.

    Raises:
        BadOption, UnknownArtifact, BadCheckpoint, UnknownFamily, UnsupportedModel, WrongPrecision, BadAmax,
            OutputExists, TooLittleSpace: naming what is wrong; nothing is left under the result's name.
    """
    source = open_source(checkpoint, from_layout, like)
    result = Path(output) if output is not None else _beside(path_of(checkpoint), to)
    with made_folder(result.parent):
        _refuse_result(source, result, to, force)
        calibrated = _calibrated(source, calibration) if calibration is not None else None
        whole = unified(source, calibrated.amax if calibrated is not None else None)
        made = single_file(whole, to) if to != MODELOPT else SingleFileTensors(dict(whole.tensors))
        if made.branch:
            _refuse_source(source, branch_path(result))
            _refuse_file(branch_path(result), force)
        needed = sum(rows.nbytes for rows in (*made.tensors.values(), *made.branch.values()))
        foresee(result.parent, needed, needed)
        hashes = source_hashes(source.files)
        _refuse_other_files(source, hashes)
        with tracking(needed, "converting", PATIENCE_S) as advance:
            if to == MODELOPT:
                said = {"source": hashes, "converted": {"from": source.layout}}
                said |= {"calibration": dict(calibrated.described)} if calibrated is not None else {}
                with replacing(result, force) as partial:
                    write_checkpoint(partial, whole, said, advance)
            else:
                branch = branch_path(result).name if made.branch else ""
                header = header_of(to, hashes, whole.provenance, unusual_order(whole), branch)
                _write(result, to, made, whole.config, header, force, advance)
    _tell(result, to, made)
    return Converted(
        output=str(result.resolve()),
        branch=str(branch_path(result).resolve()) if made.branch else None,
        layout_from=source.layout,
        layout_to=to,
        family=source.family.name,
        recipe=whole.provenance.recipe or None,
        formats=counted_by_format({path: form.format for path, form in whole.account.linears.items()}),
        bytes=needed,
        source=hashes,
    )


def _beside(path: Path, to: str) -> Path:
    """Return where a result goes that was not named: beside the checkpoint."""
    path = path.resolve()
    stem = path.stem if path.is_file() else path.name
    return path.with_name(f"{stem}-{to}{'' if to in _IN_FOLDERS else _SUFFIX}")


def _refuse_result(source: Source, result: Path, to: str, force: bool) -> None:
    """Refuse a name that the result cannot have.

    Raises:
        OutputExists: something is there, or it is the checkpoint itself.
        BadOption: its reader would not find it under that name.
    """
    _refuse_source(source, result)
    if to in _IN_FOLDERS:
        refuse_foreign(result, force, DIFFUSERS_FILES if to == DIFFUSERS else ())
        return
    if result.suffix != _SUFFIX:
        raise BadOption(f"the output is {result}; expected a name that ends in {_SUFFIX}: {to} is one file")
    _refuse_file(result, force)


def _refuse_source(source: Source, result: Path) -> None:
    """Refuse to replace the checkpoint that is converted, or a file of it.

    Raises:
        OutputExists: naming it.
    """
    taken = {source.path.resolve(), *(file.resolve() for file in source.files)}
    if result.resolve() in taken or any(file.parent == result.resolve() for file in taken):
        raise OutputExists(f"{result} is, or holds, the checkpoint that is converted; choose another --output")


def _refuse_file(path: Path, force: bool) -> None:
    """Refuse to replace a file, and even with ``force`` one that ``convert`` did not write.

    Raises:
        OutputExists: naming it.
    """
    refuse_existing(path, force)
    if path.is_file() and PROVENANCE not in _metadata(path):
        raise OutputExists(f"{path} was not written by fp4trt convert, and --force does not replace it; move it")


def _metadata(path: Path) -> Mapping[str, str]:
    try:
        tensors_in_file(path)
        return metadata_in_file(path)
    except BadCheckpoint:
        return {}


def _refuse_other_files(source: Source, hashes: Mapping[str, str]) -> None:
    """Refuse a checkpoint whose manifest, which the result repeats, is that of other files.

    Raises:
        BadCheckpoint: naming the first such file.
    """
    said = source.manifest.get("files", {})
    other = next((name for name, digest in hashes.items() if said.get(name, digest) != digest), None)
    if other is not None:
        raise BadCheckpoint(
            f"{source.path / other} is not the file that {MANIFEST} describes (SHA-256 {hashes[other][:12]}, there "
            f"{str(said[other])[:12]}); take the checkpoint as it was written, or remove {MANIFEST}"
        )


def _calibrated(source: Source, given: str | Path | Sequence[str | Path]) -> Calibration:
    """Read the amax of the model's linears, with the same checks as ``quantize``."""
    from calibration.by_block.calibration import merged

    files = [Path(path) for path in ([given] if isinstance(given, str | Path) else given)]
    family, config = source.family, source.config
    return merged(files, family.quantized(config), family.attentions(config))


def _write(
    result: Path,
    to: str,
    made: SingleFileTensors,
    config: Mapping[str, Any],
    header: Mapping[str, str],
    force: bool,
    advance: Advance,
) -> None:
    """Write single files, or one in a folder with the config that diffusers loads it with."""
    if to == DIFFUSERS:
        with replacing(result, force, ours=DIFFUSERS_FILES) as partial:
            write_json(partial / DIFFUSERS_FILES[0], config)
            write_tensors(partial / DIFFUSERS_FILES[1], made.tensors, header, advance)
        return
    files: dict[Path, Mapping[str, ByteRows]] = {result: made.tensors}
    files |= {branch_path(result): made.branch} if made.branch else {}
    with all_or_none(files) as partials:
        for path, tensors in files.items():
            write_tensors(partials[path], tensors, header, advance)


def _tell(result: Path, to: str, made: SingleFileTensors) -> None:
    """Say what a reader of the result has to know."""
    if made.branch:
        note(
            f"load {branch_path(result).name} by ComfyUI's node Load LoRA (Bypass, Model Only) at strength 1, which is "
            "exact; the usual LoRA loader rounds the weights again, and without the branches it is another model"
        )
    if to == BFL:
        note(f"SGLang takes these names for ComfyUI's layout and would read {result.name} wrongly: it is for diffusers")
