"""What `inspect` prints: a description as a table, or as a tree of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from fp4trt.number_formats import FORMATS
from onnx_functions.graph.lora_slots import is_factor_input
from onnx_functions.inspection.attention import attention_lines
from onnx_functions.inspection.module_tree import tree

__all__ = ["table", "tree_table"]

_SHOWN_LINES: Final = 12
_SHOWN: Final = (
    "family",
    "recipe",
    "scale_dtype",
    "producer",
    "opset",
    "nodes",
    "activation_quantizers",
    "external_files",
    "missing_files",
    "onnx",
)


def table(found: Mapping[str, Any]) -> list[str]:
    """Return a description as lines for a terminal."""
    if found["kind"] == "picture":
        return list(_picture_lines(found))
    lines = [f"{found['kind']}  {found['path']}"]
    lines += _engine_lines(found) if found["kind"] == "engine" else _stored_lines(found)
    return [*lines, *_group_lines(found), *_verdict_lines(found), *_graph_lines(found)]


def tree_table(found: Mapping[str, Any]) -> list[str]:
    """Return a description's linears as a tree of modules, each with format, shape and bytes."""
    if found["kind"] == "picture":
        return list(_picture_lines(found))
    differing = {item["path"]: item for item in (found["promise"] or {}).get("differing", ())}
    texts = [_leaf(linear, differing.get(linear["path"])) for linear in found["linears"]]
    lines = [f"  {line}" for line in tree(found["linears"], texts)]
    return [f"{found['kind']}  {found['path']}", *lines, *_verdict_lines(found), *_graph_lines(found)]


def _picture_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a picture says of how it was made."""
    yield f"picture  {found['path']}"
    for key, value in found.items():
        if key in ("kind", "path"):
            continue
        parts = value.items() if isinstance(value, Mapping) else ()
        yield _entry(key, ", ".join(f"{name} {one}" for name, one in parts if name != "hashes") if parts else value)
        hashes = value.get("hashes", {}) if isinstance(value, Mapping) else {}
        yield from (f"    {digest[:16]}  {name}" for name, digest in hashes.items())


def _leaf(linear: Mapping[str, Any], differs: Mapping[str, Any] | None) -> str:
    parts = [f"{linear['format']:10}"]
    if linear["shape"] is not None:
        parts += [f"{linear['shape']!s:16}", f"{linear['nbytes']:,} bytes"]
    if differs:
        parts.append(f"(promised: {differs['promised'] or 'nothing'})")
    return " ".join(parts).rstrip()


def _stored_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (_entry(key, found[key]) for key in _SHOWN if found.get(key) not in (None, [], {}))
    yield _entry("stored", _size(found["bytes"]))
    slots = found.get("lora")
    inputs = (value for value in found.get("inputs", ()) if not (slots and is_factor_input(value["name"])))
    for value in (*inputs, *found.get("outputs", ())):
        yield f"    {value['name']:26} {value['type']:9} {_plain(value['shape'])}"
    width = max((len(kind) for kind in found["formats"]), default=0)
    width = max(width, 10)
    yield f"  {'format':{width}} {'linears':>8} {'parameters':>14} {'size':>12}"
    for kind, entry in found["formats"].items():
        size = _size(entry["bytes"])
        yield f"  {kind:{width}} {entry['linears']:8} {entry['parameters']:14,} {size:>12}"
    share = f"{found['fp4_coverage']:.1%} of the linears' parameters"
    yield f"  FP4 covers {share} ({found['fp4_linears']} linears)"
    if branches := found.get("branches"):
        ranks = " and ".join(map(str, branches["ranks"]))
        beside = f"SVDQuant: {branches['linears']} low-rank branches of rank {ranks}, " if ranks else "AWQ: "
        yield f"  {beside}{branches['smoothed']} smoothed inputs: {_size(branches['bytes'])} beside them"
    if slots:
        yield f"  slots for LoRAs: {slots['linears']} linears, lora_rank 0 to {slots['max_rank']}"


def _group_lines(found: Mapping[str, Any]) -> Iterator[str]:
    lines = [" ".join(group) for group in found.get("groups", ())]
    if lines:
        count = f"{found['group_count']} groups, {len(lines)} of more than one linear"
        yield f"  {count}, which share scales so that TensorRT can merge them:"
        yield from _first(lines)


def _verdict_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the reader has to know: placeholders that are left, and where a promise is not kept."""
    yield from attention_lines(found.get("attention"))
    left = found.get("placeholders") if found["kind"] == "onnx" else None
    if left:
        marked = f"{left['weights']} weights and {left['activations']} activations are placeholders, not FP4 yet"
        yield f"  {marked}; next: {left['next'] or 'mark weights with TRT_FP4QDQ too, then fp4trt export'}"
    promise = found["promise"]
    if promise is None:
        yield "  promises nothing of its linears; described by its own pattern"
        return
    yield f"  promised: {_counts(promise['promised'])}; found: {_counts(promise['found'])}"
    for kind, paths in promise.get("stored", {}).items():
        told = FORMATS[kind].elsewhere if kind in FORMATS else "not multiplied so"
        yield f"  {len(paths)} linears promised in {kind}: {told}, as this GPU has no GEMM of it"
    differing = promise["differing"]
    kept = "every other linear is as promised" if promise.get("stored") else "every linear is as promised"
    yield f"  {len(differing)} differ from the promise:" if differing else f"  {kept}"
    yield from _first([_difference(item) for item in differing])
    lost = promise.get("lost_groups", ())
    if lost:
        yield f"  {len(lost)} promised groups share no scales:"
        yield from _first([" ".join(group) for group in lost])


