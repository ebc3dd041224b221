"""`fp4trt quantize` of a single file under BFL's names against the diffusers folder of the same weights.

Both are quantized by `nvfp4-ptq` from one amax file, in turns, from a cold cache where the system can drop one; their
results have to be the same bytes. `python benchmarks/single_file.py --size 19+38 --folder DISK` writes FLUX.1-dev's
23.8 GB twice.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure.checkpoints import Size, plain, tensor_bytes, tensor_files
from measure.child import fp4trt
from measure.result import machine, publish
from quantize import DROPS_PAGES, prepare_cache

from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.made_tensors import SwappedTensor
from fp4trt.safetensors_file import StoredTensor, TensorPlan, sha256_of, write
from fp4trt.single_files.tables import SINGLE_FILES

SIZES = ["1+1", "4+8"]
PIECE = 8 << 20


def write_single_file(source: Path, target: Path) -> None:
    """Write a checkpoint of diffusers as one file under its publisher's names, a few MiB at a time."""
    config, stored = load_json(source / "config.json"), tensors_in_folder(source)
    layout = SINGLE_FILES[config["_class_name"]].layout(family_of(config).state(config))
    plan = [TensorPlan(name, "BF16", original.shape) for name, original in layout.items()]

    def pieces() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
        for name, original in layout.items():
            for part in original.parts:
                tensor = stored[part.name]
                if part.swapped:
                    tensor = SwappedTensor(tensor.file, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes)
                for piece in _pieces(tensor):
                    yield name, piece

    write(target, plan, pieces(), {})


def _pieces(tensor: StoredTensor) -> Iterator[npt.NDArray[np.uint8]]:
    for begin in range(0, tensor.nbytes, PIECE):
        yield tensor.bytes(begin, min(begin + PIECE, tensor.nbytes))


def measure(name: str, source: Path, amax: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Quantize the file and the folder in turns, and hold their results against each other."""
    single = folder / "single"
    single.mkdir()
    write_single_file(source, single / "flux.safetensors")
    shutil.copyfile(source / "config.json", single / "config.json")
    places = {"folder": (source, []), "file": (single / "flux.safetensors", ["--like", single])}
    costs: dict[str, list[Any]] = {kind: [] for kind in places}
    hashes: dict[str, list[str]] = {}
    for _ in range(rounds):
        for kind, (place, words) in places.items():
            prepare_cache(place if kind == "folder" else single, "cold" if DROPS_PAGES else "warm")
            result = folder / f"result-{kind}"
            given = ["--recipe", "nvfp4-ptq", "--calibration", amax, *words]
            costs[kind].append(fp4trt("quantize", place, "-o", result, *given))
            hashes[kind] = [sha256_of(file) for file in (*tensor_files(result), result / "config.json")]
            shutil.rmtree(result)
            print(f"{name}, {kind}: {costs[kind][-1].seconds:.1f} s", file=sys.stderr)
    shutil.rmtree(single)
    seconds = {kind: min(cost.seconds for cost in found) for kind, found in costs.items()}
    peaks = {kind: max(cost.peak_rss for cost in found) for kind, found in costs.items()}
    return {
        "size": name,
        "GB": tensor_bytes(source) / 1e9,
        "file s": seconds["file"],
        "folder s": seconds["folder"],
        "ratio": seconds["file"] / seconds["folder"],
        "file MB": peaks["file"] / 1e6,
        "folder MB": peaks["folder"] / 1e6,
        "ratio of memory": peaks["file"] / peaks["folder"],
        "same bytes": hashes["file"] == hashes["folder"],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", action="append", help="DOUBLE+SINGLE blocks, more than once for several")
    options.add_argument("--rounds", type=int, default=2, help="how often the two take turns")
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    chosen = options.parse_args()
    before, rows = machine(), []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        for size in map(Size.parse, chosen.size or SIZES):
            source, amax = plain(folder, size)
            rows.append(measure(str(size), source, amax, folder, chosen.rounds))
            shutil.rmtree(source)
    publish("single_file", rows, [], before)
    sys.exit(not all(row["same bytes"] for row in rows))


if __name__ == "__main__":
    main()
