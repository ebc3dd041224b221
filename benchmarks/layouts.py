"""What each reading of NVFP4 and FP8 bytes makes of each layout: relative errors, and seconds a linear.

On weights as wide as FLUX.1-dev's, with (a) Gaussian elements and (b) ones whose rows and columns differ in size as a
log-normal (sigma 0.5) says, and on (c) the trained weights of the built-in model. Prints the tables of
docs/interchange.md; `--write` puts them there. The files are written and removed again one at a time: the largest has
0.1 GB, and its source 0.2.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from measure.result import machine, publish  # noqa: E402

from fp4trt.any_checkpoint import open_checkpoint  # noqa: E402
from onnx_functions.layouts.fits import Fit, fits_of  # noqa: E402
from onnx_functions.layouts.names import index_of, stretches_of  # noqa: E402
from onnx_functions.layouts.sources import quantized_linears  # noqa: E402
from tests.onnx_functions.layout_writer import LAYOUTS, write_layout, write_source  # noqa: E402

SHAPES = {"attention": (3072, 3072), "MLP": (12288, 3072), "proj_out": (3072, 15360)}
SPREAD = 0.5
BEGIN, END = "<!-- table: written by benchmarks/layouts.py --write -->", "<!-- end of the table -->"
FP4 = ("unified", "four over six", "swizzled", "nibbles swapped", "ComfyUI", "reciprocal")
FP8 = ("fp8", "scaled fp8 in E5M2", "fp8 with a reciprocal scale")
READINGS = {
    "unified": ("row-major", "low first", "multiplier"),
    "swizzled": ("cuBLAS 128x4 tiles", "low first", "multiplier"),
    "nibbles swapped": ("row-major", "high first", "multiplier"),
    "ComfyUI": ("cuBLAS 128x4 tiles", "high first", "multiplier"),
    "reciprocal": ("row-major", "low first", "reciprocal"),
}
FP8_READINGS = {
    "E4M3": ("E4M3", "multiplier"),
    "E5M2": ("E5M2", "multiplier"),
    "E4M3, reciprocal": ("E4M3", "reciprocal"),
}

Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def weights_of() -> Iterator[tuple[str, Weights]]:
    """Yield what is measured: a name, and weights [N, K] of BF16 values."""
    for kind, spread in (("Gaussian", 0.0), ("log-normal", SPREAD)):
        for name, (rows, columns) in SHAPES.items():
            rng = np.random.default_rng(rows + columns)
            value = rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)
            value *= np.exp(spread * rng.standard_normal((rows, 1))).astype(np.float32)
            value *= np.exp(spread * rng.standard_normal((1, columns))).astype(np.float32)
            yield kind, {name: value}
    built_in = open_checkpoint("digits")
    index = index_of({n: s.held.shape for n, s in built_in.tensors.items() if len(s.held.shape) == 2})
    wide = {path: rows for path, rows in index.items() if is_wide(built_in.held[rows.tensor].shape)}
    yield (
        "built-in model",
        {path: stored(built_in.tensors[rows.tensor]) for path, rows in wide.items()},
    )


def is_wide(shape: tuple[int, ...]) -> bool:
    """Whether swizzling does not show in the shape of the block scales."""
    return shape[0] % 128 == 0 and shape[1] % 64 == 0


def stored(tensor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Read a weight of a checkpoint whole."""
    raw = tensor.span(0, tensor.held.nbytes).view(ml_dtypes.bfloat16)
    return np.asarray(raw.astype(np.float32).reshape(tensor.held.shape))


def errors_of(fits: list[Fit], readings: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    """Return the relative error of each of some readings."""
    found = {}
    for name, wanted in readings.items():
        for fit in fits:
            kind = fit.reading
            told = (kind.block_scales, kind.nibbles, fit.global_scale)
            told8 = (kind.number, fit.global_scale)
            if wanted in (told, told8) and kind.orientation == "rows" and fit.moved == "nothing":
                found[name] = fit.error
    return found


def measure(folder: Path) -> tuple[dict[tuple[str, str], dict[str, list[float]]], dict[tuple[int, ...], float]]:
    """Return the errors by kind of weights and true layout, and the seconds that a linear takes by its shape."""
    errors: dict[tuple[str, str], dict[str, list[float]]] = {}
    seconds: dict[tuple[int, ...], float] = {}
    for kind, weights in weights_of():
        source = open_checkpoint(write_source(folder / "bf16.safetensors", weights))
        index = index_of({name: each.held.shape for name, each in source.tensors.items()})
        for layout in (*FP4, *FP8):
            theirs = open_checkpoint(write_layout(folder / "theirs.safetensors", layout, weights))
            for path, linear in quantized_linears(theirs.tensors)[0].items():
                started = time.perf_counter()
                fits, _ = fits_of(linear, stretches_of(path, index), source.tensors)
                took = time.perf_counter() - started
                shape = weights[path].shape
                seconds[shape] = max(seconds.get(shape, 0.0), took)
                for reading, error in errors_of(fits, READINGS if layout in FP4 else FP8_READINGS).items():
                    errors.setdefault((kind, layout), {}).setdefault(reading, []).append(error)
            print(kind, ", ".join(weights) if len(weights) < 3 else f"{len(weights)} linears", layout, file=sys.stderr)
    return errors, seconds


def shown(values: list[float] | None) -> str:
    """Return errors as their range."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    if low > 100:
        return f"above {10.0 ** int(np.log10(low)):.0e}"
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def tables(errors: Mapping[tuple[str, str], Mapping[str, list[float]]]) -> Iterator[str]:
    """Yield the lines of docs/interchange.md's tables."""
    for layouts, readings in ((FP4, READINGS), (FP8, FP8_READINGS)):
        yield "| weights | written as | " + " | ".join(f"read as {name}" for name in readings) + " |"
        yield "|---|---|" + "---:|" * len(readings)
        for (kind, layout), found in errors.items():
            if layout in layouts:
                yield f"| {kind} | {layout} | " + " | ".join(shown(found.get(name)) for name in readings) + " |"
        yield ""


def main() -> None:
    """Print the tables and write build/benchmarks/layouts.json."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=None, help="on which disk the files are written")
    options.add_argument("--write", action="store_true", help="renew the tables of docs/interchange.md")
    chosen = options.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        errors, seconds = measure(Path(folder))
    lines = list(tables(errors))
    print("\n".join(lines))
    rows = [{"shape": f"{n}x{k}", "seconds a linear, at most": took} for (n, k), took in sorted(seconds.items())]
    publish(
        "layouts", rows, ["All readings of one linear, with the reading of its tiles from the disk's cache."], before
    )
    result = ROOT / "build" / "benchmarks" / "layouts_errors.json"
    told = [{"weights": kind, "written as": layout, "errors": found} for (kind, layout), found in errors.items()]
    result.write_text(json.dumps(told, indent=1), encoding="utf-8")
    if chosen.write:
        page = ROOT / "docs" / "interchange.md"
        head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text("\n".join([head + BEGIN, "", *lines, END + rest.partition(END)[2]]), encoding="utf-8")


if __name__ == "__main__":
    assert set(FP4) | set(FP8) <= set(LAYOUTS)
    main()
