"""What an artifact is: a checkpoint folder, an ONNX graph or an engine, from headers and manifests alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fp4trt.account import is_quantized_checkpoint
from fp4trt.built_in import path_of
from fp4trt.checkpoint_folder import metadata_in_folder, tensors_in_folder
from fp4trt.checkpoint_manifest import read_checkpoint_manifest
from fp4trt.declared import require_shapes
from fp4trt.errors import BadCheckpoint, QuantizedAlready, UnknownArtifact, UnknownFamily
from fp4trt.families import family_of
from fp4trt.file_kind import what_it_lacks
from fp4trt.json_file import load_json, object_of, strings
from fp4trt.layouts import recognised, refuse_foreign_layout
from fp4trt.make_source import make_source_folder
from fp4trt.number_formats import FORMATS, FP8, NVFP4, stored_format
from fp4trt.pipeline_folder import transformer_folder
from fp4trt.progress import Progress
from fp4trt.safetensors_file import StoredTensor, metadata_in_file, tensors_in_file
from fp4trt.single_files.opening import SUFFIXES
from fp4trt.verb import FLAT, Result, verb
from onnx_functions.graph.branches import described_branches
from onnx_functions.graph.checkpoint_beside import account_in
from onnx_functions.graph.stored_linears import (
    FORMAT_OF,
    UNNAMED,
    StoredLinear,
    compare,
    coverage,
    is_fp4,
    is_quantized,
)
from onnx_functions.inspection.attention import of_engine, of_tensors
from onnx_functions.inspection.picture import is_picture, picture

__all__ = ["Inspected", "describe", "inspect"]

_COUNTS: Final = ("quantized_linears", "fp4_linears", "engine_bytes")
_COVERED: Final = ("gemms", "linears")


@dataclass(frozen=True, eq=False)
class Inspected(Result):
    """What :func:`inspect` found; its items are those of ``found``.

    Attributes:
        kind: ``quantized checkpoint``, ``checkpoint``, ``onnx``, ``engine``, ``picture``, or ``layout detection``.
        path: of the artifact.
        found: all that :func:`describe`, or the proof of a layout, says.
    """

    kind: str
    path: str
    found: Mapping[str, Any] = field(metadata=FLAT)


@verb
def inspect(
    artifact: str | Path,
    *,
    against: str | Path | None = None,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Inspected:
    """Say what an artifact is.

    Args:
        artifact: a checkpoint folder, `digits`, an ONNX file, an engine or the JSON beside it, or a picture (PNG) that
            `fp4trt generate` wrote.
        against: the 16-bit checkpoint that it was made of, a folder or a ``.safetensors`` file: prove in which layout
            its NVFP4 and FP8 weights are, as :func:`onnx_functions.layouts.detection.detect` does.
        progress: called with each step.

    Raises:
        UnknownArtifact, BadCheckpoint, BadGraph: as :func:`describe`; or nothing is quantized, or no linear is in both.
    """
    if against is None:
        found = describe(artifact)
    else:
        from onnx_functions.layouts.detection import detect

        found = detect(artifact, against)
    return Inspected(found["kind"], found["path"], found)


def describe(artifact: str | Path) -> dict[str, Any]:
    """Return what an artifact is, as JSON holds it.

    Args:
        artifact: a checkpoint folder, a single file in 16 bit, `digits`, an ONNX file, an engine or the JSON beside it,
            or a picture that `fp4trt generate` wrote, of which its metadata is all that there is to say.

    Returns:
        `kind` (`quantized checkpoint`, `checkpoint`, `onnx`, `engine`), `path`, and what there is to say of
        that kind: `formats` (by format: linears, parameters, bytes), `fp4_coverage` (share of the linears'
        parameters that are stored in FP4; of an engine, of the promised linears that run in it), `groups` of
        linears that share scales, `linears`, and `promise`: promised against found, None without a promise. Of a
        checkpoint, `graph` is all that of the model.onnx in it, None without one.

    Raises:
        UnknownArtifact: it is none of these.
        BadCheckpoint: a tensor has no meaning, is missing, or does not fit the config.
        BadGraph: an ONNX file, the checkpoint's own too, that cannot be read.
    """
    path = path_of(artifact)
    if path.is_dir():
        return _checkpoint(path)
    if not path.is_file():
        raise UnknownArtifact(f"{path} {what_it_lacks(path)}; expected a checkpoint folder, an ONNX file or an engine")
    if path.suffix.lower() == ".onnx":
        return _onnx(path)
    if path.suffix == ".engine" and not path.with_suffix(".json").is_file():
        raise UnknownArtifact(f"{path} has no {path.stem}.json beside it, which says what is in it; copy that too")
    if path.suffix in (".json", ".engine"):
        return _engine(path.with_suffix(".json"))
    if path.suffix.lower() in SUFFIXES:
        return _single_file(path)
    if is_picture(path):
        return picture(path)
    raise UnknownArtifact(f"{path} is nothing fp4trt knows; expected a checkpoint folder, an ONNX file or an engine")


def _single_file(path: Path) -> dict[str, Any]:
    """Return what a single file is in 16 bit, as :func:`_checkpoint` does of a folder.

    Raises:
        UnknownArtifact: it is quantized, damaged, or of no known model.
    """
    try:
        folder = make_source_folder(path)
    except QuantizedAlready:
        layout = recognised({}, metadata_in_file(path), tensors_in_file(path))
        raise UnknownArtifact(
            f"{path} is a single file, of {layout.name} ({layout.evidence}); fp4trt convert --to modelopt makes a "
            "checkpoint's folder of it where it knows that layout, and --against its 16-bit checkpoint proves it"
        ) from None
    except BadCheckpoint as error:
        raise UnknownArtifact(str(error)) from None
    return {**_checkpoint(folder), "path": str(path.resolve()), "bytes": path.stat().st_size}


def _checkpoint(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file() and (folder / "model.onnx").is_file():
        return _onnx(folder / "model.onnx")
    folder = transformer_folder(folder)
    graph = folder / "model.onnx"
    if not (folder / "config.json").is_file() and graph.is_file():
        return _onnx(graph)
    config = _config(folder / "config.json")
    manifest = read_checkpoint_manifest(folder)
    tensors = tensors_in_folder(folder)
    missing = _unaccounted(folder, config, tensors)
    linears = list(_stored_linears(tensors, missing))
    found = {linear.path: linear.format for linear in linears}
    quantized = any(is_quantized(kind) for kind in found.values())
    promised = {kind: manifest.quantized(kind) for kind in FORMATS} if manifest else {}
    return {
        "kind": "quantized checkpoint" if quantized else "checkpoint",
        "path": str(folder.resolve()),
        "family": manifest.family if manifest else config.get("_class_name"),
        "recipe": manifest.recipe if manifest else None,
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "tensors": len(tensors),
        "promise": compare(promised, found, missing) if manifest else None,
        "attention": of_tensors(tensors.keys(), manifest.fp8_attentions if manifest else None),
        **coverage(linears, manifest.groups if manifest else ()),
        "branches": described_branches({name: (tensor.shape, tensor.nbytes) for name, tensor in tensors.items()}),
        "versions": manifest.versions if manifest else {},
        "onnx": str(graph.resolve()) if graph.is_file() else None,
        "graph": _onnx(graph) if graph.is_file() else None,
    }


def _unaccounted(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Return what looks like an NVFP4 weight and is none: nothing of a family of ours, whose tensors all count.

    A model of another family, which no other verb takes, is described as far as names and shapes go.

    Raises:
        BadCheckpoint: the tensors are not those of the model that the config describes.
    """
    try:
        if is_quantized_checkpoint(config, tensors):
            account_in(folder, config, tensors)
            return {}
        shapes = family_of(config, folder).state(config)
        refuse_foreign_layout(str(folder), config, metadata_in_folder(folder), tensors)
        require_shapes(str(folder), shapes, {name: tensor.shape for name, tensor in tensors.items()})
    except UnknownFamily:
        return _missing_scales(tensors)
    return {}


