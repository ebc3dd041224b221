"""Write a FLUX.1 checkpoint of any depth and width with seeded weights, and what to quantize it with.

`python benchmarks/synthetic/flux.py FOLDER --double 19 --single 38` writes FLUX.1-dev's 23.8 GB in three shards, as on
the hub, and `FOLDER/../amax.json`; with `--calls 4` also `inputs.safetensors`, the inputs of as many calls over the
schedule. Every weight is normal with a standard deviation of its own, and one value in ten thousand is an outlier of up
to thirty times that, so that no two layers have one amax and no table is hit twice alike. `--model klein-4b` takes a
published config of another family.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from synthetic.published import PUBLISHED  # noqa: E402

from calibration.checkpoints.plain import model_class  # noqa: E402
from calibration.inputs.captured import save_inputs  # noqa: E402
from fp4trt.families import family_of  # noqa: E402
from fp4trt.safetensors_file import TensorPlan, write  # noqa: E402
from fp4trt.single_files.tables import FLUX1  # noqa: E402

SHARD_BYTES = 9_990_000_000
PIECE = 1 << 22
OUTLIERS = 1e-4


def config_of(double: int, single: int, heads: int = 24) -> dict[str, Any]:
    """Return FLUX.1-dev's config with another depth, and another width by the number of heads of 128."""
    depths = {"num_attention_heads": heads, "num_layers": double, "num_single_layers": single}
    return {**FLUX1.published["FLUX.1"], **depths}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write config, shards and index; return the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = model_class(family_of(config)).from_config(config)
    plan = [TensorPlan(name, "BF16", tuple(value.shape)) for name, value in model.state_dict().items()]
    shards: list[list[TensorPlan]] = [[]]
    for tensor in plan:
        if sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"diffusion_pytorch_model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["diffusion_pytorch_model.safetensors"]
    total = sum(tensor.nbytes for tensor in plan)
    with click.progressbar(length=total, label="writing weights", file=sys.stderr) as bar:
        for name, shard in zip(names, shards, strict=True):
            write(folder / name, shard, _pieces(shard, bar), {"format": "pt"})
    if len(shards) > 1:
        index = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total // 2


def write_amax(path: Path, config: dict[str, Any]) -> None:
    """Write a maximum for every quantized linear's input, no two alike."""
    values = {name: 4 + 40 * (zlib.crc32(name.encode()) / 2**32) ** 2 for name in family_of(config).quantized(config)}
    path.write_text(json.dumps({"__metadata__": {"data": "synthetic"}, **values}, indent=1))


def write_inputs(path: Path, config: dict[str, Any], count: int, image_tokens: int, text_tokens: int) -> None:
    """Write the inputs of some calls, evenly over the schedule; what they hold is random."""
    family = family_of(config)
    calls = []
    for index in range(count):
        call = family.example_inputs(config, (1, image_tokens, text_tokens), index, torch.bfloat16)
        calls.append({**call, "timestep": torch.tensor([1 - (index + 0.5) / count], dtype=torch.bfloat16)})
    save_inputs(path, calls)


def _pieces(shard: Sequence[TensorPlan], bar: Any) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    with ThreadPoolExecutor() as pool:
        for tensor in shard:
            begins = range(0, tensor.nbytes // 2, PIECE)
            ends = (min(begin + PIECE, tensor.nbytes // 2) for begin in begins)
            for data in pool.map(functools.partial(_random, tensor), begins, ends):
                yield tensor.name, data
                bar.update(data.nbytes)


def _random(tensor: TensorPlan, begin: int, end: int) -> npt.NDArray[np.uint8]:
    """Return some of a tensor's elements as the bytes of BF16 numbers; which ones decides the seed."""
    name = zlib.crc32(tensor.name.encode())
    random = np.random.default_rng([name, begin])
    values = random.standard_normal(end - begin, np.float32)
    if len(tensor.shape) == 1:
        values = 1 + 0.1 * values if "norm" in tensor.name else 0.05 * values
    else:
        values *= 0.6 * (1 + name % 97 / 97) / tensor.shape[-1] ** 0.5
        where = random.integers(0, len(values), max(1, int(len(values) * OUTLIERS)))
        values[where] *= random.uniform(3, 30, len(where)).astype(np.float32)
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--model", choices=PUBLISHED, help="a published config, in place of a size")
    parser.add_argument("--calls", type=int, default=0, help="captured inputs to write too")
    parser.add_argument("--tokens", default="1024,512", help="IMAGE,TEXT of each")
    arguments = parser.parse_args()
    size = arguments.double, arguments.single, arguments.heads
    chosen = PUBLISHED[arguments.model] if arguments.model else config_of(*size)
    parameters = write_checkpoint(arguments.folder, chosen)
    write_amax(arguments.folder.parent / "amax.json", chosen)
    if arguments.calls:
        counts = [int(word) for word in arguments.tokens.split(",")]
        write_inputs(arguments.folder.parent / "inputs.safetensors", chosen, arguments.calls, counts[0], counts[1])
    print(f"{parameters / 1e9:.2f} B parameters -> {arguments.folder}")
