"""`fp4trt quantize` against a program that only reads the source and writes as many bytes as the result.

That program reads 8 MiB at a time from beginning to end, writes as much of it as the result has bytes, and ends with
fsync: no quantizer can be faster than the disk lets it be. Both start Python, and fp4trt loads torch, which is most of
its time at the smallest size. Each runs in two states: cold, with the source's pages dropped from the cache just
before (where the system has posix_fadvise), and warm, right after the source was read. A source that is larger than
half of the memory is measured cold only. Disks, of virtual machines above all, are now fast and now slow: the two take
turns (`--rounds`), and the quickest of each counts.

`python benchmarks/quantize.py --size 19+38 --folder DISK` writes FLUX.1-dev's 23.8 GB and measures it; `--captured`
quantizes from captured inputs in place of an amax file, so that the model runs too (four short calls). "disk / source"
is 1 where each byte of the source was fetched once, and more where a byte was wanted again after it left the cache.
`--source CHECKPOINT --amax FILE` takes a checkpoint that is there, and leaves it as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from measure.checkpoints import Size, plain, plain_with_inputs, tensor_bytes, tensor_files
from measure.child import fp4trt, itself
from measure.result import machine, publish

SIZES = ["1+1", "2+4", "4+8"]
PIECE = 8 << 20
DROPS_PAGES = hasattr(os, "posix_fadvise")


def read_and_write(source: Path, target: Path, count: int) -> None:
    """Be the program to compare with: write `count` bytes of the source, spread over reading all of it."""
    total, read, written = tensor_bytes(source), 0, 0
    with target.open("wb") as out:
        for piece in pieces(source):
            read += len(piece)
            due = count * read // total - written
            written += out.write(piece[:due])
        out.flush()
        os.fsync(out.fileno())


def pieces(checkpoint: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(PIECE))
    for path in tensor_files(checkpoint):
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                yield buffer[:size]


def prepare_cache(source: Path, state: str) -> None:
    """Drop the source's pages, or read them all."""
    if state == "warm":
        for _ in pieces(source):
            pass
        return
    for path in tensor_files(source):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a page that is still to be written is not dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, source: Path, calibration: Path, folder: Path, state: str, rounds: int) -> dict[str, Any]:
    """Quantize, then read and write as much, both from the same state of the cache, in turns."""
    result, copy = folder / "result", folder / "copy"
    ours, theirs, written = [], [], 0
    for _ in range(rounds):
        prepare_cache(source, state)
        ours.append(fp4trt("quantize", source, "-o", result, "--recipe", "nvfp4-ptq", "--calibration", calibration))
        written = tensor_bytes(result)
        shutil.rmtree(result)
        prepare_cache(source, state)
        theirs.append(itself("--read-and-write", source, copy, written))
        copy.unlink()
        print(f"{name}, {state}: {ours[-1].seconds:.1f} s and {theirs[-1].seconds:.1f} s", file=sys.stderr)
    quickest = [min(cost.seconds for cost in costs) for costs in (ours, theirs)]
    return {
        "size": name,
        "cache": state,
        "source GB": tensor_bytes(source) / 1e9,
        "result GB": written / 1e9,
        "bytes / weight": 2 * written / tensor_bytes(source),
        "quantize s": quickest[0],
        "slowest s": max(cost.seconds for cost in ours),
        "core-s": min(cost.core_seconds for cost in ours),
        "read and write s": quickest[1],
        "its slowest s": max(cost.seconds for cost in theirs),
        "ratio": quickest[0] / quickest[1],
        "disk / source": max(cost.disk_read for cost in ours) / tensor_bytes(source),
        "peak RSS MB": max(cost.peak_rss for cost in ours) / 1e6,
        "of read and write": max(cost.peak_rss for cost in theirs) / 1e6,
    }


def states_of(source: Path) -> list[str]:
    fits = tensor_bytes(source) < psutil.virtual_memory().total / 2
    return ["cold"] * DROPS_PAGES + ["warm"] * (fits or not DROPS_PAGES)


def notes_on(rows: list[dict[str, Any]]) -> list[str]:
    """Say what grows from the smallest size to the largest, in each state of the cache."""
    notes = []
    for state in dict.fromkeys(row["cache"] for row in rows):
        alike = [row for row in rows if row["cache"] == state]
        first, last = alike[0], alike[-1]
        if last["source GB"] > first["source GB"]:
            longer = [last[key] - first[key] for key in ("quantize s", "read and write s")]
            notes.append(
                f"{state}, {first['size']} to {last['size']}: the ratio of what the further bytes take is "
                f"{longer[0] / longer[1]:.2f}; peak RSS grows by "
                f"{100 * (last['peak RSS MB'] / first['peak RSS MB'] - 1):.0f} %."
            )
    return notes


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", action="append", help="DOUBLE+SINGLE blocks, more than once for several")
    options.add_argument("--source", type=Path, help="a BF16 checkpoint to measure after the synthetic ones")
    options.add_argument("--amax", type=Path, help="the amax file or captured inputs to quantize it with")
    options.add_argument("--captured", action="store_true", help="quantize the synthetic ones from captured inputs")
    options.add_argument("--rounds", type=int, default=2, help="how often the two take turns")
    options.add_argument("--folder", type=Path, help="where everything is written, to be removed again")
    options.add_argument("--read-and-write", nargs=3, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.read_and_write:
        source, target, count = chosen.read_and_write
        read_and_write(Path(source), Path(target), int(count))
        return
    if bool(chosen.source) != bool(chosen.amax):
        options.error("--source and --amax belong together")
    before, rows = machine(), []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        for size in map(Size.parse, chosen.size or ([] if chosen.source else SIZES)):
            made = plain_with_inputs(folder, size, 4, "64,32") if chosen.captured else plain(folder, size)
            rows += [measure(str(size), *made, folder, state, chosen.rounds) for state in states_of(made[0])]
            shutil.rmtree(made[0])
        if chosen.source:
            states = states_of(chosen.source)
            rows += [
                measure(chosen.source.name, chosen.source, chosen.amax, folder, state, chosen.rounds)
                for state in states
            ]
    publish("quantize", rows, notes_on(rows), before)


if __name__ == "__main__":
    main()
