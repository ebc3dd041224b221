"""`fp4trt export`: how it grows with depth, and against ModelOpt's own road to an ONNX graph.

The road of ModelOpt is TorchScript (`torch.onnx.export(dynamo=False)`) and then its NVFP4QuantExporter, with the
patches that it needs on a CPU: they are listed in `measure/modelopt_onnx.py`. It packs the weights while it exports,
fp4trt while it quantizes; so its core-seconds are compared with `fp4trt quantize` and `fp4trt export` together, start
and libraries included. Of ModelOpt only the export itself is counted, from a model that is loaded, quantized and
calibrated in memory. Peak RSS is that of the whole process.

Sizes are DOUBLE+SINGLE blocks x heads of attention; FLUX.1-dev is 19+38x24. The export reads no weights, so its growth
with depth is measured on a narrow model (`--depth`). ModelOpt's export of `--against 1+3x8`, `2+3x12` and `1+4x24`
(100 M, 300 M and 1 B parameters) takes 1, 2 and 6 GB of memory. `--checkpoint DIR` adds a quantized checkpoint that is
there; its model.onnx is written anew. `--real wan-14b` makes the graph of a model of its published config in NVFP4, of
names and shapes alone: traced on the meta device, stamped, rewritten, not written, and not linted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from measure.checkpoints import Size, plain, quantized, tensor_bytes  # noqa: E402
from measure.child import Cost, fp4trt, itself  # noqa: E402
from measure.result import machine, publish  # noqa: E402
from synthetic.published import PUBLISHED  # noqa: E402

DEPTHS = ["1+1x4", "4+8x4", "19+38x4"]
AGAINST = ["1+3x8"]


def row_of(size: str, program: str, cost: Cost, written: int, ratio: float | None = None) -> dict[str, Any]:
    print(f"{size}: {program}", file=sys.stderr)
    return {
        "size": size,
        "program": program,
        "nodes": cost.answer.get("nodes"),
        "seconds": cost.seconds,
        "core-s": cost.core_seconds,
        "slower than fp4trt, x": ratio,
        "peak RSS MB": cost.peak_rss / 1e6,
        "written MB": written / 1e6,
    }


def depth_row(size: str, folder: Path) -> dict[str, Any]:
    """Export a quantized checkpoint of this size."""
    checkpoint = quantized(folder, Size.parse(size))
    row = checkpoint_row(size, checkpoint)
    shutil.rmtree(checkpoint)
    return row


def checkpoint_row(name: str, checkpoint: Path) -> dict[str, Any]:
    cost = fp4trt("export", checkpoint, "--force")
    return row_of(name, "fp4trt export", cost, cost.answer["onnx_bytes"])


def real_row(name: str) -> dict[str, Any]:
    """Make the graph of a published config."""
    cost = itself("--graph", name)
    return row_of(name, "graph in NVFP4, on the meta device", cost, 0)


def graph_of_config(name: str) -> dict[str, Any]:
    """Make such a graph in this process; return what is counted of it."""
    from calibration.checkpoints.quantized import Checkpoint
    from exporter.onnx_export import graph_of
    from fp4trt.families import family_of
    from fp4trt.number_formats import NVFP4

    class InNVFP4(Checkpoint):
        def of_format(self, name: str) -> tuple[str, ...]:
            return self.family.quantized(self.config) if name == NVFP4.name else ()

    config = PUBLISHED[name]
    family, checkpoint = family_of(config), InNVFP4(Path(), config, {}, {})
    leaders = {path: group[0] for group in family.groups(config) for path in group}
    return {"nodes": len(graph_of(checkpoint, leaders, "float32", lambda _: None).graph)}


def rows_against_modelopt(size: str, folder: Path) -> list[dict[str, Any]]:
    """Take one plain checkpoint down both roads."""
    source, amax = plain(folder, Size.parse(size))
    ours, theirs = folder / "ours", folder / "theirs"
    packing = fp4trt("quantize", source, "-o", ours, "--calibration", amax)
    export = fp4trt("export", ours)
    rival = itself("--modelopt", source, theirs)
    rows = [
        row_of(size, "fp4trt quantize", packing, tensor_bytes(ours)),
        row_of(size, "fp4trt export", export, export.answer["onnx_bytes"]),
    ]
    counted = Cost(rival.answer["seconds"], rival.answer["core_seconds"], rival.peak_rss, rival.disk_read, rival.answer)
    ratio = counted.core_seconds / (packing.core_seconds + export.core_seconds)
    rows.append(row_of(size, "ModelOpt TorchScript", counted, rival.answer["bytes"], ratio))
    for used in (source, ours, theirs):
        shutil.rmtree(used)
    return rows


def notes_on(depths: list[dict[str, Any]], against: list[list[dict[str, Any]]]) -> list[str]:
    notes = []
    for less in depths[:-1]:
        time, memory = (depths[-1][key] / less[key] for key in ("seconds", "peak RSS MB"))
        notes.append(
            f"{less['size']} to {depths[-1]['size']}: {time:.2f} times the seconds, {memory:.2f} the peak RSS."
        )
    for quantize, export, theirs in against:
        memory = theirs["peak RSS MB"] / max(quantize["peak RSS MB"], export["peak RSS MB"])
        notes.append(
            f"{theirs['size']}: ModelOpt takes {theirs['slower than fp4trt, x']:.1f} times the core-seconds of "
            f"fp4trt quantize and export together, and {memory:.1f} times the memory."
        )
    return notes


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--depth", action="append", help="a size to export with fp4trt alone")
    options.add_argument("--against", action="append", help="a size to export with ModelOpt too")
    options.add_argument("--checkpoint", type=Path, help="a quantized checkpoint to export after the synthetic ones")
    options.add_argument(
        "--real", action="append", choices=PUBLISHED, help="a model whose graph is made by its config alone"
    )
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    options.add_argument("--graph", choices=PUBLISHED, help=argparse.SUPPRESS)
    options.add_argument("--modelopt", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.graph:
        print(json.dumps(graph_of_config(chosen.graph)))
        return
    if chosen.modelopt:
        from measure.modelopt_onnx import export

        print(json.dumps(export(*chosen.modelopt)))
        return
    some = chosen.depth or chosen.against or chosen.checkpoint or chosen.real
    before = machine()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        depths = [depth_row(size, folder) for size in chosen.depth or ([] if some else DEPTHS)]
        if chosen.checkpoint:
            depths.append(checkpoint_row(chosen.checkpoint.name, chosen.checkpoint))
        real = [real_row(name) for name in chosen.real or []]
        against = [rows_against_modelopt(size, folder) for size in chosen.against or ([] if some else AGAINST)]
    rows = depths + real + [row for rival in against for row in rival]
    publish("export", rows, notes_on(depths, against), before)


if __name__ == "__main__":
    main()
