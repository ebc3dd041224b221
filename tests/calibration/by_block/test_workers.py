"""Blocks that several workers share: the same bytes as one process gives, whichever of them dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import torch

import fp4trt
from calibration.by_block import ray_cluster
from calibration.by_block.one_block import BlockResult, BlockTask
from calibration.by_block.quantize_blocks import DEATHS, prepared_by_block
from calibration.by_block.ray_cluster import LOCAL
from calibration.by_block.ray_workers import on_ray
from calibration.by_block.workers import OpenCrew, in_processes, in_this_process
from calibration.checkpoints.quantized import WEIGHTS
from calibration.inputs.captured import load_inputs, save_inputs
from calibration.quantization import quantize
from fp4trt.errors import BadEnvironment, BadOption, NoEffect
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.progress import Step, reporting
from tests import warm_python

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")


@pytest.fixture(scope="module")
def flux(tiny_flux: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX of 2 + 3 blocks beside captured inputs; not to be changed."""
    source = tiny_flux(tmp_path_factory.mktemp("source") / "flux", num_layers=2, num_single_layers=3)
    config = load_json(source / "config.json")
    calls = [family_of(config).example_inputs(config, (1, 16, 8), seed, torch.bfloat16) for seed in range(2)]
    save_inputs(source.with_name("inputs.safetensors"), calls)
    return source


@dataclass(frozen=True)
class Scale:
    """A method that scales each weight by what enters the block; in some blocks, it dies.

    Attributes:
        folder: where it notes each block that has run, by the process.
        deaths: block to how often the process dies there, with the block run and its outputs on disk.
    """

    folder: Path
    deaths: dict[str, int]
    error: str = ""

    def __call__(self, task: BlockTask) -> BlockResult:
        seen: list[float] = []
        linear = task.linear(task.groups[-1][0])
        handle = linear.register_forward_pre_hook(lambda _, given: seen.append(float(given[0].float().sum())))
        task.run()
        handle.remove()
        place = self.folder / task.path
        with place.open("a") as ran:
            ran.write(f"{os.getpid()}\n")
        if task.path == self.error:
            raise NoEffect(f"nothing at {task.path}")
        if len(place.read_text().splitlines()) <= self.deaths.get(task.path, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        weight = task.linear(task.groups[0][0]).weight
        return BlockResult({f"{task.groups[0][0]}.weight": weight * sum(seen)}, {"seen": seen})


Prepared = tuple[dict[str, bytes], dict[str, Any], dict[str, float]]


@contextlib.contextmanager
def _noted() -> Iterator[tuple[list[str], list[Step]]]:
    notes: list[str] = []
    steps: list[Step] = []
    with reporting(steps.append, notes.append):
        yield notes, steps


def _prepare(
    flux: Path, folder: Path, crew: OpenCrew, deaths: dict[str, int] | None = None, error: str = ""
) -> Prepared:
    """Quantize by a method that may kill its process, and return all that comes of it."""
    ran = folder / "ran"
    ran.mkdir(exist_ok=True)
    formats = dict.fromkeys(
        family_of(load_json(flux / "config.json")).quantized(load_json(flux / "config.json")), "nvfp4"
    )
    calls = load_inputs(flux.with_name("inputs.safetensors"))
    method = Scale(ran, deaths or {}, error)
    with prepared_by_block(flux, calls, formats, method, {}, folder / "work", crew=crew) as made:
        tensors = {name: stored.bytes().tobytes() for name, stored in made.tensors.items()}
        return tensors, dict(made.figures), dict(made.outside)


def _times(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text().splitlines()) for path in (folder / "ran").iterdir()}


