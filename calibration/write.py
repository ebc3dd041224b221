"""Write a ModelOpt-quantized model as a checkpoint folder: each byte decided once, here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from calibration import nvfp4
from calibration.checkpoint import MANIFEST, WEIGHTS, load_manifest
from calibration.errors import BadCheckpoint, OutputExists
from calibration.safetensors_file import DTYPE_BYTES, TensorPlan, bytes_of, naming, plan_of, sha256_of, write
from calibration.source import load_json

__all__ = ["refuse_existing", "refuse_foreign", "replacing", "write_json", "write_weights"]

GLOBAL_SCALES: Final = {"weight_scale_2": "weight_quantizer", "input_scale": "input_quantizer"}
"""Name of a stored global scale to the quantizer that it comes from."""

_DERIVED: Final = (
    "model.onnx",
    "model.onnx.data",
    "validation/report.json",
    "validation/report.html",
    "digits.png",
    "demo.json",
)
"""What later stages, and the demo, write into a checkpoint's folder."""

_MARK: Final = ".fp4trt-partial"
"""Tells a folder that fp4trt left unfinished from one of the user's."""


@contextlib.contextmanager
def replacing(directory: Path, force: bool) -> Iterator[Path]:
    """Give an empty ``DIR.partial`` to write into, which becomes ``DIR`` when nothing was raised, and goes otherwise.

    Raises:
        OutputExists: as :func:`refuse_foreign`; or ``DIR.partial`` is there and is none of ours.
    """
    refuse_foreign(directory, force)
    partial = directory.with_name(f"{directory.name}.partial")
    mark = partial / _MARK
    if partial.exists() and not mark.exists():
        raise OutputExists(
            f"{partial} is in the way and was not written by fp4trt; move it, or choose another --output"
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    mark.touch()
    try:
        yield partial
        mark.unlink()
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to replace a file, unless ``force`` was given; make the folder that it will stand in.

    Raises:
        OutputExists: naming it.
    """
    if path.is_dir():
        raise OutputExists(f"{path} is a folder; expected a file to write: choose another --output")
    if path.exists() and not path.is_file():
        raise OutputExists(f"{path} is not a regular file, which --force does not replace; choose another --output")
    if path.exists() and not force:
        raise OutputExists(f"{path} exists; choose another --output, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)


def refuse_foreign(directory: Path, force: bool) -> None:
    """Refuse to replace a folder, and even with ``force`` one that holds anything that fp4trt did not write.

    Raises:
        OutputExists: naming the folder, or what is in it.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputExists(f"{directory} is a file; expected a folder to write: choose another --output")
    if not directory.exists():
        return
    if not force:
        raise OutputExists(f"{directory} exists; choose another --output, or replace it with --force")
    manifest = directory / MANIFEST
    ours = {MANIFEST, *_DERIVED, *load_manifest(manifest).get("files", {})} if manifest.exists() else set()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_dir() and name not in ours and not (ours and _is_engine(path)):
            raise OutputExists(f"{directory} holds {name}, which fp4trt did not write; choose another --output")


def _is_engine(path: Path) -> bool:
    """Whether a file is an engine with its manifest, that manifest, or a build script of ours."""
    if path.name.endswith(".build.py"):
        return path.read_bytes().startswith(b"# Written by fp4trt")
    if path.suffix not in (".engine", ".json"):
        return False
    engine, beside = path.with_suffix(".engine"), path.with_suffix(".json")
    try:
        return engine.exists() and "engine_sha256" in load_json(beside)
    except BadCheckpoint:
        return False


def _publish(partial: Path, directory: Path) -> None:
    """Give a finished folder its name; what stood there before goes only once the new one is in place."""
    if not directory.exists():
        os.replace(partial, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{directory.name}.old-", dir=directory.parent))
    os.replace(directory, old / directory.name)
    try:
        os.replace(partial, directory)
    except OSError:
        os.replace(old / directory.name, directory)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> str:
    """Write JSON, synced to disk; return its SHA-256."""
    with naming(path), path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return sha256_of(path)


def write_weights(directory: Path, model: nn.Module, groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """Write the safetensors file of a model whose linears in ``groups`` carry calibrated NVFP4 quantizers.

    Order of the bytes: 32-bit tensors, 16-bit tensors, then group by group in graph order the codes of its members and
    their block scales. So every offset is a multiple of the element size, and a merged group's codes are one span.

    Returns:
        File name to SHA-256.
    """
    plain = _plain_tensors(model, {path for group in groups for path in group})
    plan = _plan(model, plain, groups)
    return {WEIGHTS: write(directory / WEIGHTS, plan, _buffers(model, plain, plan), {"format": "pt"})}


def _plain_tensors(model: nn.Module, quantized: set[str]) -> dict[str, torch.Tensor]:
    """Return what is stored as it is: everything but ModelOpt's own state and the quantized weights."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not _belongs_to_quantizer(name) and name.removesuffix(".weight") not in quantized
    }


def _plan(model: nn.Module, plain: Mapping[str, torch.Tensor], groups: Sequence[Sequence[str]]) -> list[TensorPlan]:
    plan = [TensorPlan(f"{path}.{kind}", "F32", ()) for kind in GLOBAL_SCALES for group in groups for path in group]
    plan += [plan_of(name, value) for name, value in plain.items()]
    plan.sort(key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    for group in groups:
        shapes = {path: tuple(model.get_parameter(f"{path}.weight").shape) for path in group}
        plan += [TensorPlan(f"{path}.weight", "U8", (n, k // 2)) for path, (n, k) in shapes.items()]
        plan += [
            TensorPlan(f"{path}.weight_scale", "F8_E4M3", (n, k // nvfp4.BLOCK_SIZE)) for path, (n, k) in shapes.items()
        ]
    return plan


def _belongs_to_quantizer(name: str) -> bool:
    return any(part.endswith("_quantizer") for part in name.split("."))


def _buffers(
    model: nn.Module, plain: Mapping[str, torch.Tensor], plan: Sequence[TensorPlan]
) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield every planned tensor's bytes; a group's block scales wait while its codes are written."""
    scales: dict[str, torch.Tensor] = {}
    for tensor in plan:
        path, _, kind = tensor.name.rpartition(".")
        if tensor.name in plain:
            value = plain[tensor.name]
        elif kind in GLOBAL_SCALES:
            value = _global_scale(model, path, GLOBAL_SCALES[kind])
        elif kind == "weight":
            codes, scales[path] = nvfp4.quantize(
                model.get_parameter(tensor.name), _global_scale(model, path, "weight_quantizer")
            )
            value = nvfp4.pack_codes(codes)
        else:
            value = scales.pop(path)
        yield tensor.name, bytes_of(value)


def _global_scale(model: nn.Module, path: str, quantizer: str) -> torch.Tensor:
    amax: Any = model.get_submodule(f"{path}.{quantizer}").amax
    return nvfp4.global_scale(amax.float())
