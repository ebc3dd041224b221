"""What config.json says of the formats is what ModelOpt's own export would say."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calibration.modelopt_backend import NVFP4, mtq
from calibration.models import family_of
from calibration.quantization_config import quantization_config
from calibration.source import load_json, model_class

MakeFlux = Callable[..., Path]


def _modelopts(model: nn.Module, paths: Sequence[str]) -> Any:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import get_quant_config
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})
    for path in paths:
        for kind in ("input_quantizer", "weight_quantizer"):
            quantizer: Any = model.get_submodule(f"{path}.{kind}")
            quantizer.set_from_attribute_config(QuantizerAttributeConfig(**NVFP4, enable=True))
            quantizer.amax = torch.tensor(1.0)
    return convert_hf_quant_config_format(get_quant_config(model))


def _models(folder: Path) -> tuple[nn.Module, nn.Module, list[str]]:
    config = load_json(folder / "config.json")
    family = family_of(config)
    with torch.device("meta"):
        one, other = (model_class(family).from_config(config) for _ in range(2))
    return one, other, list(family.quantized(config))


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
    assert quantization_config(ours, paths) == _modelopts(theirs, paths)


def test_with_branches_it_is_modelopts_for_svdquant(tiny_flux: MakeFlux, tmp_path: Path) -> None:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    model, _, paths = _models(tiny_flux(tmp_path / "flux"))
    ours = quantization_config(model, paths, rank=32)
    described = {"quant_algo": "NVFP4_SVD", "group_size": 16, "exclude_modules": ours["ignore"], "lora_rank": 32}
    theirs = convert_hf_quant_config_format({"producer": ours["producer"], "quantization": described})
    assert ours == theirs