@pytest.fixture(scope="module")
def alone(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return _prepare(flux, tmp_path_factory.mktemp("alone"), in_this_process)


def test_a_worker_that_dies_costs_its_block_alone(flux: Path, alone: Prepared, tmp_path: Path) -> None:
    with _noted() as (notes, steps):
        made = _prepare(flux, tmp_path, partial(in_processes, 2), {"transformer_blocks.1": 2})
    assert made == alone
    assert _times(tmp_path) == {path: 1 + 2 * (path == "transformer_blocks.1") for path in alone[1]}
    why = "was killed, most likely because memory ran out: take fewer workers, or a machine with more memory"
    assert notes == [f"warning: the worker of transformer_blocks.1 {why}; the block is done again"] * 2
    assert [step.done for step in steps] == list(range(6))
    assert {step.label for step in steps} == {"quantizing blocks"}
    pids = {pid for path in (tmp_path / "ran").iterdir() for pid in path.read_text().split()}
    assert str(os.getpid()) not in pids
    assert len(pids) >= 3


def test_a_block_that_kills_every_worker_ends_the_run_which_resumes(
    flux: Path, alone: Prepared, tmp_path: Path
) -> None:
    block = "single_transformer_blocks.0"
    with _noted(), pytest.raises(BadEnvironment, match=f"the worker of {block} died 3 times.*memory ran out"):
        _prepare(flux, tmp_path, partial(in_processes, 2), {block: DEATHS})
    finished = load_json(tmp_path / "work" / "blocks.json")["order"]
    assert block not in finished
    before = _times(tmp_path)
    assert _prepare(flux, tmp_path, in_this_process) == alone
    assert {path: count - before.get(path, 0) for path, count in _times(tmp_path).items()} == {
        path: int(path not in finished) for path in _times(tmp_path)
    }


def test_what_a_worker_raises_is_raised_here(flux: Path, tmp_path: Path) -> None:
    block = "transformer_blocks.1"
    with pytest.raises(NoEffect, match=f"nothing at {block}"):
        _prepare(flux, tmp_path, partial(in_processes, 2), error=block)
    assert not (tmp_path / "work").exists()


_KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
from calibration.by_block import progress, workers
from tests.calibration.by_block import test_workers

finish = progress.BlockCheckpoint.finish


def finish_and_die(self, *of):
    finish(self, *of)
    if len(self.results) == 2:
        os.kill(os.getpid(), signal.SIGKILL)


progress.BlockCheckpoint.finish = finish_and_die
test_workers._prepare(Path(sys.argv[1]), Path(sys.argv[2]), partial(workers.in_processes, 2))
"""


@pytest.mark.slow
def test_workers_end_with_the_command_which_resumes(flux: Path, alone: Prepared, tmp_path: Path) -> None:
    status, printed = warm_python.run(_KILLED, flux, tmp_path)
    assert status == -signal.SIGKILL, printed
    pids = {int(pid) for path in (tmp_path / "ran").iterdir() for pid in path.read_text().split()}
    assert psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)[1] == []
    finished, before = load_json(tmp_path / "work" / "blocks.json")["order"], _times(tmp_path)
    assert len(finished) == 2
    assert _prepare(flux, tmp_path, partial(in_processes, 2)) == alone
    assert all(_times(tmp_path)[path] == before[path] for path in finished)


QUICK = {"name": "quality", "sequential": False, "descent_sweeps": 1, "wiener": 0}


def _recipe(folder: Path) -> Path:
    path = folder / "quick.yaml"
    rules = {"rules": [{"linears": "*.0.ff.net.2", "format": "fp8"}, {"linears": "*.0.norm1.linear", "format": "bf16"}]}
    path.write_text(json.dumps({"name": "quick", "method": QUICK, "attention": "fp8", "formats": rules}))
    return path


def test_two_workers_write_the_checkpoint_that_one_process_writes(flux: Path, tmp_path: Path) -> None:
    given = {"recipe": _recipe(tmp_path), "calibration": flux.with_name("inputs.safetensors")}
    quantize(flux, tmp_path / "alone", **given)
    with _noted() as (notes, _):
        quantize(flux, tmp_path / "shared", workers=2, **given)
    assert [note for note in notes if note.startswith("2 workers hold 2 blocks")]
    for name in (WEIGHTS, "config.json", "fp4trt.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "quick.yaml", "shared"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"workers": 0}, "workers is 0; expected a whole number, 1 at least"),
    "rounding": ({"workers": 2, "recipe": "nvfp4-ptq"}, "workers is 2, which is for recipes .* nvfp4-ptq has no such"),
    "from amax": ({"workers": 2, "calibration": "amax.json"}, "nvfp4-ptq has no such work; leave the option out"),
    "a state": ({"workers": 1, "modelopt_state": "state.pt"}, "a state of ModelOpt's has no such work"),
    "by ray": ({"ray": LOCAL, "recipe": "mxfp8-ptq"}, "ray is 'local', which is for recipes"),
    "too many": ({"workers": 10_000}, "workers is 10000; expected at most"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_workers_with_nothing_to_share_are_refused(what: str, tmp_path: Path) -> None:
    options, words = REFUSED[what]
    with pytest.raises(BadOption, match=words):
        quantize("digits", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_more_workers_than_memory_holds_are_refused(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from calibration import crew

    monkeypatch.setattr(crew, "available_memory", lambda: 1_000_000_000)
    words = ["quantize", str(flux), "-o", str(tmp_path / "out"), "--recipe", str(_recipe(tmp_path)), "--workers", "2"]
    assert fp4trt.run([*words, "--calibration", str(flux.with_name("inputs.safetensors"))]) == 2
    assert "2 workers take about 1.2 GB of memory, and 1.0 GB are free; take --workers 1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["quick.yaml"]


@pytest.mark.slow
def test_ray_workers_give_the_same_bytes_though_one_is_killed(flux: Path, alone: Prepared, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    with _noted() as (notes, _):
        made = _prepare(flux, tmp_path, partial(on_ray, LOCAL, 2, 100_000_000), {"transformer_blocks.1": 1})
    assert made == alone
    assert _times(tmp_path)["transformer_blocks.1"] == 2
    assert sum(_times(tmp_path).values()) == 6
    assert [note for note in notes if note.startswith("warning: the worker of transformer_blocks.1 was lost")] == notes


def test_a_cluster_that_is_not_there_is_one_line(flux: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    with pytest.raises(BadEnvironment, match=r"cannot connect to Ray at 127\.0\.0\.1:1 .*refused"):
        _prepare(flux, tmp_path, partial(on_ray, "127.0.0.1:1", None, 1))
    assert not (tmp_path / "work").exists()


def test_without_ray_the_extra_is_named(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert fp4trt.run(["quantize", str(flux), "-o", str(tmp_path / "out"), "--ray"]) == 2
    assert 'the package ray is needed and not installed; try: pip install "fp4trt[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["absent", "-o", "out"], "absent is not a folder"),
        (["digits", "-o", "out", "--recipe", "nvfp5"], "there is no recipe 'nvfp5'"),
        (["digits", "-o", "out", "--recipe", "mxfp8-ptq"], "which is for recipes that choose values block by block"),
        (["digits", "-o", "out", "--calibration", "absent.safetensors"], "absent.safetensors does not exist"),
        (["digits", "-o", "taken", "--force"], "taken holds theirs, which fp4trt did not write"),
    ],
)
def test_bad_input_is_refused_before_ray_starts(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "theirs").touch()
    started: list[bool] = []
    monkeypatch.setattr(ray_cluster, "start_early", lambda: started.append(True))
    assert fp4trt.run(["quantize", *words, "--ray"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert started == []


AT_ONCE = """
import time
import psutil
from calibration.by_block.ray_cluster import start_early

start_early()
while not [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::")]:
    time.sleep(0.05)
"""
"""Ends while Ray is starting: its first processes are there."""


@pytest.mark.slow
def test_of_a_ray_that_was_started_for_nothing_no_process_is_left() -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    mark = {"FP4TRT_TEST": uuid4().hex}
    subprocess.run([sys.executable, "-c", AT_ONCE], env={**os.environ, **mark}, check=True, timeout=120)
    assert [process.name() for process in psutil.process_iter() if mark.items() <= _environment(process).items()] == []


def _environment(process: Any) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}
