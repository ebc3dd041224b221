"""Packing BF16 weights into NVFP4: megabytes of BF16 per core-second, against what else does it.

Every program starts from one BF16 weight in memory and nothing else, and finds the global scale itself. It gets a
process of its own, one thread, and several tries of which the fastest counts, in seconds of the processor and not of
the clock. Of ModelOpt's ONNX exporter only `compute_scales` and `compress_weights` are timed: what it does to the graph
before and after is its own affair. `other bytes` counts the packed codes that differ from those of fp4trt.

`python benchmarks/packing.py --shape 18432x3072 --shape 3072x15360` measures other weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from measure.child import itself  # noqa: E402
from measure.result import machine, publish  # noqa: E402

SHAPES = ["3072x3072", "12288x3072", "18432x3072"]  # linears of FLUX.1: attention, MLP, modulation
OUTLIERS = 1e-4
OURS, THEIRS = "fp4trt Packer", "ModelOpt ONNX exporter"

Packed = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.uint16]


def with_packer(bits: Bits) -> Packed:
    from calibration.formats import nvfp4
    from calibration.formats.bfloat16 import largest_magnitude
    from calibration.formats.nvfp4_packer import Packer

    return Packer(float(nvfp4.global_scale(largest_magnitude(bits)))).pack(bits)[0].reshape(-1)


def with_torch(bits: Bits) -> Packed:
    from calibration.formats import nvfp4

    weight = tensor(bits)
    codes, _ = nvfp4.quantize(weight, nvfp4.global_scale(weight.abs().amax().float()))
    return nvfp4.pack_codes(codes).numpy().reshape(-1)


def with_qtensor(bits: Bits) -> Packed:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    return NVFP4QTensor.quantize(tensor(bits), 16)[0]._quantized_data.numpy().reshape(-1)


def with_exporter(bits: Bits) -> Packed:
    import onnx
    from modelopt.onnx.export import NVFP4QuantExporter

    model = marked_graph(bits)
    packed = NVFP4QuantExporter.compress_weights(NVFP4QuantExporter.compute_scales(model))
    attributes = {attribute.name: attribute for attribute in packed.graph.node[0].attribute}
    return onnx.numpy_helper.to_array(attributes["_w_f4"].t).reshape(-1)


def with_torchao(bits: Bits) -> Packed:
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = tensor(bits)
    packed = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().amax().float()))
    return packed.qdata.view(torch.uint8).numpy().reshape(-1)


def with_memcpy(bits: Bits) -> Packed:
    return bits.copy().view(np.uint8).reshape(-1)


PROGRAMS: dict[str, Callable[[Bits], Packed]] = {
    OURS: with_packer,
    "fp4trt torch": with_torch,
    "ModelOpt NVFP4QTensor": with_qtensor,
    THEIRS: with_exporter,
    "torchao": with_torchao,
    "memcpy": with_memcpy,
}


def tensor(bits: Bits) -> Any:
    import torch

    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def marked_graph(bits: Bits) -> Any:
    """Return the graph that ModelOpt's TorchScript export would give of one linear without a bias."""
    from onnx import TensorProto, helper

    rows, columns = bits.shape
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, bits.shape, bits.tobytes(), raw=True)
    nodes = [
        helper.make_node("TRT_FP4QDQ", ["w"], ["m"], domain="trt", block_size=16),
        helper.make_node("Transpose", ["m"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["B", columns])
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["B", rows])
    return helper.make_model(helper.make_graph(nodes, "linear", [x], [y], [weight]))


def random_weight(shape: str) -> Bits:
    """Return seeded normal values with outliers, as their BF16 bits."""
    rows, columns = (int(side) for side in shape.split("x"))
    random = np.random.default_rng([rows, columns])
    bits = np.empty((rows, columns), np.uint16)
    for row in bits:  # one at a time, so that making the weight leaves no mark on the peak of memory
        values = random.standard_normal(columns, np.float32) * np.float32(columns**-0.5)
        values[random.random(columns) < OUTLIERS] *= np.float32(20)
        row[:] = values.view(np.uint32) >> 16
    return bits


def pack_once(program: str, shape: str, tries: int, codes: Path) -> None:
    """Be the process that packs: leave the codes in a file and print the cost."""
    import logging

    import psutil
    import torch

    torch.set_num_threads(1)
    logging.disable()
    bits = random_weight(shape)
    PROGRAMS[program](bits[:64].copy())  # imports, and the first touch of what is made once
    before = psutil.Process().memory_info().rss
    fastest = float("inf")
    for _ in range(tries):
        started = time.process_time()
        packed = PROGRAMS[program](bits)
        fastest = min(fastest, time.process_time() - started)
    np.save(codes, packed)
    print(json.dumps({"core_seconds": fastest, "bytes": bits.nbytes, "rss_before": before}))


def rows_of(shape: str, tries: int, folder: Path) -> list[dict[str, Any]]:
    """Measure every program on one weight."""
    rows: list[dict[str, Any]] = []
    for name in PROGRAMS:
        if name == "torchao" and importlib.util.find_spec("torchao") is None:
            continue
        codes = folder / f"{name}.npy"
        cost = itself("--program", name, "--shape", shape, "--tries", tries, "--codes", codes)
        rate = cost.answer["bytes"] / 1e6 / cost.answer["core_seconds"]
        other = None if name == "memcpy" else int(np.sum(np.load(codes) != np.load(folder / f"{OURS}.npy")))
        rows.append(
            {
                "weight": shape,
                "program": name,
                "BF16 MB / core-s": rate,
                "fp4trt is faster, x": (rows[0]["BF16 MB / core-s"] if rows else rate) / rate,
                "other bytes": other,
                "peak RSS MB": cost.peak_rss / 1e6,
                "of it for packing MB": (cost.peak_rss - cost.answer["rss_before"]) / 1e6,
            }
        )
        print(f"{shape}: {name}", file=sys.stderr)
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", action="append", help=f"ROWSxCOLUMNS; the default is {', '.join(SHAPES)}")
    options.add_argument("--tries", type=int, default=3)
    options.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    options.add_argument("--codes", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    shapes = chosen.shape or SHAPES
    if chosen.program:
        pack_once(chosen.program, shapes[0], chosen.tries, chosen.codes)
        return
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for shape in shapes for row in rows_of(shape, chosen.tries, Path(folder))]
    least = min(row["fp4trt is faster, x"] for row in rows if row["program"] == THEIRS)
    notes = [f"fp4trt packs at least {least:.1f} times as fast as {THEIRS}."]
    if importlib.util.find_spec("torchao") is None:
        notes.append("torchao is not installed here and is left out; pip install torchao adds it.")
    publish("packing", rows, notes, before)


if __name__ == "__main__":
    main()
