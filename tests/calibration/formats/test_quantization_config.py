"""What config.json says of the formats is what ModelOpt's own export would say."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calibration.checkpoints.plain import model_class
from calibration.formats.modelopt_backend import FP8, NVFP4, mtq
from calibration.formats.quantization_config import AWQ, quantization_config
from fp4trt.families import family_of
from fp4trt.json_file import load_json

MakeFlux = Callable[..., Path]


def _modelopts(model: nn.Module, formats: Mapping[str, str]) -> Any:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import get_quant_config
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})
    for path, form in formats.items():
        for kind in ("input_quantizer", "weight_quantizer"):
            quantizer: Any = model.get_submodule(f"{path}.{kind}")
            attributes: dict[str, Any] = {"nvfp4": NVFP4, AWQ: NVFP4, "fp8": FP8}[form]
            quantizer.set_from_attribute_config(QuantizerAttributeConfig(**attributes, enable=True))
            quantizer.amax = torch.tensor(1.0)
            if form == AWQ and kind == "input_quantizer":
                quantizer.pre_quant_scale = torch.tensor(1.0)
    return convert_hf_quant_config_format(get_quant_config(model))


def _models(folder: Path) -> tuple[nn.Module, nn.Module, list[str]]:
    config = load_json(folder / "config.json")
    family = family_of(config)
    with torch.device("meta"):
        one, other = (model_class(family).from_config(config) for _ in range(2))
    return one, other, list(family.quantized(config))


def _is(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether a config is ModelOpt's, but for the stars behind names that stand for one linear."""
    names = [name if name in theirs["ignore"] else name.removesuffix("*") for name in ours["ignore"]]
    return {**ours, "ignore": names} == theirs


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3, 4])
def test_it_is_modelopts_for_all_quantized_linears_and_for_some(
    seed: int | None, tiny_flux: MakeFlux, tmp_path: Path
) -> None:
    ours, theirs, paths = _models(tiny_flux(tmp_path / "flux", num_layers=2, num_single_layers=12))
    if seed is not None:
        chosen = random.Random(seed)
        blocks = {".".join(path.split(".")[:2]) for path in paths}
        dropped = set(chosen.sample(sorted(blocks), 2 * seed))
        paths = [path for path in paths if ".".join(path.split(".")[:2]) not in dropped and chosen.random() < 0.8]
    formats = dict.fromkeys(paths, "nvfp4")
    assert _is(quantization_config(ours, formats), _modelopts(theirs, formats))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_it_is_modelopts_for_models_of_fp8_and_of_both_formats(
    seed: int | None, tiny_flux: MakeFlux, tmp_path: Path
) -> None:
    ours, theirs, paths = _models(tiny_flux(tmp_path / "flux"))
    chosen = random.Random(seed)
    formats = {path: "fp8" if seed is None else chosen.choice(["nvfp4", "fp8", "bf16"]) for path in paths}
    quantized = {path: kind for path, kind in formats.items() if kind != "bf16"}
    config = quantization_config(ours, formats)
    assert _is(config, _modelopts(theirs, quantized))
    assert config["quant_algo"] == ("FP8" if seed is None else "MIXED_PRECISION")


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_it_is_modelopts_for_smoothed_inputs_of_all_linears_and_of_some(
    seed: int | None, tiny_flux: MakeFlux, tmp_path: Path
) -> None:
    ours, theirs, paths = _models(tiny_flux(tmp_path / "flux"))
    chosen = random.Random(seed)
    kinds = [AWQ] if seed is None else ["nvfp4", AWQ] if seed == 0 else ["nvfp4", AWQ, "fp8", "bf16"]
    formats = {path: chosen.choice(kinds) for path in paths}
    quantized = {path: kind for path, kind in formats.items() if kind != "bf16"}
    config = quantization_config(ours, formats)
    assert _is(config, _modelopts(theirs, quantized))
    assert config["quant_algo"] == ("NVFP4_AWQ" if seed is None else "MIXED_PRECISION")


def test_with_branches_it_is_modelopts_for_svdquant(tiny_flux: MakeFlux, tmp_path: Path) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    model, _, paths = _models(tiny_flux(tmp_path / "flux"))
    ours = quantization_config(model, dict.fromkeys(paths, "nvfp4"), ranks={32})
    described = {"quant_algo": "NVFP4_SVD", "group_size": 16, "exclude_modules": ours["ignore"], "lora_rank": 32}
    theirs = convert_hf_quant_config_format({"producer": ours["producer"], "quantization": described})
    assert ours == theirs

    formats = dict.fromkeys(paths[:4], "fp8") | dict.fromkeys(paths[4:], "nvfp4")
    mixed = quantization_config(model, formats, ranks={32})
    details = {"quant_algo": "MIXED_PRECISION", "quantized_layers": mixed["quantized_layers"], "exclude_modules": []}
    assert mixed["quantized_layers"][paths[-1]]["quant_algo"] == "NVFP4_SVD"
    assert mixed == convert_hf_quant_config_format({"producer": ours["producer"], "quantization": details})
