"""The quantized checkpoint that a graph points into, or lies beside: what each of its tensors means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx

from fp4trt.account import Account, account_of, is_quantized_checkpoint
from fp4trt.checkpoint_folder import STEM, metadata_in_folder, tensors_in_folder
from fp4trt.checkpoint_manifest import read_checkpoint_manifest
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import StoredTensor

__all__ = ["CheckpointBeside", "account_in", "checkpoint_beside"]

_MANIFEST: Final = "fp4trt.json"

_SCALARS: Final = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class CheckpointBeside:
    """A quantized checkpoint in the folder of a graph: its tensors, and what they mean."""

    folder: Path
    account: Account
    tensors: Mapping[str, StoredTensor]


def account_in(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Account:
    """Return what every tensor of a quantized checkpoint means.

    Args:
        folder: where it lies.
        config: its config.json.
        tensors: all of them.

    Raises:
        BadCheckpoint: naming a tensor that is absent, contradictory, or of no meaning.
        UnknownFamily: the model is of no family of ours.
    """

    def scalar(name: str) -> float:
        return float(np.frombuffer(tensors[name].bytes(), _SCALARS[tensors[name].dtype])[0])

    known = read_checkpoint_manifest(folder)  # which says if it is damaged
    manifest = load_json(folder / _MANIFEST) if known is not None else None
    return account_of(str(folder), config, metadata_in_folder(folder), tensors, scalar, manifest)


def checkpoint_beside(path: Path, model: onnx.ModelProto) -> CheckpointBeside | None:
    """Return the quantized checkpoint whose graph this is; None where it points into none, and lies beside none.

    Args:
        path: the ONNX file.
        model: it, without its data.

    Raises:
        BadCheckpoint: the checkpoint has a tensor without a meaning, or lacks one.
        UnknownArtifact: it is damaged.
        UnknownFamily: the model is of no family of ours.
    """
    folder = path.parent
    ours = any(entry.key.startswith("fp4trt.") for entry in model.metadata_props)
    if not (folder / "config.json").is_file() or not (ours or _points_into(model)):
        return None
    if not any(folder.glob(f"{STEM}*.safetensors")):
        return None
    config, tensors = load_json(folder / "config.json"), tensors_in_folder(folder)
    if not is_quantized_checkpoint(config, tensors):
        return None
    return CheckpointBeside(folder, account_in(folder, config, tensors), tensors)


def _points_into(model: onnx.ModelProto) -> bool:
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return any(entry.key == "location" and entry.value.startswith(STEM) for entry in entries)
