"""The recipe nvfp4-quality on a GPU: whether it gives what the CPU gives, and what FLUX.1-dev's blocks take.

1. `kernels`: blocks of 16 columns through the loops of GPTQ and descent, on the GPU as `torch.compile` makes them and
   on the CPU as Numba does. Nothing is added up in another order, so that values and scales have to be equal bit for
   bit.
2. `weights`: whole weights through GPTQ and descent under the same moments. Products of matrices are added up in
   another order there, and where two codes cost nearly the same the other one may be taken: the output's error may be
   larger by `BOUND` of itself at most; the share of values that differ is reported.
3. `blocks`: one double and one single block of FLUX.1-dev's width through `fp4trt quantize --device cuda`, seconds by
   stage, extrapolated to all 19 + 38; peak GPU memory.

Exits with 1 where 1 or 2 does not hold, and with 0 and a line where there is no GPU. Eight minutes at most on one card.
`--device cpu` runs the first two on the CPU's own compiler, to try the script.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure.checkpoints import Size, plain_with_inputs
from measure.child import ROOT, run
from measure.result import machine, publish

from calibration.formats import nvfp4
from calibration.methods.quality import column_rounding, gptq

BOUND = 1e-3
"""Allowed relative difference of the root mean square error of a weight's output."""

STAGES = ROOT / "benchmarks" / "measure" / "stages.py"
RECIPES = ["nvfp4-quality", "nvfp4-quality-r32"]
FULL = {"transformer_blocks.0": 19, "single_transformer_blocks.0": 38}
SHAPES = [(3072, 3072), (2048, 12288)]


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a heavy-tailed weight, damped moments of correlated inputs with large channels, and a global scale."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.02
    weight[torch.rand(rows, columns, generator=random) < 1e-4] *= 15
    few = torch.randn(2 * columns, 64, generator=random) @ torch.randn(64, columns, generator=random) / 8
    inputs = few + torch.randn(2 * columns, columns, generator=random)
    inputs *= torch.exp(0.8 * torch.randn(columns, generator=random))
    rounded = nvfp4.fake_quantize(inputs, nvfp4.global_scale(inputs.abs().max()))
    moments = rounded.T @ rounded / len(rounded)
    moments.diagonal().add_(0.01 * moments.diagonal().mean())
    return weight, moments, nvfp4.global_scale(weight.abs().max())


def same_kernels(device: str, rows: int) -> list[dict[str, Any]]:
    """Return a row for each loop: how many of its results differ from the CPU's."""
    weight, moments, _ = problem(rows, 16, 0)
    root = gptq.root(moments)
    largest = weight.abs().amax(dim=1)
    step = torch.stack([largest / 6 * factor for factor in (0.7, 0.85, 1, 1.2, 1.5)])
    given = (weight, 0.1 * weight.roll(1, 0), step, root.rows.T.contiguous(), root.weights)
    start, best = column_rounding.feed_back(*given)
    last = torch.cat([step, step.gather(0, best.unsqueeze(0))])
    moved = (start, (start - weight) @ moments, last, moments, torch.linalg.inv(moments), given[3])
    calls = (
        ("GPTQ", column_rounding.feed_back, column_rounding.feed_back_in_torch, given, ()),
        ("descent", column_rounding.descend, column_rounding.descend_in_torch, moved, (1,)),
    )
    found = []
    for name, on_cpu, in_torch, arguments, more in calls:
        wanted = on_cpu(*arguments, *more)
        there = in_torch(*(value.to(device) for value in arguments), *more, column_rounding.fused)
        differ = sum(int((one.cpu() != other).sum()) for one, other in zip(there, wanted, strict=True))
        found.append({"loop": name, "rows": rows, "results that differ": differ})
    return found


def same_weights(device: str, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return a row for each weight: the output's error here and there, and how many values differ."""
    rows = []
    for shape in shapes:
        weight, moments, scale = problem(*shape, 1)
        results = []
        for place in ("cpu", device):
            given = tuple(value.to(place) for value in (weight, moments, scale))
            start = gptq.round_with_feedback(given[0], gptq.root(given[1]), given[2])
            values = gptq.descend(*given, start, 1).values.cpu()
            results.append((values, gptq.error(values, weight, moments) ** 0.5))
        (here, error), (there, other) = results
        differ = float((here != there).float().mean())
        rows.append({"weight": f"{shape[0]}x{shape[1]}", "values that differ": differ, "error, x": other / error})
    return rows


def blocks(size: Size, calls: int, tokens: str, recipes: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each stage of each block, and a sentence for each recipe."""
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as name:
        source, inputs = plain_with_inputs(Path(name), size, calls, tokens)
        for recipe in recipes:
            words = [str(source), "-o", str(Path(name) / recipe), "--recipe", recipe, "--calibration", str(inputs)]
            cost = run([sys.executable, str(STAGES), *words, "--device", "cuda"])
            taken = {block: sum(stages.values()) for block, stages in cost.answer["blocks"].items()}
            rows += [
                {"recipe": recipe, "block": block, "stage": stage, "s": seconds}
                for block, stages in cost.answer["blocks"].items()
                for stage, seconds in stages.items()
            ]
            whole = sum(FULL[block] * seconds for block, seconds in taken.items()) / 60
            each = ", ".join(f"{block} {seconds:.1f} s" for block, seconds in taken.items())
            memory = cost.answer["gpu_bytes"] / 1e9
            notes.append(f"{recipe}: {each}; all 19 + 38 blocks {whole:.0f} min; {memory:.1f} GB of the GPU.")
    return rows, notes


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--size", default="1+1x24", help="1+1xHEADS")
    options.add_argument("--calls", type=int, default=4, help="captured inputs")
    options.add_argument("--tokens", default="1024,512", help="IMAGE,TEXT of each")
    options.add_argument("--recipe", action="append", help="more than once for several")
    chosen = options.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA GPU; --device cpu tries the comparison on the CPU")
        return
    size = Size.parse(chosen.size)
    before, on_gpu = machine(), chosen.device == "cuda"
    loops = same_kernels(chosen.device, 1 << 16 if on_gpu else 4096)
    publish("gpu_quality_kernels", loops, ["The same bits are expected: 0 that differ."], before)
    weights = same_weights(chosen.device, SHAPES if on_gpu else [(64, 256)])
    notes = [f"Expected of the error: within {BOUND} of the CPU's."]
    publish("gpu_quality_weights", weights, notes, before)
    if on_gpu:
        publish(
            "gpu_quality",
            *blocks(size, chosen.calls, chosen.tokens, chosen.recipe or RECIPES),
            before,
        )
    same = all(not row["results that differ"] for row in loops)
    if not (same and all(abs(row["error, x"] - 1) <= BOUND for row in weights)):
        sys.exit("the GPU does not give what the CPU gives")


if __name__ == "__main__":
    main()
