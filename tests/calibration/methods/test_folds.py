"""Folds change what is quantized, not what is computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.by_block.input_statistics import observe_channels
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import load
from calibration.digits.model import load_transformer
from calibration.inputs.captured import Inputs, load_inputs
from calibration.methods.quality.folds import fold_block
from fp4trt.families import family_of
from fp4trt.families.family import Modulated
from fp4trt.json_file import load_json
from tests.frame.diffusers_models import MODELS


def _places(model: nn.Module, source: Path) -> Iterator[tuple[nn.Module, tuple[Modulated, ...]]]:
    config = load_json(source / "config.json")
    family = family_of(config)
    for block in family.blocks(config):
        yield model.get_submodule(block), family.modulated(config, block)


def _run(model: nn.Module, calls: list[Inputs], dtype: torch.dtype) -> torch.Tensor:
    given = [{name: v.to(dtype) if v.dtype == torch.bfloat16 else v for name, v in call.items()} for call in calls]
    with torch.inference_mode():
        return torch.cat([model(**call, return_dict=False)[0].float() for call in given])


def _folded(model: nn.Module, source: Path, calls: list[Inputs]) -> nn.Module:
    """Fold every block of a copy, all after the same run: the folds of one block leave the others' inputs alone."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, places in _places(model, source):
            first = {place.consumers[0]: block.get_submodule(place.consumers[0]) for place in places}
            with observe_channels(first, 64) as seen:
                _run(model, calls, next(model.parameters()).dtype)
            fold_block(block, places, seen, shift=True, factors=True)
    return model


@pytest.fixture(scope="module")
def calls(quantized_digits: Path) -> list[Inputs]:
    return list(load_inputs(quantized_digits / "calibration" / "inputs.safetensors")[::4])


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_in_fp32_the_folded_model_computes_the_same(digits: Path, calls: list[Inputs]) -> None:
    model = load_transformer()
    folded = _folded(model, digits, calls)
    for (block, places), (was, _) in zip(_places(folded, digits), _places(model, digits), strict=True):
        for place in places:
            for path in (place.modulation, *place.consumers):
                assert not torch.equal(block.get_submodule(path).bias, was.get_submodule(path).bias)
    assert _error(_run(folded, calls, torch.float32), _run(model, calls, torch.float32)) < 1e-6


@pytest.mark.parametrize(
    ("name", "places"), [("qwen-image", [4, 4, 4]), ("sd3", [4, 4, 4, 3]), ("sd3.5-medium", [5, 4, 4])]
)
def test_models_whose_blocks_differ_are_folded_too(name: str, places: list[int], tmp_path: Path) -> None:
    MODELS[name].save(tmp_path)
    model, config = load_source(tmp_path, torch.float32), load_json(tmp_path / "config.json")
    calls = [family_of(config).example_inputs(config, (2, 16, 7), seed, torch.bfloat16) for seed in range(2)]
    assert [len(found) for _, found in _places(model, tmp_path)] == places
    folded = _folded(model, tmp_path, calls)
    changed = [path for path, value in folded.named_parameters() if not torch.equal(value, model.get_parameter(path))]
    assert changed
    assert _error(_run(folded, calls, torch.float32), _run(model, calls, torch.float32)) < 1e-5


def test_in_bf16_folding_adds_less_than_a_twentieth_of_what_quantization_does(
    digits: Path, quantized_digits: Path, calls: list[Inputs]
) -> None:
    wanted = _run(load_transformer(), calls, torch.float32)
    folded = _folded(load_transformer(dtype=torch.bfloat16), digits, calls).float()
    added = _error(_run(folded, calls, torch.float32), wanted)
    quantized = _error(_run(load(quantized_digits, torch.float32), calls, torch.float32), wanted)
    print(f"folds in BF16: velocity error {added:.5f}, {added / quantized:.2%} of plain quantization's")
    assert 0 < added < 0.05 * quantized


def test_the_means_are_gone_from_what_the_linears_read(digits: Path, calls: list[Inputs]) -> None:
    folded = _folded(load_transformer(), digits, calls)
    block, places = next(_places(folded, digits))
    first = {place.consumers[0]: block.get_submodule(place.consumers[0]) for place in places}
    with observe_channels(first, 1) as seen:
        _run(folded, calls, torch.float32)
    for channels in seen.values():
        assert float(channels.mean.abs().max()) < 1e-4 * float(channels.amax.max())
