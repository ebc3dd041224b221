"""A model of a published config, with seeded weights, all the way: quantize, export, validate by blocks, build.

`python benchmarks/real_size.py` takes FLUX.2 klein-4B (3.9 B parameters, 7.8 GB in BF16) by `nvfp4-ptq`; `--model`
takes another of `synthetic/published.py`. Each step is a process of its own; peak RSS adds up what it starts. What the
weights hold is random, so the figures say that and at what cost the road is gone, and nothing about pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure.child import ROOT, Cost, fp4trt, run
from measure.result import machine, publish
from synthetic.published import PUBLISHED

SYNTHETIC = ROOT / "benchmarks" / "synthetic" / "flux.py"


def row_of(step: str, cost: Cost, made: str) -> dict[str, Any]:
    print(f"{step}: {cost.seconds:.0f} s, {cost.peak_rss / 1e9:.1f} GB, {made}", file=sys.stderr)
    row = {"step": step, "seconds": cost.seconds, "core-s": cost.core_seconds}
    return {**row, "peak RSS GB": cost.peak_rss / 1e9, "result": made}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=PUBLISHED, default="klein-4b")
    options.add_argument("--gpu", default="rtx5090")
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    chosen = options.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as place:
        source, result = Path(place) / "model", Path(place) / "model-fp4"
        run([sys.executable, str(SYNTHETIC), str(source), "--model", chosen.model])
        amax = ["--recipe", "nvfp4-ptq", "--calibration", source.with_name("amax.json")]
        packed = fp4trt("quantize", source, "-o", result, *amax)
        rows = [row_of("quantize", packed, f"{packed.answer['bytes'] / 1e9:.2f} GB")]
        graph = fp4trt("export", result)
        rows.append(row_of("export", graph, f"{graph.answer['nodes']} nodes"))
        checked = fp4trt("validate", result, "--level", "blocks")
        rows.append(row_of("validate --level blocks", checked, "passed" if checked.answer["passed"] else "FAILED"))
        built = fp4trt("build", result, "--gpu", chosen.gpu)
        covered = f"{built.answer['fp4_gemms']} FP4 GEMMs of {built.answer['fp4_linears']} linears"
        rows.append(row_of("build", built, f"{covered}, {built.answer['engine_bytes'] / 1e9:.2f} GB"))
    publish("real_size", rows, [f"{chosen.model}, nvfp4-ptq, {chosen.gpu}."], before)


if __name__ == "__main__":
    main()
