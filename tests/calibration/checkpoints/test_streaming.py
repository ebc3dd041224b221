"""Quantizing in shards, from shards, from other types, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.by_block.calibration import METADATA
from calibration.by_block.progress import finished_blocks
from calibration.checkpoints import layout, one_pass
from calibration.checkpoints import quantized as checkpoint
from calibration.quantization import quantize
from fp4trt import publish
from fp4trt.errors import BadCheckpoint, OutputExists, TooLittleSpace
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.progress import Step
from fp4trt.publish import progress_of, replacing
from fp4trt.safetensors_file import StoredTensor
from tests import warm_python

MakeFlux = Callable[..., Path]

SMALL = 24_000
"""Bytes of a shard that make several of a tiny model."""

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def sources(tiny_flux: MakeFlux, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tiny FLUX of 2 + 2 blocks, in one file and in shards; to be copied with its files' times."""
    folder = tmp_path_factory.mktemp("sources")
    flux = tiny_flux(folder / "flux", num_layers=2, num_single_layers=2)
    return {False: flux, True: _reshard(flux, folder / "resharded")}


@pytest.fixture
def flux(sources: dict[bool, Path], tmp_path: Path) -> Path:
    return shutil.copytree(sources[False], tmp_path / "flux")


@pytest.fixture
def amax(flux: Path, tmp_path: Path) -> Path:
    return _write_amax(flux, tmp_path / "amax.json")


def _write_amax(flux: Path, file: Path) -> Path:
    config = load_json(flux / "config.json")
    values = {path: 1 + index / 7 for index, path in enumerate(family_of(config).quantized(config))}
    file.write_text(json.dumps({METADATA: {}, **values}))
    return file


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    stored = checkpoint.read(folder).tensors
    return {name: (tensor.dtype, tensor.shape, tensor.bytes().tobytes()) for name, tensor in stored.items()}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = layout.plan_shards
    monkeypatch.setattr(layout, "plan_shards", lambda *given: plan(*given, limit=SMALL))


def _reshard(flux: Path, folder: Path) -> Path:
    """Write a checkpoint's tensors into three files with an index, as the hub has them."""
    folder.mkdir()
    shutil.copy(flux / "config.json", folder)
    tensors = load_file(flux / checkpoint.WEIGHTS)
    stem, index = checkpoint.WEIGHTS.removesuffix(".safetensors"), {}
    for number in range(3):
        part = {name: value for position, (name, value) in enumerate(tensors.items()) if position % 3 == number}
        file = f"{stem}-{number + 1:05d}-of-00003.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / layout.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_shards_hold_the_tensors_of_one_file_whole_groups_at_a_time(
    flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(flux, tmp_path / "one", calibration=amax)
    _small_shards(monkeypatch)
    quantize(_reshard(flux, tmp_path / "resharded"), tmp_path / "many", calibration=amax)
    assert _tensors(tmp_path / "one") == _tensors(tmp_path / "many")
    manifest, index = (load_json(tmp_path / "many" / name) for name in ("fp4trt.json", layout.INDEX))
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert set(manifest["files"]) == {*files, layout.INDEX, "config.json"}
    stored = checkpoint.read(tmp_path / "many")
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in stored.tensors.items()}
    for group in stored.groups:
        assert (
            len({stored.tensors[f"{path}.{kind}"].file for path in group for kind in ("weight", "weight_scale")}) == 1
        )
    source = load_json(tmp_path / "many" / "fp4trt.json")["source"]
    assert set(source) == {"config.json", *(f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))}


