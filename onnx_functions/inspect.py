"""What an artifact is: a checkpoint folder, an ONNX graph or an engine, from headers and manifests alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from onnx_functions.checkpoint_manifest import read_checkpoint_manifest
from onnx_functions.errors import BadGraph, UnknownArtifact
from onnx_functions.json_file import object_of, read_object
from onnx_functions.safetensors_header import HeldTensor, tensors_in_folder

if TYPE_CHECKING:
    from onnx import TensorProto

    from onnx_functions.linears import Linear

__all__ = ["describe", "table"]

_SHOWN_GROUPS: Final = 12
_SHOWN: Final = (
    "family",
    "recipe",
    "scale_dtype",
    "opset",
    "nodes",
    "activation_quantizers",
    "external_files",
    "onnx",
)
_COUNTS: Final = ("quantized_linears", "fp4_linears", "engine_bytes")
_FORMAT_OF: Final = {
    "U8": "nvfp4",
    "FLOAT4E2M1": "nvfp4",
    "BF16": "bf16",
    "BFLOAT16": "bf16",
    "F16": "fp16",
    "FLOAT16": "fp16",
    "F32": "fp32",
    "FLOAT": "fp32",
    "F8_E4M3": "fp8",
    "FLOAT8E4M3FN": "fp8",
}


@dataclass(frozen=True)
class _Linear:
    """A linear layer as stored: `shape` is [N, K] in elements, `nbytes` the weight with its scales."""

    path: str
    format: str
    shape: tuple[int, int]
    nbytes: int


def describe(artifact: str | Path) -> dict[str, Any]:
    """Return what an artifact is, as JSON holds it.

    Args:
        artifact: a checkpoint folder, an ONNX file, an engine or the JSON beside it.

    Returns:
        `kind` (`quantized checkpoint`, `checkpoint`, `onnx`, `engine`), `path`, and what there is to say of
        that kind: for checkpoints and graphs `formats` (by format: linears, parameters, bytes),
        `fp4_coverage` (share of the linears' parameters that are stored in FP4), `groups` of linears that
        share scales, and `linears`.

    Raises:
        UnknownArtifact: it is none of these.
        BadGraph: an ONNX file that cannot be read.
    """
    path = Path(artifact)
    if path.is_dir():
        return _checkpoint(path)
    if not path.is_file():
        raise UnknownArtifact(f"{path} does not exist; expected a checkpoint folder, an ONNX file or an engine")
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix in (".json", ".engine"):
        return _engine(path.with_suffix(".json"))
    raise UnknownArtifact(f"{path} is nothing fp4trt knows; expected a checkpoint folder, an ONNX file or an engine")


def _checkpoint(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file() and (folder / "model.onnx").is_file():
        return _onnx(folder / "model.onnx")
    config = read_object(folder / "config.json")
    manifest = read_checkpoint_manifest(folder)
    tensors = tensors_in_folder(folder)
    linears = list(_stored_linears(tensors))
    quantized = any(linear.format == "nvfp4" for linear in linears)
    return {
        "kind": "quantized checkpoint" if quantized else "checkpoint",
        "path": str(folder.resolve()),
        "family": manifest.family if manifest else config.get("_class_name"),
        "recipe": manifest.recipe if manifest else None,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "tensors": len(tensors),
        **_coverage(linears, manifest.groups if manifest else ()),
        "versions": manifest.versions if manifest else {},
        "onnx": str((folder / "model.onnx").resolve()) if (folder / "model.onnx").is_file() else None,
    }


def _stored_linears(tensors: Mapping[str, HeldTensor]) -> Iterator[_Linear]:
    """Yield the matrices among a checkpoint's tensors."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(tensor.shape) != 2:
            continue
        packed = tensor.dtype == "U8" and f"{path}.weight_scale" in tensors
        scales = [tensors[f"{path}.{s}"] for s in ("weight_scale", "weight_scale_2") if f"{path}.{s}" in tensors]
        rows, columns = tensor.shape
        yield _Linear(
            path,
            _FORMAT_OF.get(tensor.dtype, tensor.dtype.lower()),
            (rows, columns * 2 if packed else columns),
            tensor.nbytes + sum(scale.nbytes for scale in scales),
        )


def _coverage(linears: Sequence[_Linear], groups: Iterable[Sequence[str]]) -> dict[str, Any]:
    formats: dict[str, dict[str, int]] = {}
    for linear in linears:
        entry = formats.setdefault(linear.format, {"linears": 0, "parameters": 0, "bytes": 0})
        entry["linears"] += 1
        entry["parameters"] += math.prod(linear.shape)
        entry["bytes"] += linear.nbytes
    total = sum(entry["parameters"] for entry in formats.values())
    fp4 = formats.get("nvfp4", {}).get("parameters", 0)
    return {
        "formats": formats,
        "fp4_linears": formats.get("nvfp4", {}).get("linears", 0),
        "fp4_coverage": fp4 / total if total else 0.0,
        "groups": [list(group) for group in groups if len(group) > 1],
        "linears": [{**asdict(linear), "shape": list(linear.shape)} for linear in linears],
    }


def _onnx(path: Path) -> dict[str, Any]:
    from onnx_functions.external_data import load_graph, nbytes_of, span_of, type_name
    from onnx_functions.linears import Graph, declared_groups, metadata_of, promised_linears

    model = load_graph(path)
    graph, metadata = Graph(model), metadata_of(model)
    sizes = {tensor.name: nbytes_of(tensor) for tensor in model.graph.initializer}
    chains = [graph.linear(name) for paths in promised_linears(model).values() for name in paths]
    linears = [_chained_linear(chain, graph.initializers[chain.weight_source], sizes) for chain in chains]
    spans = [span for tensor in model.graph.initializer if (span := span_of(tensor, path.parent))]
    return {
        "kind": "onnx",
        "path": str(path.resolve()),
        "family": metadata.get("fp4trt.family"),
        "recipe": metadata.get("fp4trt.recipe"),
        "scale_dtype": metadata.get("fp4trt.scale_dtype"),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(model.graph.node),
        "bytes": sum(sizes.values()),
        "external_files": sorted({span.file.name for span in spans}),
        "inputs": [_value(value, type_name) for value in model.graph.input],
        "outputs": [_value(value, type_name) for value in model.graph.output],
        "activation_quantizers": len({chain.quantizer.node for chain in chains if chain.quantizer}),
        **_coverage(linears, declared_groups(model)),
    }


def _chained_linear(chain: Linear, weight: TensorProto, sizes: Mapping[str, int]) -> _Linear:
    from onnx_functions.external_data import type_name

    name = type_name(weight.data_type)
    if len(weight.dims) != 2:
        raise BadGraph(f"initializer {weight.name} has shape {list(weight.dims)}; expected a matrix: export again")
    rows, columns = weight.dims
    nbytes = sizes[weight.name] + sizes.get(f"{chain.path}.weight_scale", 0)
    return _Linear(chain.path, _FORMAT_OF.get(name, name.lower()), (rows, columns), nbytes)


def _value(value: Any, type_name: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "type": type_name(tensor.elem_type), "shape": shape}


def _engine(path: Path) -> dict[str, Any]:
    manifest = read_object(path)
    if manifest.get("kind") != "fp4trt engine":
        raise UnknownArtifact(f"{path} is no engine's manifest; expected the JSON that fp4trt build wrote")
    try:
        linears, covered, _ = (int(manifest.get(key) or 0) for key in _COUNTS)
        object_of(manifest.get("request", {}), "request")
    except (TypeError, ValueError) as error:
        raise UnknownArtifact(f"{path} is a damaged manifest of an engine ({error}); build again") from None
    engine = path.with_name(str(manifest.get("engine", path.with_suffix(".engine").name)))
    return {
        **manifest,
        "kind": "engine",
        "path": str(path.resolve()),
        "engine": str(engine.resolve()),
        "engine_present": engine.is_file(),
        "fp4_coverage": covered / linears if linears else 0.0,
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """Return a description as lines for a terminal."""
    lines = [f"{found['kind']}  {found['path']}"]
    if found["kind"] == "engine":
        return lines + _engine_lines(found)
    lines += [_entry(key, found[key]) for key in _SHOWN if found.get(key) not in (None, [], {})]
    lines.append(_entry("stored", _size(found["bytes"])))
    values = (*found.get("inputs", ()), *found.get("outputs", ()))
    lines += [f"    {value['name']:26} {value['type']:9} {_plain(value['shape'])}" for value in values]
    lines.append(f"  {'format':10} {'linears':>8} {'parameters':>14} {'size':>12}")
    lines += [
        f"  {kind:10} {entry['linears']:8} {entry['parameters']:14,} {_size(entry['bytes']):>12}"
        for kind, entry in found["formats"].items()
    ]
    share = f"{found['fp4_coverage']:.1%} of the linears' parameters"
    lines.append(f"  FP4 covers {share} ({found['fp4_linears']} linears)")
    groups = found["groups"]
    if groups:
        lines.append(f"  {len(groups)} groups share scales, so that TensorRT can merge them:")
        lines += [f"    {' '.join(group)}" for group in groups[:_SHOWN_GROUPS]]
        lines += [f"    and {len(groups) - _SHOWN_GROUPS} more"] if len(groups) > _SHOWN_GROUPS else []
    return lines


def _entry(key: str, value: Any) -> str:
    return f"  {key.replace('_', ' '):22} {_plain(value)}"


def _engine_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [_entry("engine", found["engine"]) + ("" if found["engine_present"] else " (missing)")]
    request = found.get("request", {})
    asked = ("gpus", "compute_capabilities", "backend", "tensorrt_version", "profile")
    lines += [_entry(key, request[key]) for key in asked if key in request]
    lines.append(_entry("size", _size(int(found.get("engine_bytes") or 0))))
    lines.append(_entry("FP4 GEMMs", found.get("fp4_gemms")))
    covered = f"{found.get('fp4_linears')} of {found.get('quantized_linears')} ({found['fp4_coverage']:.0%})"
    lines.append(_entry("linears in FP4", covered))
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"
