"""`fp4trt quantize` in one process against `--workers` and, where Ray is installed, a local Ray with as many workers.

Threads are counted fairly: every process computes on one thread (`OMP_NUM_THREADS=1`), so that one process uses one
core and N workers use N. Each runs in a process of its own, Python and its libraries included, on one checkpoint of
several blocks and the same captured inputs; the bytes of the results are compared. Core-seconds are of the process and
of all that it started: what the workers cost beyond one process is their start. "of one process" is the ratio of the
clock.

`python benchmarks/workers.py --size 2+4x8` takes longer, and hides less of the ratio behind the start.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure.checkpoints import Size, plain_with_inputs, tensor_files
from measure.child import fp4trt
from measure.result import machine, publish


def measure(words: list[str], source: Path, inputs: Path, recipe: str, result: Path) -> dict[str, Any]:
    """Quantize by some workers; return what that took, and a hash of the weights."""
    cost = fp4trt("quantize", source, "-o", result, "--recipe", recipe, "--calibration", inputs, *words)
    digest = hashlib.sha256()
    for path in tensor_files(result):
        digest.update(path.read_bytes())
    shutil.rmtree(result)
    name = " ".join(words) or "one process"
    print(f"{name}: {cost.seconds:.1f} s, {cost.core_seconds:.1f} core-s", file=sys.stderr)
    row = {"workers": name, "seconds": cost.seconds, "core-s": cost.core_seconds, "peak RSS MB": cost.peak_rss / 1e6}
    return row | {"sha256": digest.hexdigest()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", default="3+6x4", help="DOUBLE+SINGLExHEADS")
    options.add_argument("--recipe", default="nvfp4-quality")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--calls", type=int, default=2, help="captured inputs")
    options.add_argument("--tokens", default="128,64", help="IMAGE,TEXT of each")
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    chosen = options.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    before, shared = machine(), ["--workers", str(chosen.workers)]
    runs = [[], shared, *([[*shared, "--ray"]] if importlib.util.find_spec("ray") else [])]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        source, inputs = plain_with_inputs(folder, Size.parse(chosen.size), chosen.calls, chosen.tokens)
        rows = [measure(words, source, inputs, chosen.recipe, folder / "result") for words in runs]
    first = rows[0]["sha256"]
    for row in rows:
        row["of one process"] = row["seconds"] / rows[0]["seconds"]
        row["same bytes"] = "yes" if row.pop("sha256") == first else "no"
    at = f"{chosen.size}, {chosen.calls} calls of {chosen.tokens} tokens, {chosen.recipe}; one thread a process."
    publish("workers", rows, [at], before)


if __name__ == "__main__":
    main()