@pytest.mark.slow
def test_a_sharded_checkpoint_is_exported_and_validated(
    flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter import export
    from onnx_functions import validate

    _small_shards(monkeypatch)
    quantize(flux, tmp_path / "many", calibration=amax)
    export(tmp_path / "many")
    report = validate(tmp_path / "many")
    assert report.passed, [gate.line for gate in report.gates]


def test_a_system_that_cannot_be_told_to_read_ahead_gives_the_same(
    flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(flux, tmp_path / "told", calibration=amax)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    quantize(flux, tmp_path / "untold", calibration=amax)
    assert _files(tmp_path / "told") == _files(tmp_path / "untold")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_rounded_to_bfloat16_first(dtype: torch.dtype, flux: Path, amax: Path, tmp_path: Path) -> None:
    state = {name: value.float() * 1.001 for name, value in load_file(flux / checkpoint.WEIGHTS).items()}
    wide = {name: value.to(dtype) for name, value in state.items()}
    for folder, tensors in (("wide", wide), ("narrow", {name: value.bfloat16() for name, value in wide.items()})):
        shutil.copytree(flux, tmp_path / folder)
        save_file(tensors, tmp_path / folder / checkpoint.WEIGHTS)
        quantize(tmp_path / folder, tmp_path / f"{folder}-fp4", calibration=amax)
    assert _tensors(tmp_path / "wide-fp4") == _tensors(tmp_path / "narrow-fp4")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["x_embedder.bias", "single_transformer_blocks.1.proj_out.weight"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(
    value: float, name: str, flux: Path, amax: Path, tmp_path: Path
) -> None:
    tensors = load_file(flux / checkpoint.WEIGHTS)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, flux / checkpoint.WEIGHTS)
    with pytest.raises(BadCheckpoint, match=rf"{name} holds NaN or infinite"):
        quantize(flux, tmp_path / "out", calibration=amax)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amax.json", "flux"]


def test_a_disk_without_room_is_refused_before_anything_is_read(
    flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(TooLittleSpace, match=r"1\.0 kB free, the result needs \d+\.\d kB"):
        quantize(flux, tmp_path / "out", calibration=amax)
    assert not (tmp_path / "out.partial").exists()


KILLED = """
import os, signal, sys, threading
import numpy as np
from calibration.checkpoints import layout, one_pass
from fp4trt import publish
from calibration.quantization import quantize
plan, note, pack, noted, packed = layout.plan_shards, publish.note_progress, one_pass._Pass._pack, threading.Event(), []
def note_and_tell(*words):
    note(*words)
    if any(f"{path}.weight" in words[1]["written"] for path in packed):
        noted.set()
def pack_or_die(self, path, packer, begin, end):
    packed.append(path)
    if len(packed) > 12:
        assert noted.wait(60)
        self._files.put(f"{path}.weight", 0, np.full(4, 255, np.uint8))  # in the middle of one
        os.kill(os.getpid(), signal.SIGKILL)
    pack(self, path, packer, begin, end)
one_pass.NOTE_EVERY = 0
layout.plan_shards = lambda *given: plan(*given, limit=int(sys.argv[4]))
publish.note_progress, one_pass._Pass._pack = note_and_tell, pack_or_die
quantize(sys.argv[1], sys.argv[2], calibration=sys.argv[3])
"""


@pytest.fixture(scope="module")
def left(sources: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """What two killed runs left, of one file and of a sharded checkpoint: folders to be copied."""
    if os.name == "nt":
        pytest.skip("kill -9 is POSIX")
    folder = tmp_path_factory.mktemp("killed")
    for sharded, source in sources.items():
        arguments = (source, folder / str(sharded), _write_amax(source, folder / "amax.json"), SMALL)
        status, printed = warm_python.run(KILLED, *arguments)
        assert status == -signal.SIGKILL, printed
        assert not (folder / str(sharded)).exists()
    return {sharded: folder / f"{sharded}.partial" for sharded in sources}


def _count_packing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the set that the tensors will be in which are packed from now on."""
    pack, packed = one_pass._Pass._pack, set[str]()

    def count(self: Any, path: str, *rest: Any) -> None:
        packed.add(f"{path}.weight")
        pack(self, path, *rest)

    monkeypatch.setattr(one_pass._Pass, "_pack", count)
    return packed


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(
    sharded: bool,
    sources: dict[bool, Path],
    left: dict[bool, Path],
    amax: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = sources[sharded]
    partial = shutil.copytree(left[sharded], tmp_path / "killed.partial")
    written = set(progress_of(partial)["written"])
    assert written
    _small_shards(monkeypatch)
    packed = _count_packing(monkeypatch)
    quantize(source, tmp_path / "killed", calibration=amax)
    assert packed
    assert not packed & written
    packed.clear()
    quantize(source, tmp_path / "whole", calibration=amax)
    assert written & packed
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.slow
def test_the_bar_reaches_its_end_in_a_run_that_goes_on_too(
    sources: dict[bool, Path],
    left: dict[bool, Path],
    amax: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, steps = sources[True], list[Step]()
    shutil.copytree(left[True], tmp_path / "killed.partial")
    _small_shards(monkeypatch)
    wanted = 2 * sum(value.nbytes for value in load_file(sources[False] / checkpoint.WEIGHTS).values())
    for name in ("killed", "whole"):
        quantize(source, tmp_path / name, calibration=amax, progress=steps.append)
        assert steps[-1] == Step("quantizing", wanted, wanted)


@pytest.mark.parametrize("how", ["gone", "short", "another header"])
@pytest.mark.slow
def test_files_that_are_not_as_they_were_left_are_written_anew(
    how: str, left: dict[bool, Path], flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sorted(shutil.copytree(left[False], tmp_path / "out.partial").glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.unlink()
    if how != "gone":
        file.write_bytes(content[:-1] if how == "short" else content.replace(b"weight_scale", b"weight_scalf", 1))
    _small_shards(monkeypatch)
    quantize(flux, tmp_path / "out", calibration=amax)
    quantize(flux, tmp_path / "whole", calibration=amax)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


@pytest.mark.slow
def test_what_a_run_that_begins_anew_removes_is_not_relied_on_from_the_first_file_on(
    left: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(left[False], tmp_path / "out.partial")
    removed: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **how: removed.append(path.name) or unlink(path, **how))
    with replacing(tmp_path / "out", force=False, identity="another") as partial:
        assert removed[0] == ".fp4trt-progress.json"
        assert removed[-1] == ".fp4trt-partial"
        assert [path.name for path in partial.iterdir()] == [".fp4trt-partial"]


def test_what_cannot_be_removed_does_not_hide_why_the_run_failed(
    flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    tensors = load_file(flux / checkpoint.WEIGHTS)
    tensors["x_embedder.bias"][0] = float("nan")
    save_file(tensors, flux / checkpoint.WEIGHTS)
    monkeypatch.setattr(Path, "rmdir", refuse)
    with pytest.raises(BadCheckpoint, match=r"x_embedder\.bias holds NaN"):
        quantize(flux, tmp_path / "out", calibration=amax)
    assert list((tmp_path / "out.partial").iterdir()) == []


def test_a_folder_that_a_kill_left_empty_is_taken(flux: Path, amax: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    quantize(flux, tmp_path / "out", calibration=amax)
    assert not (tmp_path / "out.partial").exists()


def test_a_result_that_a_kill_met_as_it_got_its_name_is_ours(flux: Path, amax: Path, tmp_path: Path) -> None:
    quantize(flux, tmp_path / "out", calibration=amax)
    before = _files(tmp_path / "out")
    for name in (".fp4trt-partial", ".fp4trt-progress.json"):
        (tmp_path / "out" / name).write_text("{}")
    quantize(flux, tmp_path / "out", calibration=amax, force=True)
    assert _files(tmp_path / "out") == before


@pytest.mark.slow
def test_what_a_killed_run_left_is_not_used_for_another_result(
    left: dict[bool, Path], flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(left[False], tmp_path / "out.partial")
    values = load_json(amax)
    amax.write_text(json.dumps({name: 2 * value if name != METADATA else value for name, value in values.items()}))
    _small_shards(monkeypatch)
    quantize(flux, tmp_path / "out", calibration=amax)
    quantize(flux, tmp_path / "anew", calibration=amax)
    assert _files(tmp_path / "out") == _files(tmp_path / "anew")


@pytest.mark.parametrize("kept", [False, True])
def test_after_a_failure_what_was_noted_stays_for_the_next_run_and_nothing_else(
    kept: bool,
    flux: Path,
    amax: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    put, note, noted = layout.ShardFiles.put, publish.note_progress, threading.Event()

    def full(self: layout.ShardFiles, name: str, *rest: Any) -> None:
        if name.endswith("single_transformer_blocks.1.proj_out.weight") and (not kept or noted.wait(60)):
            raise OSError(28, "No space left on device", name)
        put(self, name, *rest)

    def note_and_tell(*words: Any) -> None:
        note(*words)
        noted.set()

    _small_shards(monkeypatch)
    with monkeypatch.context() as failing:
        if kept:
            failing.setattr(one_pass, "NOTE_EVERY", 0)
        failing.setattr(layout.ShardFiles, "put", full)
        failing.setattr(publish, "note_progress", note_and_tell)
        with pytest.raises(OSError, match="No space"):
            quantize(flux, tmp_path / "out", calibration=amax)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == kept
    assert ("the same command resumes" in capfd.readouterr().err) == kept
    quantize(flux, tmp_path / "out", calibration=amax)
    quantize(flux, tmp_path / "whole", calibration=amax)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_a_checkpoint_larger_than_the_memory_is_dropped_from_the_cache_as_it_goes(
    flux: Path, amax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(flux, tmp_path / "kept", calibration=amax)
    forget, forgotten = StoredTensor.forget, list[StoredTensor]()

    def note(self: StoredTensor) -> None:
        forgotten.append(self)
        forget(self)

    monkeypatch.setattr(StoredTensor, "forget", note)
    monkeypatch.setattr(one_pass, "_memory", lambda: 1000)
    quantize(flux, tmp_path / "dropped", calibration=amax)
    assert len(forgotten) == len(load_file(flux / checkpoint.WEIGHTS))
    assert _files(tmp_path / "kept") == _files(tmp_path / "dropped")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update({"x_embedder.bias": "elsewhere.safetensors"}), r"elsewhere\.safetensors does not"),
        (
            lambda index: index.update({"x_embedder.bias": index["proj_out.bias"]}),
            r"says that .* holds x_embedder\.bias, which .* holds",
        ),
        (lambda index: index.update({"nobody": index["proj_out.bias"]}), r"speaks of nobody, which no shard holds"),
        (lambda index: index.update({"proj_out.bias": "../x.safetensors"}), r"expected the name of a file beside it"),
    ],
    ids=["a missing shard", "another shard", "no tensor", "outside"],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    change: Callable[[dict[str, str]], None], words: str, flux: Path, amax: Path, tmp_path: Path
) -> None:
    folder = _reshard(flux, tmp_path / "many")
    index = load_json(folder / layout.INDEX)
    change(index["weight_map"])
    (folder / layout.INDEX).write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint, match=words):
        quantize(folder, tmp_path / "out", calibration=amax)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amax.json", "flux", "many"]


def test_a_shard_that_the_index_does_not_have_is_missed(flux: Path, amax: Path, tmp_path: Path) -> None:
    folder = _reshard(flux, tmp_path / "many")
    index = load_json(folder / layout.INDEX)
    kept = {name: file for name, file in index["weight_map"].items() if "00002-of" not in file}
    (folder / layout.INDEX).write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(BadCheckpoint, match=r"is absent in .*many"):
        quantize(folder, tmp_path / "out", calibration=amax)


def test_a_second_command_does_not_write_what_a_first_is_writing(flux: Path, amax: Path, tmp_path: Path) -> None:
    with replacing(tmp_path / "out", force=False) as partial:
        (partial / "half").write_text("half")
        with pytest.raises(OutputExists, match=r"another command is writing .*out\.partial"):
            quantize(flux, tmp_path / "out", calibration=amax)
        assert (partial / "half").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["half"]
    with (
        finished_blocks(tmp_path / "amax.json.partial", {"run": 1}),
        pytest.raises(OutputExists, match="another command is writing"),
        finished_blocks(tmp_path / "amax.json.partial", {"run": 1}),
    ):
        pytest.fail("nothing may be written")
