"""The bytes of a form of the weights are those of the checkpoint that quantization writes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration import convert, quantize
from calibration.recipes.recipe import load_recipe
from fp4trt.account import ATTENTION_SCALES
from fp4trt.errors import BadRecipe
from generation.planning.source import read_source
from generation.planning.weights import plain_weights, planned_weights

Made = Callable[[pytest.FixtureRequest, Path], tuple[Path, str | Path]]
"""Gives a checkpoint, and the recipe that it was made by."""


def _existing(fixture: str, recipe: str) -> Made:
    return lambda request, _: (request.getfixturevalue(fixture), recipe)


def _mixed(request: pytest.FixtureRequest, _: Path) -> tuple[Path, Path]:
    folder = request.getfixturevalue("mixed_digits")
    return folder, folder.parent / "recipe.yaml"


BRANCHES = """
name: branches
method: {name: quality, rank: 8, gptq: false, descent_sweeps: 0, sequential: false}
"""  # the tensors of nvfp4-quality-r8, made quickly


def _with_branches(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, str | Path]:
    (folder / "branches.yaml").write_text(BRANCHES, encoding="utf-8")
    return _quantized(request, folder, folder / "branches.yaml", "five_calls")


def _quantized(
    request: pytest.FixtureRequest, folder: Path, recipe: str | Path, calibration: str
) -> tuple[Path, str | Path]:
    data = request.getfixturevalue(calibration)
    data = data.parent / "amax.json" if data.is_dir() else data
    quantize(request.getfixturevalue("digits"), folder / "made", recipe=recipe, calibration=data)
    return folder / "made", recipe


def _with_fp8_attention(request: pytest.FixtureRequest, _: Path) -> tuple[Path, Path]:
    return request.getfixturevalue("fp8_attention_digits"), request.getfixturevalue("fp8_attention_recipe")


MADE: dict[str, Made] = {
    "ptq": _existing("quantized_digits", "nvfp4-ptq"),
    "svdquant-r8": _existing("svdquant_checkpoint", "svdquant-r8"),
    "branches": _with_branches,
    "fp8": lambda request, folder: _quantized(request, folder, "fp8-ptq", "mixed_digits"),
    "mxfp8": _existing("flux2_in_mxfp8", "mxfp8-ptq"),
    "three formats": _mixed,
    "attention in FP8": _with_fp8_attention,
}


def data_bytes(folder: Path) -> int:
    """Return the bytes behind the headers of a folder's safetensors files, by the format's first eight bytes."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]
    return total


@pytest.mark.parametrize("what", MADE)
def test_a_recipe_is_planned_to_the_byte(what: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder, recipe = MADE[what](request, tmp_path)
    source = read_source(folder)
    planned = planned_weights(load_recipe(recipe), source.family, source.config)
    assert planned.checkpoint_bytes == data_bytes(folder)
    assert source.stored is not None
    assert (planned.formats, planned.ranks) == (source.stored.formats, source.stored.ranks)
    assert (planned.checkpoint_bytes, planned.engine_bytes) == (
        source.stored.checkpoint_bytes,
        source.stored.engine_bytes,
    )


def test_a_single_file_of_comfyui_is_planned_as_the_checkpoint_that_it_holds(
    flux2_in_mxfp8: Path, tmp_path: Path
) -> None:
    file = tmp_path / "comfyui.safetensors"
    convert(flux2_in_mxfp8, file, to="comfyui")
    assert read_source(file).stored == read_source(flux2_in_mxfp8).stored


def test_attentions_with_a_mask_stay_in_16_bit(fp8_attention_recipe: Path) -> None:
    recipe = load_recipe(fp8_attention_recipe)
    source = read_source("LTX-2")
    operands = len(source.family.fp8_attentions(source.config)) * len(ATTENTION_SCALES)
    plain = planned_weights(load_recipe("nvfp4-ptq"), source.family, source.config)
    planned = planned_weights(recipe, source.family, source.config)
    assert 0 < planned.checkpoint_bytes - plain.checkpoint_bytes == 4 * operands
    all_masked = read_source("Krea 2")
    with pytest.raises(BadRecipe, match="krea2 has no attention for that: all its attentions have a mask"):
        planned_weights(recipe, all_masked.family, all_masked.config)


def test_an_engine_holds_what_its_graph_points_at(svdquant_digits: Path) -> None:
    """A factor that linears of one input have each in the checkpoint is in the graph once."""
    import onnx

    source = read_source(svdquant_digits)
    assert source.stored is not None
    graph = onnx.load(svdquant_digits / "model.onnx", load_external_data=False).graph
    spans = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    pointed = {(span["location"], span["offset"]): int(span["length"]) for span in spans if span}
    assert source.stored.engine_bytes < source.stored.checkpoint_bytes
    assert abs(sum(pointed.values()) - source.stored.engine_bytes) <= 0.001 * source.stored.engine_bytes


def test_sixteen_bit_is_two_bytes_of_each_parameter(digits: Path) -> None:
    source = read_source(digits)
    plain = plain_weights("bf16", source.family, source.config)
    assert plain.checkpoint_bytes == plain.engine_bytes == data_bytes(digits)
    assert source.stored is None
