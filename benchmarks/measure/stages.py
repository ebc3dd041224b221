"""Run `fp4trt quantize` in this process and say, last, as JSON, what each stage of each block took.

`python benchmarks/measure/stages.py SOURCE -o OUT --recipe NAME ...`. What is wrapped are functions of the method, by
name; a stage's core-seconds are those of its function without what other stages took inside it. With `--device cuda`
they are seconds of the clock, each stage waiting until the GPU has ended what it was given.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class Stopwatch:
    """Core-seconds by block and stage; what belongs to no stage of a block is its `rest`."""

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self._clock = clock
        self.blocks: dict[str, dict[str, float]] = {}
        self._block = ""
        self._inside: list[float] = []
        self._closed = False

    def block(self, path: str, function: Callable[[], Any]) -> Any:
        """Run what makes a block."""
        self._block, self.blocks[path] = path, defaultdict(float)
        return self._timed("rest", function)

    def stage(self, name: str, function: Callable[..., Any], closed: bool = False) -> Callable[..., Any]:
        """Return a function that counts as a stage; of a closed one nothing counts as another."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._closed or not self._inside:
                return function(*args, **kwargs)
            self._closed = closed
            try:
                return self._timed(name, lambda: function(*args, **kwargs))
            finally:
                self._closed = False

        return wrapped

    def _timed(self, name: str, function: Callable[[], Any]) -> Any:
        self._inside.append(0.0)
        started = self._clock()
        try:
            return function()
        finally:
            taken, others = self._clock() - started, self._inside.pop()
            self.blocks[self._block][name] += taken - others
            if self._inside:
                self._inside[-1] += taken


def watch(stopwatch: Stopwatch) -> None:
    """Wrap what the methods are made of."""
    import calibration.formats.modelopt_backend  # noqa: F401  a second or two, that would be the first block's
    from calibration.by_block import input_statistics, one_block
    from calibration.methods import registry
    from calibration.methods.modelopt import svdquant
    from calibration.methods.quality import gptq, quantize_block

    def wrap(owner: Any, name: str, stage: str, closed: bool = False) -> None:
        setattr(owner, name, stopwatch.stage(stage, getattr(owner, name), closed))

    wrap(one_block._Run, "__call__", "runs")
    wrap(quantize_block, "fold_block", "folds")
    wrap(gptq, "root", "root")
    wrap(gptq, "round_with_feedback", "GPTQ")
    wrap(gptq, "descend", "descent")
    wrap(quantize_block._Work, "note", "figures")
    wrap(quantize_block, "wiener_target", "Wiener")
    wrap(svdquant, "smooth", "smoothing", closed=True)
    wrap(svdquant, "_split", "decomposition", closed=True)
    wrap(svdquant, "measure", "maxima", closed=True)

    watching = input_statistics._watching
    input_statistics._watching = lambda modules, add: watching(modules, stopwatch.stage("moments", add))

    of_block = registry.of_block

    def timed_method(*args: Any) -> Any:
        method = of_block(*args)
        return lambda task: stopwatch.block(task.path, lambda: method(task))

    registry.of_block = timed_method


def main() -> None:
    import fp4trt

    on_gpu = "cuda" in sys.argv
    stopwatch = Stopwatch(_when_the_gpu_is_done if on_gpu else time.process_time)
    watch(stopwatch)
    status = fp4trt.run(["quantize", *sys.argv[1:]])
    if status:
        sys.exit(status)
    answer = {"blocks": stopwatch.blocks, "core_seconds": time.process_time()}
    print(json.dumps(answer | ({"gpu_bytes": _gpu_peak()} if on_gpu else {})))


def _when_the_gpu_is_done() -> float:
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def _gpu_peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
