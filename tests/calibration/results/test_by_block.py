"""A result that is written while the model runs: the source is read once, and a killed run resumes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fp4trt
from calibration.by_block.runner import BlockRunner
from calibration.checkpoints import layout
from calibration.checkpoints.quantized import WEIGHTS
from calibration.inputs.captured import save_inputs
from calibration.quantization import quantize
from fp4trt.errors import BadCheckpoint
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import sha256_of, tensors_in_file

QUICK = {
    "ptq": {"name": "ptq"},
    "quality": {"name": "quality", "sequential": False, "descent_sweeps": 1, "wiener": 0},
    "svdquant": {"name": "svdquant", "rank": 2, "alpha_step": 0.5},
}


@pytest.fixture(scope="module")
def flux(tiny_flux: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX of 2 + 2 blocks beside captured inputs; not to be changed."""
    source = tiny_flux(tmp_path_factory.mktemp("source") / "flux", num_layers=2, num_single_layers=2)
    config = load_json(source / "config.json")
    calls = [family_of(config).example_inputs(config, (1, 16, 8), seed, torch.bfloat16) for seed in range(2)]
    save_inputs(source.with_name("inputs.safetensors"), calls)
    return source


def _recipe(method: str, folder: Path) -> Path:
    path = folder / f"{method}.yaml"
    rules = {"rules": [{"linears": "*.0.ff.net.2", "format": "fp8"}, {"linears": "*.0.norm1.linear", "format": "bf16"}]}
    path.write_text(json.dumps({"name": method, "method": QUICK[method], "attention": "fp8", "formats": rules}))
    return path


def _quantize(source: Path, method: str, output: Path) -> None:
    quantize(source, output, recipe=_recipe(method, output.parent), calibration=source.with_name("inputs.safetensors"))


@contextlib.contextmanager
def _counted(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give how often each byte of a file is read, other than through a buffer, as headers are."""
    counts = np.zeros(file.stat().st_size, int)
    plain = Path.open

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            begin, count = self.tell(), super().readinto(buffer) or 0
            counts[begin : begin + count] += 1
            return count

    def opened(path: Path, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        counts_it = path == file and not buffering
        return Counting(path) if counts_it else plain(path, mode, buffering, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        yield counts


@pytest.mark.parametrize("method", QUICK)
def test_every_byte_of_the_weights_is_read_once(
    method: str, flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _counted(flux / WEIGHTS, monkeypatch) as counts:
        _quantize(flux, method, tmp_path / "out")
    for name, stored in tensors_in_file(flux / WEIGHTS).items():
        assert set(counts[stored.offset : stored.offset + stored.nbytes]) == {1}, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", f"{method}.yaml"]


def test_the_source_is_identified_by_the_hashes_of_header_and_tensors(flux: Path, tmp_path: Path) -> None:
    _quantize(flux, "ptq", tmp_path / "out")
    data = (flux / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    tensors = sorted(tensors_in_file(flux / WEIGHTS).values(), key=lambda stored: stored.offset)
    parts = [data[:end], *(data[stored.offset : stored.offset + stored.nbytes] for stored in tensors)]
    digests = [hashlib.sha256(part).digest() for part in parts]
    source = load_json(tmp_path / "out" / "fp4trt.json")["source"]
    assert source == {
        "config.json": sha256_of(flux / "config.json"),
        WEIGHTS: f"tensors-sha256:{hashlib.sha256(b''.join(digests)).hexdigest()}",
    }


@pytest.mark.parametrize("method", ["ptq", "svdquant"])
@pytest.mark.parametrize("lost", [None, "shard", "progress"])
def test_a_killed_run_resumes_with_the_next_block_unless_what_it_wrote_is_gone(
    method: str,
    lost: str | None,
    flux: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_after: Callable[..., None],
) -> None:
    calls = flux.with_name("inputs.safetensors")
    kill_after(
        2, "quantize", flux, "-o", tmp_path / "out", "--recipe", _recipe(method, tmp_path), "--calibration", calls
    )
    partial = tmp_path / "out.partial"
    if lost:
        (partial / {"shard": WEIGHTS, "progress": ".fp4trt-progress.json"}[lost]).unlink()
    ran: list[str] = []
    run = BlockRunner.run
    monkeypatch.setattr(BlockRunner, "run", lambda self, block, *rest: ran.append(block) or run(self, block, *rest))
    _quantize(flux, method, tmp_path / "out")
    assert len(set(ran)) == (4 if lost else 2)
    _quantize(flux, method, tmp_path / "whole")
    for name in (WEIGHTS, "config.json", "fp4trt.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not partial.exists()
    assert not (tmp_path / "out.calibration.partial").exists()


def test_a_disk_that_gets_full_keeps_the_finished_blocks(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = layout.ShardFiles.put

    def full(self: layout.ShardFiles, name: str, *rest: Any) -> None:
        if name.startswith("single_transformer_blocks.1"):
            raise OSError(28, "No space left on device", name)
        put(self, name, *rest)

    with monkeypatch.context() as failing:
        failing.setattr(layout.ShardFiles, "put", full)
        with pytest.raises(OSError, match="No space"):
            _quantize(flux, "ptq", tmp_path / "out")
    finished = load_json(tmp_path / "out.calibration.partial" / "blocks.json")["order"]
    assert finished == ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"]
    _quantize(flux, "ptq", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "ptq.yaml"]


def test_a_weight_that_is_not_finite_is_found_in_its_block_and_nothing_is_left(flux: Path, tmp_path: Path) -> None:
    source = shutil.copytree(flux, tmp_path / "flux")
    shutil.copy(flux.with_name("inputs.safetensors"), tmp_path)
    name = "single_transformer_blocks.1.proj_out.weight"
    with (source / WEIGHTS).open("r+b") as file:
        file.seek(tensors_in_file(source / WEIGHTS)[name].offset)
        file.write(b"\xc0\x7f")
    with pytest.raises(BadCheckpoint, match=f"{name} holds NaN"):
        _quantize(source, "ptq", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux", "inputs.safetensors", "ptq.yaml"]


def test_from_an_amax_file_the_bytes_are_the_same(flux: Path, tmp_path: Path) -> None:
    calls, recipe = flux.with_name("inputs.safetensors"), _recipe("ptq", tmp_path)
    assert fp4trt.run(["calibrate", str(flux), "-o", str(tmp_path / "amax.json"), "--inputs", str(calls)]) == 0
    _quantize(flux, "ptq", tmp_path / "by-block")
    quantize(flux, tmp_path / "in-one-pass", recipe=recipe, calibration=tmp_path / "amax.json")
    by_block, one_pass = (tmp_path / name for name in ("by-block", "in-one-pass"))
    assert (by_block / WEIGHTS).read_bytes() == (one_pass / WEIGHTS).read_bytes()
    manifests = [load_json(folder / "fp4trt.json") for folder in (by_block, one_pass)]
    for key in ("amax", "sharing_cost", "quantized", "attention", "groups"):
        assert manifests[0][key] == manifests[1][key], key
