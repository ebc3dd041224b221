"""Write a ModelOpt-quantized model as a checkpoint folder: each byte decided once, here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from calibration import nvfp4
from calibration.checkpoint import MANIFEST, WEIGHTS
from calibration.errors import OutputExists
from calibration.safetensors_file import DTYPE_BYTES, TensorPlan, sha256_of, write
from calibration.source import load_json

__all__ = ["refuse_existing", "refuse_foreign", "replacing", "write_json", "write_weights"]

GLOBAL_SCALES: Final = {"weight_scale_2": "weight_quantizer", "input_scale": "input_quantizer"}
"""Name of a stored global scale to the quantizer that it comes from."""

_SAFETENSORS: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@contextlib.contextmanager
def replacing(directory: Path, force: bool) -> Iterator[Path]:
    """Give an empty ``DIR.partial`` to write into, which becomes ``DIR`` when nothing was raised, and goes otherwise.

    Raises:
        OutputExists: as :func:`refuse_foreign`.
    """
    refuse_foreign(directory, force)
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(path: Path, force: bool) -> None:
    """Refuse to replace what is there, unless ``force`` was given.

    Raises:
        OutputExists: naming it.
    """
    if path.exists() and not force:
        raise OutputExists(f"{path} exists; choose another --output, or replace it with --force")


def refuse_foreign(directory: Path, force: bool) -> None:
    """Refuse to replace a folder, and even with ``force`` one that holds anything that fp4trt did not write.

    Raises:
        OutputExists: naming the folder, or what is in it.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputExists(f"{directory} is a file; expected a folder to write: choose another --output")
    if not directory.exists():
        return
    refuse_existing(directory, force)
    manifest = directory / MANIFEST
    ours = {MANIFEST, "validation", *(name.split("/")[0] for name in _written_files(manifest))}
    engines = {path.stem for path in directory.glob("*.engine")}
    for path in sorted(directory.iterdir()):
        derived = path.name.endswith((".engine", ".onnx", ".onnx.data")) or (
            path.suffix == ".json" and path.stem in engines
        )
        if path.name not in ours and not derived:
            raise OutputExists(f"{directory} holds {path.name}, which fp4trt did not write; choose another --output")


def _written_files(manifest: Path) -> list[str]:
    return list(load_json(manifest).get("files", {})) if manifest.exists() else []


def _publish(partial: Path, directory: Path) -> None:
    """Give a finished ``DIR.partial`` its name; what stood there before goes only once the new one is in place."""
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        if old.exists():
            shutil.rmtree(old)
        os.replace(directory, old)
    os.replace(partial, directory)
    if old.exists():
        shutil.rmtree(old)


def write_json(path: Path, value: Mapping[str, Any]) -> str:
    """Write JSON, synced to disk; return its SHA-256."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
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
    plan += [TensorPlan(name, _SAFETENSORS[value.dtype], tuple(value.shape)) for name, value in plain.items()]
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
        yield tensor.name, value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _global_scale(model: nn.Module, path: str, quantizer: str) -> torch.Tensor:
    amax: Any = model.get_submodule(f"{path}.{quantizer}").amax
    return nvfp4.global_scale(amax.float())
