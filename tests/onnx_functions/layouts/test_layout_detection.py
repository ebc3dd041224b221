"""`inspect --against` names the layout of a checkpoint by what its bytes are in its 16-bit source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fp4trt
from fp4trt.cublas_tiles import unswizzled
from fp4trt.errors import UnknownArtifact
from fp4trt.safetensors_file import tensors_in_file
from onnx_functions.inspection.inspect import describe
from onnx_functions.layouts.detection import detect, lines_of
from tests.onnx_functions.layout_writer import (
    LAYOUTS,
    Tensors,
    codes_of,
    mxfp8,
    pack,
    swizzled,
    write,
    write_layout,
    write_source,
)

SHAPES = {"attn.to_q": (128, 128), "ff": (256, 64), "odd": (48, 80), "deep": (64, 256)}
OURS = "ModelOpt's unified export, which fp4trt writes"
NAMES = {
    "unified": OURS,
    "four over six": OURS,
    "swizzled": "ModelOpt's enable_swizzle_layout",
    "nibbles swapped": "ModelOpt's unified export with swapped nibbles",
    "ComfyUI": "ComfyUI",
    "reciprocal": "compressed-tensors and LightX2V (reciprocal global scale)",
    "transposed": "nobody known (block scales row-major, low first, transposed, scale a multiplier)",
    "by columns": "nobody known (block scales row-major, low first, columns, scale a multiplier)",
    "fp8": "FP8 (E4M3, scale a multiplier)",
    "scaled fp8": "ComfyUI's scaled FP8 (E4M3, scale a multiplier)",
    "scaled fp8 in E5M2": "ComfyUI's scaled FP8 (E5M2, scale a multiplier)",
    "fp8 with a reciprocal scale": "FP8 (E4M3, scale a reciprocal)",
}
READ = {"unified", "four over six", "fp8"}


def weight(rows: int, columns: int, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """A weight whose rows and columns differ in size, as trained ones do; its values are BF16's."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.standard_normal((rows, 1))) * np.exp(spread * rng.standard_normal((1, columns)))
    value = (0.02 * sizes * rng.standard_normal((rows, columns))).astype(np.float32)
    return value.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return {name: weight(*shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture(scope="module")
def source(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "bf16.safetensors", weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_named_by_the_error_of_its_reading(
    layout: str, weights: dict[str, np.ndarray], source: Path, tmp_path: Path
) -> None:
    found = detect(write_layout(tmp_path / "theirs.safetensors", layout, weights), source)
    assert found["layout"] == NAMES[layout]
    assert found["passed"] == (layout in READ)
    assert all(each["error"] < 0.12 for each in found["linears"])
    if layout not in READ and layout != "scaled fp8":
        assert all(
            each["error_as_fp4trt_reads"] is None or each["error_as_fp4trt_reads"] > 0.25 for each in found["linears"]
        )


@pytest.mark.parametrize("order", ["row-major", "cuBLAS 128x4 tiles"])
def test_mxfp8_is_proven_with_the_order_of_its_block_scales(
    order: str, weights: dict[str, np.ndarray], source: Path, tmp_path: Path
) -> None:
    ours = order == "row-major"
    tensors: Tensors = {}
    for path in ("attn.to_q", "ff", "deep"):
        tensors |= mxfp8(path, weights[path], *(() if ours else (swizzled,)))
    found = detect(write(tmp_path / "theirs.safetensors", tensors), source)
    assert found["layout"] == f"MXFP8 (E4M3, block scales {order})"
    assert found["passed"] == ours
    assert all(each["error"] < 0.04 for each in found["linears"])
    if not ours:
        assert found["linears"][0]["error_as_fp4trt_reads"] > 0.25  # whose shape hides the tiles


def test_a_checkpoint_of_several_formats_is_proven(mixed_digits: Path, digits: Path) -> None:
    found = detect(mixed_digits, digits)
    assert found["passed"], found["summary"]
    assert found["layouts"] == {
        OURS: 12,
        "FP8 (E4M3, scale a multiplier)": 2,
        "MXFP8 (E4M3, block scales row-major)": 6,
    }


def test_block_scales_come_back_out_of_their_tiles() -> None:
    scales = np.random.default_rng(0).integers(0, 255, (256, 12), np.uint8)
    assert np.array_equal(unswizzled(swizzled(scales), 256, 12), scales)
    tile = swizzled(np.arange(512, dtype=np.uint16).reshape(128, 4).astype(np.uint8))
    assert tile.reshape(-1)[:16].tolist() == [0, 1, 2, 3, *range(128, 132), *range(4), *range(128, 132)]


def fused(weights: dict[str, np.ndarray], paths: tuple[str, ...]) -> np.ndarray:
    return np.concatenate([weights[path] for path in paths])


@pytest.fixture(scope="module")
def flux() -> dict[str, np.ndarray]:
    """Some linears of a FLUX.1 of width 64 by diffusers' names."""
    double, single = "transformer_blocks.3", "single_transformer_blocks.0"
    shapes = {f"{double}.attn.{name}": (64, 64) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    shapes |= {f"{single}.attn.{name}": (64, 64) for name in ("to_q", "to_k", "to_v")}
    shapes |= {f"{single}.proj_mlp": (256, 64), f"{single}.proj_out": (64, 320), "norm_out.linear": (128, 64)}
    return {name: weight(*shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module")
def original(flux: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same by the names of the model's own repository, fused."""
    double, single = "transformer_blocks.3.attn", "single_transformer_blocks.0"
    last = flux["norm_out.linear"]
    return {
        "double_blocks.3.img_attn.qkv": fused(flux, tuple(f"{double}.to_{part}" for part in "qkv")),
        "double_blocks.3.img_attn.proj": flux[f"{double}.to_out.0"],
        "single_blocks.0.linear1": fused(flux, (*(f"{single}.attn.to_{part}" for part in "qkv"), f"{single}.proj_mlp")),
        "single_blocks.0.linear2": flux[f"{single}.proj_out"],
        "final_layer.adaLN_modulation.1": np.concatenate((last[64:], last[:64])),
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fused_linears_are_held_against_the_rows_that_they_were_made_of(
    prefix: str, flux: dict[str, np.ndarray], original: dict[str, np.ndarray], tmp_path: Path
) -> None:
    theirs = {f"{prefix}{name}": value for name, value in original.items()}
    marker: Tensors = {f"{prefix}single_blocks.0.linear1.comfy_quant": ("U8", np.zeros(19, np.uint8))}
    file = write_layout(tmp_path / "theirs.safetensors", "ComfyUI", theirs, marker=marker)
    found = detect(file, write_source(tmp_path / "bf16.safetensors", flux))
    assert found["layout"] == "ComfyUI"
    assert len(found["linears"]) == 5
    assert found["recognised"]["name"] == "ComfyUI"
    assert not found["passed"]


def test_a_source_by_the_original_names_serves_as_well(
    flux: dict[str, np.ndarray], original: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = write_layout(tmp_path / "ours.safetensors", "unified", flux)
    assert detect(file, write_source(tmp_path / "bf16.safetensors", original))["passed"]
    same = write_layout(tmp_path / "theirs.safetensors", "ComfyUI", original)
    assert detect(same, tmp_path / "bf16.safetensors")["layout"] == "ComfyUI"


def test_a_fused_linear_in_another_order_is_not_taken_for_a_good_one(
    flux: dict[str, np.ndarray], tmp_path: Path
) -> None:
    parts = tuple(f"transformer_blocks.3.attn.to_{part}" for part in "kqv")
    file = write_layout(
        tmp_path / "theirs.safetensors", "unified", {"double_blocks.3.img_attn.qkv": fused(flux, parts)}
    )
    found = detect(file, write_source(tmp_path / "bf16.safetensors", flux))
    assert not found["passed"]
    assert "no reading fits" in found["linears"][0]["reason"]


def smoothed(value: np.ndarray, rank: int, lose: str = "") -> Tensors:
    """SVDQuant's tensors of a weight: smoothing, a branch of its largest singular vectors, and the rest in codes."""
    rng = np.random.default_rng(9)
    factors = np.exp(0.4 * rng.standard_normal(value.shape[1])).astype(np.float32)
    u, s, v = np.linalg.svd(value / factors, full_matrices=False)
    a, b = v[:rank].astype(np.float32), (u[:, :rank] * s[:rank]).astype(np.float32)
    found = LAYOUTS["unified"]("x", value / factors - b @ a)
    beside = {"pre_quant_scale": factors, "svdquant_lora_a": a, "svdquant_lora_b": b}
    return found | {f"x.{name}": ("F32", each) for name, each in beside.items() if name != lose}


def test_smoothing_and_a_low_rank_branch_belong_to_the_weight(tmp_path: Path) -> None:
    value = weight(128, 128)
    source = write_source(tmp_path / "bf16.safetensors", {"x": value})
    found = detect(write(tmp_path / "svd.safetensors", smoothed(value, 16)), source)
    assert found["passed"]
    assert found["linears"][0]["error"] < 0.12
    lost = detect(write(tmp_path / "lost.safetensors", smoothed(value, 16, "pre_quant_scale")), source)
    assert not lost["passed"]


def test_half_of_a_branch_is_said(tmp_path: Path, source: Path, weights: dict[str, np.ndarray]) -> None:
    tensors: Tensors = LAYOUTS["unified"]("ff", weights["ff"]) | LAYOUTS["unified"]("odd", weights["odd"])
    tensors["ff.svdquant_lora_a"] = "F32", np.zeros((4, 64), np.float32)
    found = detect(write(tmp_path / "half.safetensors", tensors), source)
    assert not found["passed"]
    assert {each["path"]: each["reason"] for each in found["linears"]} == {
        "odd": None,
        "ff": "half of a low-rank branch",
    }


def test_a_lost_smoothing_is_told_from_a_layout(tmp_path: Path) -> None:
    value = weight(256, 128)
    factors = np.exp(0.4 * np.random.default_rng(9).standard_normal(128)).astype(np.float32)
    file = write(tmp_path / "awq.safetensors", LAYOUTS["unified"]("x", value / factors))
    found = detect(file, write_source(tmp_path / "bf16.safetensors", {"x": value}))
    assert not found["passed"]
    assert "is a pre_quant_scale lost?" in found["linears"][0]["reason"]


def test_factors_that_the_quality_recipe_moves_into_a_norm_are_no_other_layout(tmp_path: Path) -> None:
    value = weight(256, 128)
    factors = np.exp(0.4 * np.random.default_rng(9).standard_normal(128)).astype(np.float32)
    write(tmp_path / "diffusion_pytorch_model.safetensors", LAYOUTS["unified"]("x", value / factors))
    (tmp_path / "fp4trt.json").write_text(json.dumps({"recipe": {"name": "mine", "method": {"name": "quality"}}}))
    found = detect(tmp_path, write_source(tmp_path.parent / "bf16.safetensors", {"x": value}))
    assert found["passed"]
    assert found["linears"][0]["moved"] == "columns"


def test_a_wrong_global_scale_is_said_as_a_factor(tmp_path: Path, source: Path, weights: dict[str, np.ndarray]) -> None:
    tensors = LAYOUTS["unified"]("ff", weights["ff"])
    kind, scale = tensors["ff.weight_scale_2"]
    tensors["ff.weight_scale_2"] = kind, np.array(np.float32(scale * 1536 / 2688))
    found = detect(write(tmp_path / "x.safetensors", tensors), source)
    assert not found["passed"]
    assert "global scale, which is too small by a factor of 1.7" in found["linears"][0]["reason"]


def test_another_source_than_its_own_fits_nothing(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    other = {name: weight(*value.shape, 99) for name, value in weights.items()}
    source = write_source(tmp_path / "bf16.safetensors", other)
    found = detect(write_layout(tmp_path / "x.safetensors", "unified", weights), source)
    assert (found["passed"], found["layout"]) == (False, None)
    assert "is this the checkpoint that it was made of?" in found["summary"]


def test_a_small_error_proves_nothing_where_another_reading_is_as_close(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    value = (0.02 * rng.standard_normal((128, 64))).astype(np.float32)
    tensors = LAYOUTS["unified"]("x", value)
    kind, scales = tensors["x.weight_scale"]
    shuffled = rng.permutation(scales.reshape(-1)).reshape(scales.shape)  # in no order that is known
    tensors["x.weight_scale"] = kind, shuffled
    found = detect(
        write(tmp_path / "x.safetensors", tensors), write_source(tmp_path / "bf16.safetensors", {"x": value})
    )
    assert 0.12 < found["linears"][0]["error"] < 0.5
    assert found["layout"] is None


def test_padded_rows_and_columns_are_no_part_of_the_weight(tmp_path: Path) -> None:
    value = weight(40, 80)
    padded = np.pad(value, ((0, 8), (0, 48)))
    source = write_source(tmp_path / "bf16.safetensors", {"x": value})
    codes, scales, scale = codes_of(padded)
    tensors: Tensors = {
        "x.weight": ("U8", pack(codes, high_first=True)),
        "x.weight_scale": ("U8", swizzled(scales)),
        "x.weight_scale_2": ("F32", np.array(scale)),
    }
    assert detect(write(tmp_path / "x.safetensors", tensors), source)["layout"] == "ComfyUI"


@pytest.mark.parametrize("turn", [False, True])
def test_the_built_in_model_is_in_its_own_layout_until_its_scales_are_swizzled(
    turn: bool, quantized_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quantized_digits
    if turn:
        folder = shutil.copytree(
            quantized_digits, tmp_path / "swizzled", ignore=shutil.ignore_patterns("*.onnx", "*.json")
        )
        file = folder / "diffusion_pytorch_model.safetensors"
        with file.open("r+b") as data:
            for name, held in tensors_in_file(file).items():
                if name.endswith(".weight_scale") and held.shape:
                    data.seek(held.offset)
                    scales = np.frombuffer(data.read(held.nbytes), np.uint8).reshape(held.shape)
                    data.seek(held.offset)
                    data.write(swizzled(scales).tobytes())
    assert fp4trt.run(["inspect", str(folder), "--against", "digits", "--json"]) == (1 if turn else 0)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["layouts"] == ({"ModelOpt's enable_swizzle_layout": 20} if turn else {OURS: 20})
    assert max(each["error"] for each in found["linears"]) < 0.12
    if turn:
        assert min(each["error_as_fp4trt_reads"] for each in found["linears"]) > 0.29
    assert any("20 of 20 linears" in line for line in lines_of(found))


def test_what_cannot_be_held_against_each_other_is_one_line(tmp_path: Path, source: Path, weights) -> None:
    file = write_layout(tmp_path / "x.safetensors", "unified", {"elsewhere": weights["ff"]})
    with pytest.raises(UnknownArtifact, match=r"weights of none of the 1 quantized linears .* elsewhere"):
        detect(file, source)
    with pytest.raises(UnknownArtifact, match="no matrix in 16 bit"):
        detect(file, file)
    with pytest.raises(UnknownArtifact, match="no linear whose codes can be dequantized"):
        detect(source, source)
    scales: Tensors = {
        "ff.weight": ("U8", np.zeros((256, 32), np.uint8)),
        "ff.weight_scale": ("F32", np.zeros((256, 4), np.float32)),
    }
    with pytest.raises(UnknownArtifact, match=r"; ff: F32 block scales\); expected NVFP4, FP8, MXFP8$"):
        detect(write(tmp_path / "scales.safetensors", scales), source)
    packed: Tensors = {
        "x.qweight": ("I8", np.zeros((128, 64), np.int8)),
        "x.wscales": ("F8_E4M3", np.zeros((8, 128), np.uint8)),
    }
    with pytest.raises(UnknownArtifact, match="by its names: nunchaku's SVDQuant"):
        detect(write(tmp_path / "n.safetensors", packed), source)
    (tmp_path / "flux.gguf").write_bytes(b"GGUF" + bytes(64))
    assert fp4trt.run(["inspect", str(tmp_path / "flux.gguf"), "--against", str(source)]) == 2
    assert fp4trt.run(["inspect", str(tmp_path / "absent"), "--against", "digits"]) == 2


def test_fp8_with_a_scale_for_each_row_is_told_from_what_is_read(tmp_path: Path) -> None:
    value = weight(64, 64)
    scales = (np.abs(value).max(1) / 448).astype(np.float32)
    codes = (value / scales[:, None]).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    file = write(tmp_path / "x.safetensors", {"x.weight": ("F8_E4M3", codes), "x.weight_scale": ("F32", scales)})
    found = detect(file, write_source(tmp_path / "bf16.safetensors", {"x": value}))
    assert found["layout"] == "FP8 (E4M3, scale a multiplier for each row)"
    assert not found["passed"]


def test_a_weight_of_zeros_is_what_it_was(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    tensors = LAYOUTS["unified"]("ff", weights["ff"])
    zeros = {name.replace("ff", "zero"): (kind, np.zeros_like(value)) for name, (kind, value) in tensors.items()}
    zeros["zero.weight_scale_2"] = tensors["ff.weight_scale_2"]
    source = {"ff": weights["ff"], "zero": np.zeros_like(weights["ff"])}
    file = write(tmp_path / "x.safetensors", tensors | zeros)
    assert detect(file, write_source(tmp_path / "bf16.safetensors", source))["passed"]


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf, -1.0])
def test_a_global_scale_that_is_no_scale_fits_nothing(
    scale: float, weights: dict[str, np.ndarray], source: Path, tmp_path: Path
) -> None:
    tensors: Tensors = LAYOUTS["unified"]("ff", weights["ff"])
    tensors["ff.weight_scale_2"] = "F32", np.array(np.float32(scale))
    found = detect(write(tmp_path / "x.safetensors", tensors), source)
    assert (found["passed"], found["layout"]) == (False, None)


def test_a_source_with_a_nan_fits_nothing(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    damaged = weights["ff"].copy()
    damaged[3, 3] = np.nan
    source = write_source(tmp_path / "bf16.safetensors", {"ff": damaged})
    file = write_layout(tmp_path / "x.safetensors", "unified", {"ff": weights["ff"]})
    assert detect(file, source)["layout"] is None


def test_what_every_verb_refuses_is_not_said_to_be_read(quantized_digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(
        quantized_digits, tmp_path / "digits", ignore=shutil.ignore_patterns("*.onnx", "fp4trt.json")
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["swap_weight_nibbles"] = True
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = detect(folder, "digits")
    assert (found["layout"], found["passed"]) == (OURS, False)
    assert "but fp4trt refuses it: " in found["summary"]
    assert "swap_weight_nibbles True in config.json" in found["refused"]


def test_a_single_file_without_its_source_is_named(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    marker: Tensors = {"ff.comfy_quant": ("U8", np.zeros(19, np.uint8))}
    file = write_layout(tmp_path / "x.safetensors", "ComfyUI", {"ff": weights["ff"]}, marker=marker)
    with pytest.raises(UnknownArtifact, match=r"is a single file, of ComfyUI \(the tensor ff.comfy_quant\)"):
        describe(file)


def test_a_pipeline_stands_for_its_transformer_whatever_lies_beside_it(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    write_source(tmp_path / "ae.safetensors", {"decoder": weights["deep"]})
    write_source(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", weights)
    file = write_layout(tmp_path.parent / "theirs.safetensors", "unified", weights)
    found = detect(file, tmp_path)
    assert found["passed"]
    assert found["against"] == str((tmp_path / "transformer").resolve())
