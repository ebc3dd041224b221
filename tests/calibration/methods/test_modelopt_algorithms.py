"""ModelOpt's own calibrations: each does something, and the checkpoint holds bit for bit what its quantizers hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import fp4trt
from calibration.by_block.quantize_blocks import BlockResult, BlockTask
from calibration.digits.model import load_transformer
from calibration.digits.sampling import capture
from calibration.formats import fp8, mxfp8, nvfp4
from calibration.formats.linears import QuantizedLinear
from calibration.methods.modelopt.algorithms import calibrated
from calibration.recipes.recipe import ModelOpt
from fp4trt.errors import NoEffect

BLOCK = "single_transformer_blocks.0"
MODULATION = (f"{BLOCK}.norm.linear",)
MERGED = tuple(f"{BLOCK}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
ALONE = (f"{BLOCK}.proj_out",)
GROUPS = (MODULATION, MERGED, ALONE)
ALGORITHMS: tuple[str, ...] = get_args(ModelOpt.model_fields["algorithm"].annotation)
SEARCHES = [algorithm for algorithm in ALGORITHMS if algorithm != "max"]


@dataclass(frozen=True)
class Done:
    """A block of the built-in model that an algorithm has calibrated.

    Attributes:
        block: with ModelOpt's quantizers.
        plain: as it was.
        result: of the method.
    """

    block: nn.Module
    plain: nn.Module
    result: BlockResult

    def whole(self, group: tuple[str, ...]) -> Any:
        """Return the linear that a group was calibrated as."""
        path = f"{group[0]}.whole.linear" if len(group) > 1 else group[0]
        return self.block.get_submodule(path.removeprefix(f"{BLOCK}."))

    def stored(self, path: str) -> dict[str, torch.Tensor]:
        """Return what the checkpoint holds of a linear."""
        return {
            name.rpartition(".")[2]: value for name, value in self.result.tensors.items() if name.startswith(f"{path}.")
        }

    def weight(self, path: str) -> torch.Tensor:
        """Return its weight, dequantized to FP32."""
        held = self.stored(path)
        return nvfp4.dequantize(nvfp4.unpack_codes(held["weight"]), held["weight_scale"], held["weight_scale_2"])


@functools.cache
def _calls() -> tuple[list[dict[str, Any]], nn.Module]:
    """Return what the block is given along two digits' ways, and the block."""
    model = load_transformer()
    inputs = capture(model, seeds=(0,), steps=6)
    block = model.to(torch.bfloat16).get_submodule(BLOCK)
    found: list[dict[str, Any]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: found.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        for call in inputs:
            model(**call)
    handle.remove()
    return found, block


def _task(block: nn.Module, formats: Mapping[str, str], calls: list[dict[str, Any]]) -> BlockTask:
    def run() -> None:
        with torch.no_grad():
            for call in calls:
                block(**call)

    groups = tuple(group for group in GROUPS if group[0] in formats)
    return BlockTask(BLOCK, block, formats, groups, run)


def _rows(path: str) -> int:
    return 1 if "norm" in path else 16


@functools.cache
def _done(algorithm: str) -> Done:
    calls, plain = _calls()
    block = copy.deepcopy(plain)
    task = _task(block, {path: "nvfp4" for group in GROUPS for path in group}, calls)
    return Done(block, plain, calibrated(algorithm, _rows)(task))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_checkpoint_dequantizes_to_modelopts_fake_quantized_weight(algorithm: str) -> None:
    done = _done(algorithm)
    for group in GROUPS:
        linear = done.whole(group)
        expected = linear.weight_quantizer(linear.weight)
        assert torch.equal(torch.cat([done.weight(path) for path in group]).bfloat16(), expected)
        whole = linear.weight_quantizer(linear.weight.float())
        assert torch.equal(torch.cat([done.weight(path) for path in group]), whole)  # in FP32 too


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_loaded_block_computes_what_modelopts_does_bit_for_bit(algorithm: str) -> None:
    done = _done(algorithm)
    block = copy.deepcopy(done.plain)
    for path in (*MODULATION, *MERGED, *ALONE):
        inner, held = path.removeprefix(f"{BLOCK}."), done.stored(path)
        linear: Any = block.get_submodule(inner)
        kept = {kind: held[kind] for kind in ("input_scale", "pre_quant_scale") if kind in held}
        smoothing = "pre_quant_scale" in held
        new = QuantizedLinear(linear.in_features, linear.out_features, True, "nvfp4", rank=0, smoothing=smoothing)
        new.load_state_dict({"weight": done.weight(path).bfloat16(), "bias": linear.bias, **kept}, assign=True)
        block.set_submodule(inner, new)
    call = _calls()[0][0]
    with torch.no_grad():
        for found, expected, plain in zip(*(one(**call) for one in (block, done.block, done.plain)), strict=True):
            assert torch.equal(found, expected)
            assert not torch.equal(found, plain)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_scales_are_the_quantizers_own_and_shared_in_a_group(algorithm: str) -> None:
    done = _done(algorithm)
    for group in GROUPS:
        linear = done.whole(group)
        quantizer, held = linear.weight_quantizer, [done.stored(path) for path in group]
        static = algorithm != "awq_lite"
        largest = 256 if algorithm == "four_over_six" else 448
        amax = (quantizer.global_amax if static else quantizer.amax).float()
        assert {float(tensors["weight_scale_2"]) for tensors in held} == {float(amax / (6 * largest))}
        entering = linear.input_quantizer.amax.float() / (6 * 448)
        assert {float(tensors["input_scale"]) for tensors in held} == {float(entering)}
        if static:
            wanted = quantizer.amax.reshape(len(linear.weight), -1) / 6 / held[0]["weight_scale_2"]
            scales = torch.cat([tensors["weight_scale"] for tensors in held]).float()
            assert torch.allclose(scales, wanted.clamp(max=448), rtol=1 / 15, atol=2**-10)
        if algorithm == "gptq":  # which keeps the rounded weights themselves
            assert torch.equal(torch.cat([done.weight(path) for path in group]).bfloat16(), linear.weight)


@pytest.mark.parametrize("algorithm", SEARCHES)
def test_each_search_changes_weights_and_brings_the_output_nearer_than_max(algorithm: str) -> None:
    done, plain = _done(algorithm), _done("max")
    figures = done.result.figures["modelopt"]
    for group in (MERGED, ALONE):
        assert figures[group[0]]["changed"] > 0.1
        assert plain.result.figures["modelopt"][group[0]]["changed"] == 0
    assert figures[MERGED[0]]["error"] < 0.96 * figures[MERGED[0]]["plain_error"]
    # Nearer weights do not make this linear's output nearer, nor do inputs scaled for the sake of the weights.
    most = {"four_over_six": 1.02, "awq_lite": 1.03}.get(algorithm, 0.96)
    assert figures[ALONE[0]]["error"] < most * figures[ALONE[0]]["plain_error"]
    assert _output_error(done) < (1.03 if algorithm == "four_over_six" else 0.97) * _output_error(plain)


def _output_error(done: Done) -> float:
    """Return the squared error of what the block gives on all calls."""
    total = 0.0
    with torch.no_grad():
        for call in _calls()[0]:
            wanted, found = (torch.cat([*block(**call)], 1).float() for block in (done.plain, done.block))
            total += float((found - wanted).square().sum())
    return total


@pytest.mark.parametrize("algorithm", ["mse", "fp8_scale_sweep", "four_over_six"])
def test_a_search_for_the_nearest_weights_finds_nearer_ones_in_every_linear(algorithm: str) -> None:
    done, plain = _done(algorithm), _done("max")
    for path in (*MODULATION, *MERGED, *ALONE):
        weight: Any = done.plain.get_submodule(path.removeprefix(f"{BLOCK}.")).weight
        assert (done.weight(path) - weight).norm() < 0.97 * (plain.weight(path) - weight).norm()


def test_no_two_algorithms_choose_the_same() -> None:
    stored = {algorithm: _done(algorithm).weight(MERGED[0]) for algorithm in ALGORITHMS}
    for one in ALGORITHMS:
        for other in ALGORITHMS:
            assert one == other or not torch.equal(stored[one], stored[other]), (one, other)


def test_max_is_plain_quantization_with_shared_scales() -> None:
    done = _done("max")
    for group in GROUPS:
        weights = [done.plain.get_submodule(path.removeprefix(f"{BLOCK}.")).weight for path in group]
        scale = nvfp4.global_scale(torch.cat(weights).float().abs().max())
        for path, weight in zip(group, weights, strict=True):
            codes, scales = nvfp4.quantize(weight, scale)
            held = done.stored(path)
            assert torch.equal(held["weight"], nvfp4.pack_codes(codes))
            assert torch.equal(held["weight_scale"].float(), scales.float())


def test_four_over_six_leaves_room_for_every_block_and_chooses_between_two_scales() -> None:
    done = _done("four_over_six")
    for path in ALONE:
        weight = done.plain.get_submodule(path.removeprefix(f"{BLOCK}.")).weight.float()
        held = done.stored(path)
        amax = weight.unflatten(-1, (-1, 16)).abs().amax(-1)
        choices = [nvfp4.block_scales(amax * factor, held["weight_scale_2"]).float() for factor in (1, 1.5)]
        six, four = ((held["weight_scale"].float() == scales) for scales in choices)
        assert bool((six | four).all())
        assert 0.1 < six.float().mean() < 0.9
        assert held["weight_scale"].float().max() <= 384
        assert done.result.amax[f"{path}.weight_quantizer"] == float(weight.abs().max())


def test_the_sweep_finds_the_best_of_all_scales_for_each_block() -> None:
    done = _done("fp8_scale_sweep")
    path = ALONE[0]
    blocks = done.plain.get_submodule("proj_out").weight.float()[:8].reshape(-1, 16)
    held = done.stored(path)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * held["weight_scale_2"]
    errors = torch.stack([(nvfp4.values_under(blocks, scale) - blocks).square().sum(-1) for scale in scales])
    found = (done.weight(path)[:8].reshape(-1, 16) - blocks).square().sum(-1)
    assert torch.allclose(found, errors.amin(0), rtol=1e-5, atol=0)


def test_awq_leaves_a_smoothing_that_is_modelopts_but_not_where_a_picture_has_one_row() -> None:
    done = _done("awq_lite")
    assert "pre_quant_scale" not in done.stored(MODULATION[0])
    for group in (MERGED, ALONE):
        for path in group:
            smoothing = done.stored(path)["pre_quant_scale"]
            assert torch.equal(smoothing, done.whole(group).input_quantizer.pre_quant_scale.reshape(-1))
            assert smoothing.dtype == torch.bfloat16
            assert len(smoothing.unique()) > 20
    for algorithm in set(ALGORITHMS) - {"awq_lite"}:
        assert "pre_quant_scale" not in {name.rpartition(".")[2] for name in _done(algorithm).result.tensors}


@pytest.mark.parametrize("algorithm", ["max", "mse", "gptq", "awq_lite"])
def test_linears_in_fp8_are_rounded_to_nearest_whatever_the_algorithm(algorithm: str) -> None:
    calls, plain = _calls()
    formats = {**dict.fromkeys((*MODULATION, *MERGED), "fp8"), ALONE[0]: "nvfp4"}
    result = calibrated(algorithm, _rows)(_task(copy.deepcopy(plain), formats, calls[:2]))
    entering = max(nn.functional.silu(call["temb"]).abs().max() for call in calls[:2])
    assert result.tensors[f"{MODULATION[0]}.input_scale"] == entering.float() / 448
    for group in (MODULATION, MERGED):
        weights: dict[str, Any] = {path: plain.get_submodule(path.removeprefix(f"{BLOCK}.")).weight for path in group}
        own = {float(weight.abs().max()) for weight in weights.values()}
        assert len(own) == len(group)
        for path, weight in weights.items():
            held = {n.rpartition(".")[2]: v for n, v in result.tensors.items() if n.startswith(f"{path}.")}
            assert held.keys() == {"weight", "weight_scale", "input_scale"}
            assert held["weight_scale"] == torch.tensor(max(own)) / 448
            assert torch.equal(held["weight"].float(), fp8.quantize(weight, held["weight_scale"]).float())
            assert result.amax[f"{path}.weight_quantizer"] == max(own)
    assert f"{ALONE[0]}.weight_scale_2" in result.tensors


@pytest.mark.parametrize("algorithm", ["max", "mse", "gptq", "awq_lite"])
def test_linears_in_mxfp8_are_rounded_as_ptq_does_and_need_no_amax_of_their_input(algorithm: str) -> None:
    calls, plain = _calls()
    formats = {MODULATION[0]: "mxfp8", **dict.fromkeys(MERGED, "mxfp8"), ALONE[0]: "nvfp4"}
    result = calibrated(algorithm, _rows)(_task(copy.deepcopy(plain), formats, calls[:2]))
    for path in (*MODULATION, *MERGED):
        weight: Any = plain.get_submodule(path.removeprefix(f"{BLOCK}.")).weight
        held = {n.rpartition(".")[2]: v for n, v in result.tensors.items() if n.startswith(f"{path}.")}
        codes, scales = mxfp8.quantize(weight)
        assert held.keys() == {"weight", "weight_scale"}
        assert torch.equal(held["weight"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(held["weight_scale"], scales)
        assert {n: v for n, v in result.amax.items() if n.startswith(f"{path}.")} == {
            f"{path}.weight_quantizer": float(weight.detach().abs().max())
        }
    assert f"{ALONE[0]}.weight_scale_2" in result.tensors


def test_an_algorithm_that_changes_nothing_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration.formats import modelopt_backend

    # With a backend on the weights the sweep passes every quantizer over, without a word.
    attributes = {**modelopt_backend.STATIC_NVFP4, "backend": modelopt_backend.BACKENDS["nvfp4"]}
    monkeypatch.setattr(modelopt_backend, "STATIC_NVFP4", attributes)
    calls, plain = _calls()
    task = _task(copy.deepcopy(plain), dict.fromkeys(ALONE, "nvfp4"), calls[:1])
    with pytest.raises(NoEffect, match=rf"fp8_scale_sweep has changed no weight of {BLOCK}; expected some") as raised:
        calibrated("fp8_scale_sweep", _rows)(task)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_the_static_quantizer_is_the_reference_block_by_block() -> None:
    from calibration.formats.modelopt_backend import tensor_quantizer

    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=random) * torch.logspace(-6, 1, 64)[:, None]
    amax = weight.reshape(-1, 16).abs().amax(-1) * torch.rand(256, generator=random) * 1.5
    amax[3], weight.view(-1, 16)[5] = 0, 0
    for largest in (448.0, 256.0):
        total = weight.abs().max()
        found = tensor_quantizer.static_blockwise_fp4_fake_quant(
            weight, amax[:, None], total, True, largest, torch.float32, False
        )
        g = np.float32(total) / np.float32(6 * largest)
        codes, scales = np.empty((256, 16), np.uint8), np.empty((256, 1), np.uint8)
        for row, (block, most) in enumerate(zip(weight.reshape(-1, 16).numpy(), amax.numpy(), strict=True)):
            wanted = torch.tensor(min(most / (np.float32(6) * g), np.float32(448)))
            scales[row] = wanted.to(torch.float8_e4m3fn).view(torch.uint8)
            step = np.float32(wanted.to(torch.float8_e4m3fn).float()) * g
            values = np.clip(block / step if step else block * 0, -6, 6)
            codes[row] = [nvfp4._nearest_code(np.float32(value)) for value in values]
        expected = nvfp4.dequantize_reference(codes, scales, g).reshape(64, 64)
        assert np.array_equal(found.numpy(), expected)


def test_the_static_quantizer_is_modelopts_kernel_but_for_the_last_place_of_its_scales() -> None:
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

    from calibration.formats.modelopt_backend import tensor_quantizer

    bounds, levels = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]), torch.tensor(nvfp4.E2M1_VALUES)
    equal = 0
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        weight = torch.randn(256, 16, generator=random)
        amax = weight.abs().amax(-1, keepdim=True) * torch.rand(256, 1, generator=random)
        total = weight.abs().max()
        for largest in (448.0, 256.0):
            # What the kernel is given and does, in torch: modelopt.torch.kernels.quantization.gemm.fp4_kernel.
            scale = scaled_e4m3_impl(amax / 6.0, total * (448.0 / largest) / 6.0)
            expected = levels[torch.bucketize(weight.abs() / scale, bounds)].copysign(weight) * scale
            found = tensor_quantizer.static_blockwise_fp4_fake_quant(
                weight, amax, total, True, largest, torch.float32, False
            )
            assert torch.allclose(found, expected, rtol=2.5e-7, atol=0)
            equal += torch.equal(found, expected)
    assert 0 < equal < 16  # it scales by 1 / (448 / amax) where we, as TensorRT, scale by amax / 448


def test_an_unknown_algorithm_ends_with_status_2_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    method = {"name": "modelopt", "algorithm": "awq"}
    recipe.write_text(yaml.safe_dump({"name": "mine", "method": method}), encoding="utf-8")
    assert fp4trt.run(["recipes", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "method.algorithm is 'awq'" in error
    assert "awq_lite" in error
