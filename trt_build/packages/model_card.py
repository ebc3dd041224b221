"""The model card of a quantized checkpoint, written from its manifest: README.md as the hub reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from statistics import fmean
from typing import Any, Final

from fp4trt.number_formats import FORMATS

__all__ = ["Facts", "absolute_paths", "model_card"]

_FIGURES: Final = {
    "error": "error of a linear's output on calibration data, relative to the output",
    "plain_error": "the same, had its weight been rounded to nearest",
    "weight_error": "error of a weight, relative to the weight",
    "residual": "what a low-rank branch leaves of a weight, relative to the weight",
}
"""Figures of blocks in the manifest, and what they are."""

_BRANCHED: Final = {"svdquant": "of these with a low-rank branch in 16 bit"}

_SHARED: Final = {
    "weight_own": "mean error of the weights, relative to them, had each linear a global scale of its own",
    "weight_shared": "the same with the scales that merged linears share",
}


@dataclass(frozen=True)
class Facts:
    """What a card says besides the manifest.

    Attributes:
        sizes: file to bytes.
        base_model: hub name of what was quantized, or None.
        license: its identifier on the hub, or None.
        license_name: where that is ``other``, what it is called, or None.
        has_graph: whether the graph lies beside the checkpoint.
    """

    sizes: Mapping[str, int]
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    has_graph: bool = False


def model_card(manifest: Mapping[str, Any], facts: Facts) -> str:
    """Return the card: metadata in YAML, then Markdown. It names no folder of this machine."""
    shown = _without_folders(manifest)
    parts = (
        _metadata(shown, facts),
        _opening(shown, facts),
        _use(facts),
        _made_of(shown),
        _errors(shown),
        _files(shown, facts),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def absolute_paths(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value that is an absolute path, of a POSIX system or of Windows."""
    if isinstance(value, str) and _is_absolute(value):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from absolute_paths(inner)


def _metadata(manifest: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    """Yield the front matter. A JSON text is a YAML one, whatever is in it."""
    yield "---"
    if facts.base_model is not None:
        yield f"base_model: {json.dumps(facts.base_model)}"
        yield "base_model_relation: quantized"
    yield "library_name: fp4trt"
    for key, value in (("license", facts.license), ("license_name", facts.license_name)):
        if value is not None:
            yield f"{key}: {json.dumps(value)}"
    yield "tags:"
    for tag in dict.fromkeys(("fp4trt", *manifest["quantized"], "modelopt", "tensorrt", manifest["family"])):
        yield f"- {json.dumps(tag)}"
    yield "---"


def _opening(manifest: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    recipe, family = manifest["recipe"]["name"], manifest["family"]
    name = (facts.base_model or family).rpartition("/")[2]
    of = (
        f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
        if facts.base_model
        else "a diffusion transformer"
    )
    yield from ("", f"# {name}, {recipe}", "")
    yield f"The transformer of {of} (family `{family}`), quantized by fp4trt with the recipe `{recipe}`,"
    yield "in the layout of ModelOpt's unified export. Text encoders and the VAE are those of the base model."
    yield from ("", "| linears in | count |", "|---|---:|")
    for kind, paths in manifest["quantized"].items():
        yield f"| {FORMATS[kind].title if kind in FORMATS else _BRANCHED.get(kind, kind)} | {len(paths)} |"
    attentions = manifest.get("attention", {}).get("fp8", ())
    yield from ("", "All other linears are in 16 bit.")
    if attentions:
        yield f"{len(attentions)} attentions are computed in FP8."


def _use(facts: Facts) -> Iterator[str]:
    yield from ("", "## Use", "", "```", "hf download OWNER/NAME --local-dir model")
    if not facts.has_graph:
        yield "fp4trt export model                       # the ONNX graph, on these weights"
    yield "fp4trt validate model                     # the graph against the checkpoint, without a GPU"
    yield "fp4trt build model --gpu rtx5090          # a TensorRT engine, without the card"
    yield from ("```", "", 'In torch, computing what the engine computes: `fp4trt.load("model")`.')


def _made_of(manifest: Mapping[str, Any]) -> Iterator[str]:
    calibration = manifest["calibration"]
    keys = ("calls", "family", "sha256", "inputs_sha256")
    told = [
        f"{key} {each[key]}" for each in (calibration, *calibration.get("merged", ())) for key in keys if key in each
    ]
    yield from ("", "## How it was made", "")
    yield f"Calibrated on: {', '.join([str(calibration['data']), *told])}."
    yield from (f"\n{warning}" for warning in calibration.get("warnings", ()))
    yield f"\nVersions: {', '.join(f'{name} {version}' for name, version in sorted(manifest['versions'].items()))}."
    yield from ("", "The recipe:", "", "```json", json.dumps(manifest["recipe"], indent=2, sort_keys=True), "```")


def _errors(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures that were measured while quantizing; nothing where there are none."""
    found: dict[str, list[float]] = {}
    for name, value in _numbers(manifest.get("blocks", {})):
        found.setdefault(name, []).append(value)
    rows = [
        f"| {words} | {len(found[name])} | {fmean(found[name]):.4f} | {max(found[name]):.4f} |"
        for name, words in _FIGURES.items()
        if name in found
    ]
    shared = manifest.get("sharing_cost", {})
    rows += [f"| {words} | | {shared[name]:.4f} | |" for name, words in _SHARED.items() if name in shared]
    if rows:
        yield from (
            "",
            "## Measured while it was quantized",
            "",
            "| figure | linears | mean | largest |",
            "|---|---:|---:|---:|",
        )
        yield from rows


def _files(manifest: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    yield from ("", "## Files", "", "| file | bytes | SHA-256 |", "|---|---:|---|")
    for name, size in facts.sizes.items():
        yield f"| `{name}` | {size:,} | {manifest['files'].get(name, '')} |"
    yield from ("", "Quantized from:", "", "| file | SHA-256 |", "|---|---|")
    yield from (f"| `{name}` | {digest} |" for name, digest in manifest["source"].items())


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Yield the figures in the entries of blocks, at whatever depth a method puts them."""
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        if name in _FIGURES and isinstance(inner, int | float):
            yield name, float(inner)
        yield from _numbers(inner)


def _without_folders(value: Any) -> Any:
    """Return a JSON value in which each absolute path is the name of its file alone, and no text has several lines."""
    if isinstance(value, Mapping):
        return {str(_without_folders(key)): _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str):
        named = PureWindowsPath(value).name if _is_absolute(value) else value
        return " ".join(named.replace("|", "/").split())
    return value


def _is_absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
