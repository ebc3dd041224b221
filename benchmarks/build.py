"""`fp4trt build` against a bare `build_serialized_network` of the same graph, for the same GPU and profile.

The bare program is the shortest that TensorRT-RTX needs: parse the file, one optimization profile, one compute
capability, build, write the bytes. What fp4trt does beside it (lint, hashes of the weights, the detailed log that shows
every kernel, the check that each linear got its FP4 GEMM) is the difference in time; that it streams the engine to the
disk is the difference in memory. Both run in a process of their own; peak RSS adds up what fp4trt starts.

`python benchmarks/build.py --checkpoint DIR` builds an exported checkpoint that is there, at its full size. `--bare no`
leaves the bare program out, which takes about 3.1 times the bytes of the weights in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure.checkpoints import exported, tensor_bytes
from measure.child import Cost, fp4trt, itself
from measure.result import machine, publish

SIZES = ["digits", "1+1x4", "1+1x24"]
GPU = "rtx5090"


def bare_build(model: str, request: dict[str, Any], target: Path) -> None:
    """Be the program to compare with."""
    import tensorrt_rtx as trt

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(model):
        raise RuntimeError(parser.get_error(0).desc())
    profile = builder.create_optimization_profile()
    for name, shapes in request["shapes"].items():
        profile.set_shape(name, *shapes)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    capabilities = request["compute_capabilities"]
    config.num_compute_capabilities = len(capabilities)
    for place, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), place)
    target.write_bytes(builder.build_serialized_network(network, config))


def rows_of(name: str, checkpoint: Path, folder: Path, bare: bool) -> list[dict[str, Any]]:
    """Build a checkpoint's model.onnx both ways."""
    engine = folder / "ours.engine"
    ours = fp4trt("build", checkpoint, "--gpu", GPU, "-o", engine)
    rows = [row_of(name, "fp4trt build", ours, checkpoint, engine)]
    if bare:
        request = {key: ours.answer[key] for key in ("shapes", "compute_capabilities")}
        other = folder / "bare.engine"
        theirs = itself("--bare-build", checkpoint / "model.onnx", json.dumps(request), other)
        rows.append(row_of(name, "bare TensorRT-RTX", theirs, checkpoint, other))
        rows[0]["ratio"] = ours.seconds / theirs.seconds
        rows[0]["ratio of RSS"] = ours.peak_rss / theirs.peak_rss
        other.unlink()
    for left in folder.glob("ours.*"):
        left.unlink()
    return rows


def row_of(name: str, program: str, cost: Cost, checkpoint: Path, engine: Path) -> dict[str, Any]:
    print(f"{name}: {program}, {cost.seconds:.1f} s", file=sys.stderr)
    return {
        "size": name,
        "weights MB": tensor_bytes(checkpoint) / 1e6,
        "program": program,
        "seconds": cost.seconds,
        "core-s": cost.core_seconds,
        "ratio": None,
        "peak RSS MB": cost.peak_rss / 1e6,
        "ratio of RSS": None,
        "engine MB": engine.stat().st_size / 1e6,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", action="append", help="digits, or DOUBLE+SINGLExHEADS; more than once for several")
    options.add_argument("--checkpoint", type=Path, help="an exported checkpoint to build after the synthetic ones")
    options.add_argument("--bare", choices=["yes", "no"], default="yes")
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    options.add_argument("--bare-build", nargs=3, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.bare_build:
        model, request, target = chosen.bare_build
        bare_build(model, json.loads(request), Path(target))
        return
    before, rows = machine(), []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder, bare = Path(name), chosen.bare == "yes"
        for size in chosen.size or ([] if chosen.checkpoint else SIZES):
            checkpoint = exported(folder, size)
            rows += rows_of(size, checkpoint, folder, bare)
            shutil.rmtree(checkpoint)
        if chosen.checkpoint:
            rows += rows_of(chosen.checkpoint.name, chosen.checkpoint, folder, bare)
    notes = ["ratio: of fp4trt build to the bare program, in seconds and in peak RSS."]
    publish("build", rows, notes, before)


if __name__ == "__main__":
    main()
