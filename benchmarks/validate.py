"""`fp4trt validate` against one evaluation of the same graph by onnx's own ReferenceEvaluator.

The ReferenceEvaluator is the other program that runs the deployable graph, FP4 and all, on a CPU; it gives the values
of one run and no verdict. `fp4trt validate` compares every weight, quantizer and linear with the checkpoint beside it.

`python benchmarks/validate.py --checkpoint DIR --words --level blocks` validates an exported checkpoint that is there,
with further words for the command; at such a size the ReferenceEvaluator is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from measure.checkpoints import exported, tensor_bytes  # noqa: E402
from measure.child import fp4trt, itself  # noqa: E402
from measure.result import machine, publish  # noqa: E402

SIZES = ["digits", "1+1x2"]  # deeper ones of random weights are chaotic from end to end
TOKENS = {"batch": 1, "image_tokens": 16, "text_tokens": 8}


def evaluate(checkpoint: Path) -> None:
    """Be the program to compare with: one run of the graph, whose own seconds are printed."""
    import ml_dtypes
    import torch

    from fp4trt.families import family_of
    from onnx_functions.simulation.reference_ops import reference_evaluator

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    inputs = family_of(config).example_inputs(config, tuple(TOKENS.values()), seed=0, dtype=torch.bfloat16)
    kinds = {torch.bfloat16: ml_dtypes.bfloat16}
    feeds = {name: x.float().numpy().astype(kinds.get(x.dtype, "float32")) for name, x in inputs.items()}
    evaluator = reference_evaluator(checkpoint / "model.onnx")
    started = time.perf_counter()
    evaluator.run(None, feeds)
    print(json.dumps({"run_seconds": time.perf_counter() - started}))


def row_of(name: str, checkpoint: Path, folder: Path, words: list[str], rival: bool) -> dict[str, Any]:
    """Validate a checkpoint's graph, and evaluate it once."""
    ours = fp4trt("validate", checkpoint, "-o", folder / "report", *words)
    theirs = itself("--evaluate", checkpoint) if rival else None
    print(f"{name}: {ours.seconds:.1f} s", file=sys.stderr)
    return {
        "size": name,
        "weights MB": tensor_bytes(checkpoint) / 1e6,
        "validate s": ours.seconds,
        "core-s": ours.core_seconds,
        "peak RSS MB": ours.peak_rss / 1e6,
        "evaluator s": theirs and theirs.seconds,
        "of it the run": theirs and theirs.answer["run_seconds"],
        "evaluator's RSS MB": theirs and theirs.peak_rss / 1e6,
        "ratio": theirs and ours.seconds / theirs.seconds,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", action="append", help="digits, or DOUBLE+SINGLExHEADS; more than once for several")
    options.add_argument("--checkpoint", type=Path, help="an exported checkpoint to validate after the synthetic ones")
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    options.add_argument("--words", nargs=argparse.REMAINDER, default=[], help="further words for fp4trt validate")
    options.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.evaluate:
        evaluate(chosen.evaluate)
        return
    before, rows = machine(), []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        for size in chosen.size or ([] if chosen.checkpoint else SIZES):
            checkpoint = exported(folder, size)
            rows.append(row_of(size, checkpoint, folder, chosen.words, rival=True))
            shutil.rmtree(checkpoint)
        if chosen.checkpoint:
            rows.append(row_of(chosen.checkpoint.name, chosen.checkpoint, folder, chosen.words, rival=False))
    notes = ["ratio: of a whole validation to one evaluation, start and libraries of both included."]
    publish("validate", rows, notes, before)


if __name__ == "__main__":
    main()
