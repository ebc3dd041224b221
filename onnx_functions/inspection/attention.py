"""What `inspect` says of attention in FP8: of a graph, a checkpoint or an engine, promised against found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from fp4trt.json_file import object_of, strings
from onnx_functions.graph.attentions import find_attentions, promised_attentions
from onnx_functions.linting.subject import Subject

__all__ = ["attention_lines", "of_engine", "of_graph", "of_tensors"]

_SCALES: Final = ("q_scale", "k_scale", "v_scale")


def of_graph(subject: Subject) -> dict[str, Any] | None:
    """Return the attentions whose operands are all in FP8 against those that the metadata promise; None without any.

    Raises:
        BadGraph: the promise cannot be read.
    """
    written = find_attentions(subject.graph)
    why = {attention.path: f"{' and '.join(attention.missing)} not in FP8" for attention in written}
    found = [attention.path for attention in written if attention.in_fp8]
    return _described(promised_attentions(subject.model) if subject.promises else None, found, why)


def of_tensors(names: Collection[str], promised: Iterable[str] | None) -> dict[str, Any] | None:
    """Return the attentions that a checkpoint has all scales of against those that its manifest promises; None without.

    Args:
        names: of its tensors.
        promised: None where there is no manifest.
    """
    paths = dict.fromkeys(name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in _SCALES)
    lacking = {path: [scale for scale in _SCALES if f"{path}.{scale}" not in names] for path in paths}
    why = {path: f"no {' and no '.join(scales)}" for path, scales in lacking.items() if scales}
    return _described(promised, [path for path in paths if path not in why], why)


def of_engine(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the attentions that are one kernel each against those that were promised.

    Raises:
        TypeError: the manifest is damaged.
    """
    request = object_of(manifest.get("request", {}), "request")
    promised = strings(request.get("promised_attentions", []), "promised_attentions")
    lost = manifest.get("lost_attentions", [])
    if not isinstance(lost, list):
        raise TypeError("lost_attentions is not a list")
    items = [object_of(item, "a member of lost_attentions") for item in lost]
    why = {str(item.get("attention")): str(item.get("reason")) for item in items}
    return _described(promised, [path for path in promised if path not in why], why)


def attention_lines(described: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what a terminal shows of it."""
    if described is None:
        return
    told = "" if described["promised"] is None else f", promised {len(described['promised'])}"
    yield f"  attention in FP8: {len(described['fp8'])}{told}"
    for item in described["differing"]:
        yield f"    {item['path']}: {item['reason']}"


def _described(promised: Iterable[str] | None, found: Iterable[str], why: Mapping[str, str]) -> dict[str, Any] | None:
    found, wanted = list(found), list(promised or ())
    if not wanted and not found:
        return None
    differing = [{"path": path, "reason": why.get(path, "it is not there")} for path in wanted if path not in found]
    unasked = [] if promised is None else [path for path in found if path not in wanted]
    differing += [{"path": path, "reason": "nothing promises it"} for path in unasked]
    return {"fp8": found, "promised": None if promised is None else wanted, "differing": differing}
