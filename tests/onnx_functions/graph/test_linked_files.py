"""External data in files that are links: those of a hub's cache are followed by every reader, others by none."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import fp4trt
from fp4trt.errors import BadGraph, BadModelError
from fp4trt.linked_files import real_file
from onnx_functions import session
from onnx_functions.graph.external_data import array_of, embedded, in_real_files, load_graph, span_of
from onnx_functions.linting import lint
from onnx_functions.validation.run_gates import validate
from trt_build.graph import read_graph

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a link needs a privilege on Windows")

WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED = ("config.json", WEIGHTS, "fp4trt.json", "model.onnx")
BLOCK = "single_transformer_blocks.0"
Snapshot = Callable[..., Path]


@pytest.fixture
def elsewhere(copy_of_digits: Path) -> Path:
    """A checkpoint with its graph whose weights are a link out of its folder, into no hub's cache."""
    outside = copy_of_digits.parent / "elsewhere"
    outside.mkdir()
    shutil.move(copy_of_digits / WEIGHTS, outside / WEIGHTS)
    (copy_of_digits / WEIGHTS).symlink_to(outside / WEIGHTS)
    return copy_of_digits


@pytest.mark.slow
def test_a_snapshot_is_validated_with_the_figures_of_the_plain_folder(
    quantized_digits: Path, hub_snapshot: Snapshot, tmp_path: Path
) -> None:
    snapshot = hub_snapshot(quantized_digits, tmp_path, PUBLISHED, "transformer")
    found, plain = (validate(folder, level="blocks", blocks=BLOCK) for folder in (snapshot, quantized_digits))
    assert [gate.name for gate in found.gates if not gate.passed] == []
    assert found.linears == plain.linears
    files = next(gate for gate in found.gates if gate.name == "files")
    assert "2 hashes" in files.detail
    assert "not there, and not needed: calibration/inputs.safetensors" in files.detail


@pytest.mark.slow
def test_every_reader_follows_the_links_of_a_hubs_cache(
    quantized_digits: Path, hub_snapshot: Snapshot, tmp_path: Path
) -> None:
    snapshot = hub_snapshot(quantized_digits, tmp_path, PUBLISHED)
    report = lint(snapshot)
    assert report.passed
    assert [finding.rule for finding in report.findings] == ["external-link"]
    assert read_graph(snapshot).external_ranges[0].length > 0
    graph, folder = load_graph(snapshot / "model.onnx"), quantized_digits
    for tensor in list(graph.graph.initializer)[:40]:
        assert np.array_equal(array_of(tensor, snapshot), array_of(tensor, folder))
    assert embedded(snapshot / "model.onnx") == embedded(folder / "model.onnx")
    feeds = {value.name: np.ones(_sizes(value), np.float32) for value in graph.graph.input}
    found, plain = (session(path / "model.onnx").run(None, feeds)[0] for path in (snapshot, folder))
    assert np.array_equal(found, plain)


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value or {"B": 1, "L": 4, "T": 3}[dim.dim_param] for dim in value.type.tensor_type.shape.dim]


def test_a_second_name_of_a_file_changes_nothing(copy_of_digits: Path) -> None:
    os.link(copy_of_digits / WEIGHTS, copy_of_digits.parent / "second")
    os.link(copy_of_digits / "model.onnx", copy_of_digits.parent / "graph")
    assert lint(copy_of_digits).passed
    graph, folder = in_real_files(load_graph(copy_of_digits / "model.onnx"), copy_of_digits)
    assert (graph, folder) == (load_graph(copy_of_digits / "model.onnx"), copy_of_digits.resolve())
    assert session(copy_of_digits / "model.onnx").get_inputs()[0].name == "hidden_states"
    assert not any(tensor.external_data for tensor in embedded(copy_of_digits / "model.onnx").graph.initializer)


def test_a_link_elsewhere_is_refused_by_every_reader_for_what_it_is(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a link out of the model's directory that is not one of a hub's cache"
    with pytest.raises(BadModelError, match=words):
        assert read_graph(elsewhere).external_ranges
    with pytest.raises(BadGraph, match=words):
        session(elsewhere / "model.onnx")
    assert {finding.rule for finding in lint(elsewhere).refused} == {"external-outside"}
    assert fp4trt.run(["validate", str(elsewhere)]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "FAILED" not in printed.out


def test_what_a_link_may_lead_to(tmp_path: Path) -> None:
    root, other = tmp_path / "hub" / "models--a--b", tmp_path / "hub" / "models--c--d"
    snapshot = root / "snapshots" / "4d7a"
    for folder in (snapshot / "onnx", root / "blobs", other / "blobs", tmp_path / "hub" / "blobs"):
        folder.mkdir(parents=True)
    links = {
        "own": root / "blobs" / "x",
        "of the hub": tmp_path / "hub" / "blobs" / "x",
        "beside it": snapshot / "onnx" / "y",
        "another model's": other / "blobs" / "x",
        "elsewhere": tmp_path / "x",
        "a refs file": root / "refs",
    }
    for name, target in links.items():
        target.touch()
        (snapshot / "onnx" / name).symlink_to(target)
    followed = [name for name in links if real_file(snapshot / "onnx", name) is not None]
    assert followed == ["own", "of the hub", "beside it"]
    # The snapshot may itself be reached by a link.
    (tmp_path / "mine").symlink_to(snapshot / "onnx")
    assert real_file(tmp_path / "mine", "own") == (root / "blobs" / "x").resolve()


def test_a_pointer_in_the_place_of_weights_is_named(copy_of_digits: Path) -> None:
    (copy_of_digits / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n")
    tensor = next(t for t in load_graph(copy_of_digits / "model.onnx").graph.initializer if t.external_data)
    with pytest.raises(BadGraph, match="which is a Git LFS pointer, not the file that it stands for: run git lfs pull"):
        span_of(tensor, copy_of_digits)
