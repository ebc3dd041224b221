"""The recipes that look at activations, on one double and one single block of FLUX.1, to an engine; against plain PTQ.

Each recipe quantizes the same checkpoint, whose weights are heavy-tailed, for the same captured inputs, in a process of
its own: peak RSS is of that process; core-seconds are of each block and of each stage in it. Then its result is
exported, validated on a few tokens and built for the RTX 5090. Core-seconds, since they tell the same on a busy
machine; run it with OMP_NUM_THREADS=1, or threads that wait for each other count too. How far the blocks' outputs are
from the plain ones says what the recipe is worth on these weights (`measure/block_errors.py`).

From the two blocks all of FLUX.1-dev's 19 + 38 are extrapolated for this processor. For a GPU there is an estimate,
of which nothing is measured: multiplications and additions counted by shape, at half of an RTX 5090's peak (`RATES`),
and operators of torch, which are counted while they run here, at 5 microseconds each: a kernel takes about as long to
be launched (`LAUNCH`).

`python benchmarks/full_width.py --size 1+1x24` is FLUX.1-dev's width, and takes an hour and a half of one core.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure.checkpoints import Size, plain_with_inputs
from measure.child import ROOT, fp4trt, run
from measure.result import machine, publish
from measure.work import Data, groups_of, work_of

from calibration.recipes.recipe import load_recipe

RECIPES = ["nvfp4-ptq", "nvfp4-quality", "svdquant-r32"]
GPU = "rtx5090"
STAGES = ROOT / "benchmarks" / "measure" / "stages.py"
ERRORS = ROOT / "benchmarks" / "measure" / "block_errors.py"
FULL = {"transformer_blocks.0": 19, "single_transformer_blocks.0": 38}
REAL = Data(50, 4096, 512)
"""What a model would be calibrated on: 50 states of pictures of 1024 x 1024."""
BY_PRODUCTS = ("runs", "smoothing", "maxima")
"""Stages whose work grows as that of a run does; `moments` takes as many rows of each call."""

RATES = {"bf16": 100e12, "fp32": 50e12, "fp64": 0.8e12}
"""Half of an RTX 5090's dense peak (209, 105 and 1.6 TFLOP/s), multiplications and additions counted apart."""
LAUNCH = 5e-6


Row = dict[str, Any]


def measure(recipe: str, source: Path, inputs: Path, folder: Path) -> tuple[Row, list[Row], list[Row]]:
    """Take a recipe to an engine; return its row, one for each stage of each block, and one for each block's errors."""
    result = folder / recipe
    words = [str(source), "-o", str(result), "--recipe", recipe, "--calibration", str(inputs)]
    cost = run([sys.executable, str(STAGES), *words])
    blocks: Mapping[str, Mapping[str, float]] = cost.answer["blocks"]
    taken = {block: sum(stages.values()) for block, stages in blocks.items()}
    print(f"{recipe}: {cost.core_seconds:.0f} core-s, {cost.peak_rss / 1e9:.2f} GB", file=sys.stderr)
    missed = run([sys.executable, str(ERRORS), str(source), str(result), str(inputs)]).answer
    export = fp4trt("export", result)
    validate = fp4trt("validate", result, "--level", "blocks", "--tokens", "64,16")
    build = fp4trt("build", result, "--gpu", GPU, "-o", folder / "rtx5090.engine")
    print(f"{recipe}: built", file=sys.stderr)
    shutil.rmtree(result)
    row = {
        "recipe": recipe,
        "core-s": cost.core_seconds,
        "double block": taken["transformer_blocks.0"],
        "single block": taken["single_transformer_blocks.0"],
        "beside": cost.core_seconds - sum(taken.values()),
        "seconds": cost.seconds,
        "peak RSS MB": cost.peak_rss / 1e6,
        "export s": export.seconds,
        "validated": "passed" if validate.answer["passed"] else "failed",
        "build s": build.seconds,
        "FP4": "{fp4_gemms} GEMMs, {fp4_linears} of {quantized_linears} linears".format(**build.answer),
    }
    stages = [
        {"recipe": recipe, "block": block, "stage": stage, "core-s": seconds}
        for block, found in blocks.items()
        for stage, seconds in found.items()
    ]
    errors = [
        {"recipe": recipe, "block": block, **{f"{call}, %": 100 * error for call, error in found.items()}}
        for block, found in missed.items()
    ]
    return row, stages, errors


def extrapolated(stages: list[Row], size: Size, data: Data) -> list[Row]:
    """Return what all of FLUX.1-dev's blocks take: core-hours here, and by estimate minutes on a GPU."""
    rows = []
    for recipe in dict.fromkeys(stage["recipe"] for stage in stages):
        options = load_recipe(recipe).method
        for given in (data, REAL):
            cores, gpu = 0.0, dict.fromkeys([*RATES, "launches"], 0.0)
            for block, count in FULL.items():
                mine = [stage for stage in stages if (stage["recipe"], stage["block"]) == (recipe, block)]
                measured, work = (
                    work_of(options, groups_of(size, block, each), each, 128 * size.heads) for each in (data, given)
                )
                more = dict.fromkeys(BY_PRODUCTS, work["bf16"] / measured["bf16"])
                more["moments"] = given.calls / data.calls
                cores += count * sum(stage["core-s"] * more.get(stage["stage"], 1) for stage in mine)
                gpu = {key: gpu[key] + count * work[key] for key in gpu}
            seconds = {key: gpu[key] / rate for key, rate in RATES.items()} | {"launches": gpu["launches"] * LAUNCH}
            rows.append(
                {
                    "recipe": recipe,
                    "calls": given.calls,
                    "tokens": given.image + given.text,
                    "CPU, core-h": cores / 3600,
                    **{f"{key} TFLOP": gpu[key] / 1e12 for key in RATES},
                    "kernels M": gpu["launches"] / 1e6,
                    "GPU, min (estimate)": sum(seconds.values()) / 60,
                    "of it launches": seconds["launches"] / 60,
                }
            )
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", default="1+1x4", help="1+1xHEADS")
    options.add_argument(
        "--recipe", action="append", help="more than once for several; the first is what is compared to"
    )
    options.add_argument("--calls", type=int, default=4, help="captured inputs")
    options.add_argument("--tokens", default="1024,512", help="IMAGE,TEXT of each")
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    chosen = options.parse_args()
    size, data = Size.parse(chosen.size), Data(chosen.calls, *map(int, chosen.tokens.split(",")))
    before, rows, stages, errors = machine(), [], [], []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        source, inputs = plain_with_inputs(folder, size, chosen.calls, chosen.tokens)
        for recipe in chosen.recipe or RECIPES:
            row, found, missed = measure(recipe, source, inputs, folder)
            rows.append(row)
            stages += found
            errors += missed
            print(row, found, missed, file=sys.stderr)
    for row in rows:
        row["x the first"] = row["core-s"] / rows[0]["core-s"]
        row["its RSS, x"] = row["peak RSS MB"] / rows[0]["peak RSS MB"]
    at = f"{data.calls} calls of {data.image} + {data.text} tokens, width {128 * size.heads}"
    publish("full_width", rows, [f"{at}; seconds of core for each block."], before)
    publish("full_width_stages", stages, [], before)
    told = "L2 norm of what differs in the output, relative to what the block adds to its input"
    publish("full_width_errors", errors, [f"{told}; one call of each kind."], before)
    notes = ["The GPU was not measured: counted work at the rates and the launch time that this script states."]
    publish("full_width_all_blocks", extrapolated(stages, size, data), notes, before)


if __name__ == "__main__":
    main()