def _graph_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the reader has to know of the graph that lies in a checkpoint's folder."""
    if found.get("graph"):
        yield "  of its model.onnx:"
        yield from (f"  {line}" for line in _verdict_lines(found["graph"]))


def _difference(item: Mapping[str, Any]) -> str:
    reason = f" ({item['reason']})" if "reason" in item else ""
    return f"{item['path']}: promised {item['promised'] or 'nothing'}, found {item['found'] or 'nothing'}{reason}"


def _first(lines: list[str]) -> Iterator[str]:
    yield from (f"    {line}" for line in lines[:_SHOWN_LINES])
    if len(lines) > _SHOWN_LINES:
        yield f"    and {len(lines) - _SHOWN_LINES} more"


def _counts(formats: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in formats.items() if count) or "none"


def _entry(key: str, value: Any) -> str:
    return f"  {key.replace('_', ' '):22} {_plain(value)}"


def _engine_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield _entry("engine", found["engine"]) + ("" if found["engine_present"] else " (missing)")
    request = found.get("request", {})
    asked = ("gpus", "compute_capabilities", "backend", "tensorrt_version", "profile")
    yield from (_entry(key, request[key]) for key in asked if key in request)
    if several := request.get("profiles"):
        yield _entry("profiles", len(several))
        yield from (f"    {number:<20} {_plain(profile)}" for number, profile in enumerate(several))
    yield _entry("size", _size(int(found.get("engine_bytes") or 0)))
    yield from _coverage_lines(found["coverage"], int(found.get("quantized_linears") or 0))
    if branch := found.get("branch"):
        cost = f"{branch.get('kernels')} of {found.get('kernels')} kernels, {_size(int(branch.get('bytes') or 0))}"
        yield _entry("low-rank branches", cost)
    if slots := found.get("lora"):
        cost = f"{slots.get('linears')} linears, {slots.get('kernels')} of {found.get('kernels')} kernels"
        yield _entry("slots for LoRAs", cost)


def _coverage_lines(coverage: Mapping[str, Mapping[str, int]], promised: int) -> Iterator[str]:
    """Yield the GEMMs and linears of each quantized format of an engine, first the one that most linears are in."""
    if not promised or not coverage:
        yield _entry("quantized GEMMs", "none" if promised else "none promised")
        return
    for kind, counts in sorted(coverage.items(), key=lambda item: -item[1]["linears"]):
        name = FORMATS[kind].gemm if kind in FORMATS else kind
        yield _entry(f"{name} GEMMs", counts["gemms"])
        yield _entry(f"linears in {name}", f"{counts['linears']} of {promised} ({counts['linears'] / promised:.0%})")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return str(value)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"
