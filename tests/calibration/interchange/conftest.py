"""The checkpoints of the cases, each made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.interchange import cases, foreign
from tests.calibration.interchange.cases import Case
from tests.onnx_functions.layout_writer import codes_of, pack
from tests.shared_folders import SharedFolder

WHOLE = "diffusion_pytorch_model.safetensors"

Make = Callable[[Case], Path]


@pytest.fixture(scope="session")
def input_amax(quantized_digits: Path) -> dict[str, float]:
    """Module path to the amax of each quantized linear's input."""
    measured = json.loads((quantized_digits / "fp4trt.json").read_text(encoding="utf-8"))["amax"]
    return {name.removesuffix(".input_quantizer"): amax for name, amax in measured.items() if ".input" in name}


@pytest.fixture(scope="session")
def quality_digits(digits: Path, five_calls: Path, shared_folder: SharedFolder) -> Path:
    """The cut of the built-in model by nvfp4-quality; not to be changed."""

    def make(folder: Path) -> None:
        from calibration import quantize

        quantize(digits, folder / "quality", recipe="nvfp4-quality", calibration=five_calls)

    return shared_folder("quality", make) / "quality"


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return what gives the checkpoint of a case; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[tuple[str, str], Path] = {}

    def give(case: Case) -> Path:
        key = case.producer, case.checkpoint
        if key not in made:
            made[key] = _MAKERS[key](request.getfixturevalue, folder / f"{len(made)}")
        return made[key]

    return give


Get = Callable[[str], Any]


def _fixture(name: str) -> Callable[[Get, Path], Path]:
    return lambda get, _: get(name)


def _all_in_fp8(get: Get, path: Path) -> Path:
    from calibration import quantize

    amax = path.with_suffix(".json")
    amax.write_text(json.dumps(get("input_amax")), encoding="utf-8")
    quantize(get("digits"), path, recipe="fp8-ptq", calibration=amax)
    return path


def _flux2(_: Get, path: Path) -> Path:
    from calibration import quantize
    from fp4trt.families import family_of
    from fp4trt.json_file import load_json
    from tests.frame.diffusers_models import MODELS

    source, amax = path.with_name("flux2"), path.with_suffix(".json")
    MODELS["flux2"].save(source)
    config = load_json(source / "config.json")
    amax.write_text(json.dumps(dict.fromkeys(family_of(config).quantized(config), 4.0)), encoding="utf-8")
    quantize(source, path, recipe="nvfp4-ptq", calibration=amax)
    return path


def _changed(whole: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a quantized model as a checkpoint of ModelOpt's: without manifest, some tensors changed."""
    path.mkdir()
    shutil.copy(whole / "config.json", path)
    tensors = load_file(whole / WHOLE)
    change(tensors)
    save_file(tensors, path / WHOLE, {"format": "pt"})
    return path


def _unshared(get: Get, path: Path) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer_blocks.0.attn.to_k.weight_scale_2"] *= 0.85

    return _changed(get("quantized_digits"), path, change)


def _unshared_fp8(get: Get, path: Path) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer_blocks.0.attn.to_k.weight_scale"] *= 0.85

    return _changed(_all_in_fp8(get, path.with_name("shared")), path, change)


def _embedder(get: Get, path: Path) -> Path:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes, scales, scale = codes_of(tensors["x_embedder.weight"].float().numpy())
        tensors["x_embedder.weight"] = torch.from_numpy(pack(codes))
        tensors["x_embedder.weight_scale"] = torch.from_numpy(scales).view(torch.float8_e4m3fn)
        tensors["x_embedder.weight_scale_2"] = torch.tensor(scale)
        tensors["x_embedder.input_scale"] = torch.tensor(4 / 2688)

    return _changed(get("quantized_digits"), path, change)


def _foreign(without_amax: bool = False, **options: Any) -> Callable[[Get, Path], Path]:
    def make(get: Get, path: Path) -> Path:
        amax = None if without_amax else get("input_amax")
        return foreign.single_file(path.with_suffix(".safetensors"), get("digits"), amax, **options)

    return make


def _tensors(tensors: dict[str, torch.Tensor]) -> Callable[[Get, Path], Path]:
    def make(_: Get, path: Path) -> Path:
        save_file(tensors, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")

    return make


QKV = "double_blocks.0.img_attn.qkv"
FP8_AND_MXFP8 = {"single_blocks.0.modulation.lin": foreign.fp8, QKV: foreign.mxfp8}
_MAKERS: dict[tuple[str, str], Callable[[Get, Path], Path]] = {
    ("fp4trt", cases.OURS[0]): _fixture("quantized_digits"),
    ("fp4trt", cases.OURS[1]): _fixture("quality_digits"),
    ("fp4trt", cases.OURS[2]): _fixture("fp8_digits"),
    ("fp4trt", cases.MIXED): _fixture("mixed_digits"),
    ("fp4trt", cases.SVDQUANT): _fixture("svdquant_checkpoint"),
    ("fp4trt", cases.FP8): _all_in_fp8,
    ("fp4trt", cases.ATTENTION): _fixture("fp8_attention_digits"),
    ("fp4trt", cases.FLUX2): _flux2,
    ("ModelOpt", cases.UNSHARED): _unshared,
    ("ModelOpt", cases.UNSHARED_FP8): _unshared_fp8,
    ("ModelOpt", cases.EMBEDDER): _embedder,
    ("ComfyUI, BFL", "NVFP4, marked by tensors"): _foreign(),
    ("ComfyUI, BFL", "NVFP4, marked in the header, with a prefix"): _foreign(
        prefix="model.diffusion_model.", marks="header"
    ),
    ("ComfyUI, BFL", cases.MIXED): _foreign(others=FP8_AND_MXFP8),
    ("ComfyUI, BFL", "NVFP4, marked as multiplied in 16 bit"): _foreign(mark={"full_precision_matrix_mult": True}),
    ("ComfyUI, BFL", "NVFP4 without input_scale"): _foreign(without_amax=True),
    ("ComfyUI, BFL", "NVFP4 without a mark"): _foreign(marks="none"),
    (cases.BFL, "NVFP4 in BFL's names"): _foreign(quantizer=foreign.row_major_nvfp4, marks="none"),
    (cases.BFL, "FP8 with a scale a row"): _foreign(quantizer=foreign.fp8_by_row, marks="none"),
    ("ComfyUI, BFL", "INT8"): _tensors(
        {f"{QKV}.weight": torch.zeros(4, 4, dtype=torch.int8), f"{QKV}.weight_scale": torch.ones(())}
    ),
    ("ComfyUI, BFL", "scaled FP8 of before"): _tensors({"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}),
    ("nunchaku", "SVDQuant"): _tensors({f"{QKV}.qweight": torch.zeros(4, 4), f"{QKV}.wscales": torch.ones(4)}),
    ("LightX2V", "NVFP4"): _tensors({f"{QKV}.weight_global_scale": torch.ones(())}),
}