def _config(path: Path) -> dict[str, Any]:
    """Return a checkpoint's config; one of a family of ours has to make sense."""
    config = load_json(path)
    name = config.get("_class_name")
    if not isinstance(name, str) or not name:
        raise UnknownArtifact(f"{path} has no _class_name, the class of a diffusers model; copy it again")
    try:
        family_of(config, path.parent)
    except UnknownFamily:
        pass
    except BadCheckpoint as error:
        raise UnknownArtifact(str(error)) from None
    return config


def _stored_linears(tensors: Mapping[str, StoredTensor], missing: Mapping[str, str]) -> Iterator[StoredLinear]:
    """Yield the matrices among a checkpoint's tensors; codes without their scales are but bytes."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(tensor.shape) != 2:
            continue
        beside = tensors.get(f"{path}.weight_scale")
        kind = stored_format(tensor.dtype, beside.dtype if beside is not None else None)
        kind = None if path in missing else kind
        plain = tensor.dtype.lower() if path in missing else FORMAT_OF.get(tensor.dtype, tensor.dtype.lower())
        scales = [scale for scale in (kind.scales if kind is not None else ()) if not scale.of_input]
        held = [tensors[f"{path}.{scale.leaf}"].nbytes for scale in scales if f"{path}.{scale.leaf}" in tensors]
        rows, columns = tensor.shape
        yield StoredLinear(
            path,
            kind.name if kind is not None else plain,
            (rows, columns * kind.codes_per_byte if kind is not None else columns),
            tensor.nbytes + sum(held),
        )


def _missing_scales(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Return the linears that are stored as bytes without the scales that make them NVFP4, and what is wrong."""
    missing: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype != "U8" or len(tensor.shape) != 2 or not name.endswith(".weight"):
            continue
        rows, half = tensor.shape
        wanted = {f"{name}_scale": ("F8_E4M3", (rows, half // 8)), f"{name}_scale_2": ("F32", ())}
        for scale, (dtype, shape) in wanted.items():
            held = tensors.get(scale)
            if held is None or (held.dtype, held.shape) != (dtype, shape):
                found = f"{held.dtype} {list(held.shape)}" if held else "missing"
                reason = f"{scale} is {found}, expected {dtype} {list(shape)}"
                missing.setdefault(name.removesuffix(".weight"), reason)
    return missing


def _onnx(path: Path) -> dict[str, Any]:
    from onnx_functions.inspection.graph import describe_graph

    return describe_graph(path)


def _engine(path: Path) -> dict[str, Any]:
    manifest = load_json(path)
    if manifest.get("kind") != "fp4trt engine":
        raise UnknownArtifact(f"{path} is not an engine's manifest; expected the JSON that fp4trt build wrote")
    try:
        linears, covered, _ = (int(manifest.get(key) or 0) for key in _COUNTS)
        by_format = _engine_coverage(manifest)
        kernels = _engine_linears(manifest)
        promise = _engine_promise(manifest, {linear.path: linear.format for linear in kernels})
        attention = of_engine(manifest)
        engine = path.with_name(str(manifest.get("engine", path.with_suffix(".engine").name)))
    except (TypeError, ValueError, OverflowError) as error:
        raise UnknownArtifact(f"{path} is a damaged manifest of an engine ({error}); build again") from None
    return {
        **manifest,
        "kind": "engine",
        "path": str(path.resolve()),
        "engine": str(engine.resolve()),
        "engine_present": engine.is_file(),
        "promise": promise,
        "attention": attention,
        **coverage(kernels, ()),
        "coverage": by_format,
        "fp4_linears": covered,
        "fp4_coverage": covered / linears if linears else 0.0,
    }


def _engine_coverage(manifest: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return how many GEMMs each promised format has, and how many linears these cover."""
    former = {"fp4": NVFP4.name, "fp8": FP8.name}  # of a manifest without the counts of every format
    told = {kind: {key: manifest.get(f"{word}_{key}") for key in _COVERED} for word, kind in former.items()}
    told = {kind: counts for kind, counts in told.items() if any(counts.values())}
    each = {
        kind: object_of(counts, kind) for kind, counts in object_of(manifest.get("coverage", told), "coverage").items()
    }
    return {kind: {key: int(counts.get(key) or 0) for key in _COVERED} for kind, counts in each.items()}


def _engine_linears(manifest: Mapping[str, Any]) -> list[StoredLinear]:
    """Return the linears by the GEMM that computes each; the manifest says no shapes.

    One that the build's log names no kernel of, as TensorRT leaves some out, is there too.
    """
    told = [*_objects(manifest, "lost"), *_objects(manifest, "sixteen_bit")]
    found = {path: StoredLinear(path, UNNAMED, None, None) for path in (str(item.get("linear")) for item in told)}
    found |= _computed(manifest)
    for profile in _objects(manifest, "profiles"):  # what one of several profiles loses is lost
        lost = {str(item.get("linear")) for item in _objects(profile, "lost")}
        found |= {path: linear for path, linear in _computed(profile).items() if path in lost}
    return list(found.values())


def _computed(manifest: Mapping[str, Any]) -> dict[str, StoredLinear]:
    found: dict[str, StoredLinear] = {}
    for gemm in _objects(manifest, "gemms"):
        kind = str(gemm.get("format")).upper()
        for path in strings(gemm.get("linears", []), "linears"):
            found[path] = StoredLinear(path, FORMAT_OF.get(kind, kind.lower()), None, None)
    return found


def _engine_promise(manifest: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what was promised against the GEMMs; None for a manifest that names no linears.

    `stored` has the promised linears that the engine only stores so, as its GPU has no such GEMMs, by format.
    """
    request = object_of(manifest.get("request", {}), "request")
    if "gemms" not in manifest:
        return None
    lost = {str(item.get("linear")): str(item.get("reason")) for item in _objects(manifest, "lost")}
    # Without the list of names, a promised linear is one that has an FP4 GEMM or was reported lost.
    covered = [path for path, kind in found.items() if is_fp4(kind)]
    named = object_of(request.get("promised", {}), "promised")
    promised = {str(kind): strings(paths, "promised") for kind, paths in named.items()} | {
        NVFP4.name: strings(request.get("promised_fp4", [*covered, *lost]), "promised_fp4"),
        FP8.name: strings(request.get("promised_fp8", []), "promised_fp8"),
    }
    kept = {str(item.get("linear")): item.get("promised") for item in _objects(manifest, "sixteen_bit")}
    stored = {kind: [path for path in paths if kept.get(path) == kind] for kind, paths in promised.items()}
    compared = compare(promised, found, lost)
    left = {path for paths in stored.values() for path in paths}
    compared["differing"] = [item for item in compared["differing"] if item["path"] not in left]
    return {**compared, "stored": {kind: paths for kind, paths in stored.items() if paths}}


def _objects(manifest: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = manifest.get(key, [])
    if not isinstance(value, list):
        raise TypeError(f"{key} is not a list")
    return [object_of(item, f"a member of {key}") for item in value]
