"""Time and memory of the lint: on the built-in model, and on a graph of many gigabytes that is made for it.

`python benchmarks/lint.py --gigabytes 7` writes a file of that size into --folder and removes it again; the default is
half a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[1]
ROWS, COLUMNS = 12288, 3072  # the MLP of a FLUX.1 block
SHARE_IN_16_BIT = 0.1

CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from onnx_functions.linting import lint
started = time.perf_counter()
report = lint(sys.argv[2])
seconds = time.perf_counter() - started
try:  # Linux; the peak that `resource` tells is inherited from the process that started this one
    status = open("/proc/self/status").read().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    read = int(next(line for line in open("/proc/self/io") if line.startswith("rchar")).split()[1])
except OSError:
    import psutil
    peak, read = getattr(psutil.Process().memory_info(), "peak_wset", -1), -1
print(seconds, peak, read, report.passed, len(report.findings))
"""


def write_model(folder: Path, gigabytes: float) -> Path:
    """Write a graph of NVFP4 weights, and a tenth in 16 bit, whose data takes about so many bytes."""
    random = np.random.default_rng(0)
    codes = np.zeros(ROWS * COLUMNS // 2, np.uint8)
    scales = random.integers(0x30, 0x60, ROWS * COLUMNS // 16, np.uint8)
    plain = (random.standard_normal(ROWS * COLUMNS).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    codes[-1] = 1  # the lint reads codes up to the first that is not zero: here all
    nodes, tensors, spans, position = [], [], [], 0
    with (folder / "weights.bin").open("wb") as file:

        def store(name: str, kind: int, dims: list[int], raw: bytes) -> str:
            tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "weights.bin"), ("offset", file.tell()), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))
            file.write(raw)
            tensors.append(tensor)
            return name

        spent = {"plain": 0, "all": 0}
        while (position := file.tell()) < gigabytes * 1e9:
            index = len(spans)
            spans.append(position)
            if spent["plain"] < SHARE_IN_16_BIT * position:
                weight = store(f"{index}.weight", TensorProto.BFLOAT16, [ROWS, COLUMNS], plain.tobytes())
                spent["plain"] += plain.nbytes
            else:
                names = [
                    store(f"{index}.weight", TensorProto.FLOAT4E2M1, [ROWS, COLUMNS], codes.tobytes()),
                    store(f"{index}.weight_scale", TensorProto.FLOAT8E4M3FN, [ROWS, COLUMNS // 16], scales.tobytes()),
                    store(f"{index}.weight_scale_2", TensorProto.FLOAT, [], np.float32(1e-4).tobytes()),
                ]
                weight = f"{index}/weight"
                kind = {"output_dtype": int(TensorProto.BFLOAT16)}
                nodes += [
                    helper.make_node("DequantizeLinear", names[1:], [f"{index}/scales"], f"{index}/a", **kind),
                    helper.make_node(
                        "DequantizeLinear",
                        [names[0], f"{index}/scales"],
                        [weight],
                        f"{index}/b",
                        axis=-1,
                        block_size=16,
                        **kind,
                    ),
                ]
            nodes += [
                helper.make_node("Transpose", [weight], [f"{index}/turned"], f"{index}/Transpose", perm=[1, 0]),
                helper.make_node("MatMul", ["x", f"{index}/turned"], [f"{index}/y"], f"{index}/MatMul"),
            ]
    last = f"{len(spans) - 1}/y"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["B", COLUMNS])],
        [helper.make_tensor_value_info(last, TensorProto.BFLOAT16, ["B", ROWS])],
        tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), folder / "m.onnx")
    return folder / "m.onnx"


def measure(model: Path) -> dict[str, float | str]:
    """Lint in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(ROOT), str(model)]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split()
    size = sum(path.stat().st_size for path in model.parent.iterdir() if path.suffix in (".bin", ".safetensors"))
    return {
        "data_bytes": size,
        "seconds": float(answer[0]),
        "peak_rss_bytes": int(answer[1]),
        "read_bytes": int(answer[2]),
        "passed": answer[3],
        "findings": int(answer[4]),
    }


def main() -> None:
    """Print one table and write build/benchmarks/lint.json."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gigabytes", type=float, default=0.5)
    options.add_argument("--folder", type=Path, default=None, help="where the large file goes")
    chosen = options.parse_args()
    rows = {}
    built_in = ROOT / "build" / "demo" / "model.onnx"
    if built_in.is_file():
        rows["built-in model"] = measure(built_in)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        started = time.perf_counter()
        model = write_model(Path(folder), chosen.gigabytes)
        print(f"wrote {chosen.gigabytes} GB in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        rows[f"{chosen.gigabytes:g} GB"] = measure(model)
    print(f"{'model':16} {'data MB':>9} {'seconds':>8} {'peak RSS MB':>12} {'read MB':>9} {'findings':>9}")
    for name, row in rows.items():
        sizes = [float(row[key]) / 1e6 for key in ("data_bytes", "peak_rss_bytes", "read_bytes")]
        print(
            f"{name:16} {sizes[0]:9.0f} {float(row['seconds']):8.3f} {sizes[1]:12.0f} {sizes[2]:9.0f} "
            f"{row['findings']:>9}"
        )
    result = ROOT / "build" / "benchmarks" / "lint.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
