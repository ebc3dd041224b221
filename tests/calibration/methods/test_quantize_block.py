"""The method ``quality`` on a block of one linear, whose inputs are all known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration.by_block.quantize_blocks import BlockTask
from calibration.formats import fp8, nvfp4
from calibration.methods.quality.quantize_block import quantize_block
from calibration.recipes.recipe import Quality

K, N = 256, 128


@pytest.fixture
def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N).bfloat16()


def _quantized(plain: nn.Linear, seen: torch.Tensor, **options: object) -> tuple[nn.Linear, dict[str, float]]:
    """Return the linear as it computes behind the method, and what the method notes of it."""
    alone = nn.Linear(K, N).bfloat16()
    alone.load_state_dict(plain.state_dict())
    block = nn.ModuleDict({"alone": alone})

    def run(*_: object) -> None:
        with torch.no_grad():
            alone(seen)

    task = BlockTask("block", block, {"block.alone": "nvfp4"}, (("block.alone",),), run)
    result = quantize_block(task, Quality.model_validate({"name": "quality", **options}), ())
    return alone, result.figures["block.alone"]


def test_rows_unlike_those_of_calibration_are_served_no_worse_than_by_rounding(plain: nn.Linear) -> None:
    """No channel depends on another, and there are fewer rows than channels: nothing is to be learned of them."""
    random = torch.Generator().manual_seed(3)
    seen, fresh = (torch.randn(rows, K, generator=random).bfloat16() for rows in (160, 2000))
    alone, _ = _quantized(plain, seen)
    with torch.no_grad():
        wanted, given = plain(fresh).float(), alone(fresh).float()
        scale = nvfp4.global_scale(plain.weight.float().abs().max())
        rounded = nvfp4.fake_quantize(plain.weight.float(), scale)
        inputs = nvfp4.fake_quantize(fresh.float(), nvfp4.global_scale(fresh.float().abs().max()))
        usual = inputs @ rounded.T + plain.bias.float()
    assert (given - wanted).norm() <= (usual - wanted).norm()


@pytest.mark.parametrize("rank", [0, 8])
def test_a_bias_takes_up_what_rounding_has_lost_and_no_difference_between_rows(rank: int, plain: nn.Linear) -> None:
    """Moments are of 40 rows of the call, and the few that are unlike the others are more frequent among them."""
    seen = torch.randn(4000, K, generator=torch.Generator().manual_seed(3))
    seen[::400] += 3
    seen = seen.bfloat16()
    alone, _ = _quantized(plain, seen, rows_per_call=40, rank=rank)
    with torch.no_grad():
        wanted = plain(seen).float()
        lost = (alone(seen).float() - wanted).mean(dim=0)
    assert (lost.abs() < 0.15 * wanted.std(dim=0)).all()


def test_linears_in_fp8_that_read_one_input_have_one_weight_scale(plain: nn.Linear) -> None:
    block, seen = nn.ModuleDict({"a": plain, "b": nn.Linear(K, N // 2).bfloat16()}), torch.randn(64, K).bfloat16()
    with torch.no_grad():
        plain.weight *= 1.5
    before: dict[str, torch.Tensor] = {f"block.{name}": each.weight.detach().clone() for name, each in block.items()}

    def run(*_: object) -> None:
        with torch.no_grad():
            for linear in block.values():
                linear(seen)

    task = BlockTask("block", block, dict.fromkeys(before, "fp8"), (tuple(before),), run)
    result = quantize_block(task, Quality.model_validate({"name": "quality"}), ())
    largest = before["block.a"].abs().max().float()
    assert largest > before["block.b"].abs().max()
    for path, weight in before.items():
        assert result.tensors[f"{path}.weight_scale"] == largest / 448
        assert torch.equal(result.tensors[f"{path}.weight"].float(), fp8.quantize(weight, largest / 448).float())
        assert result.amax[f"{path}.weight_quantizer"] == float(largest)


def test_a_weight_with_rows_of_zeros_is_quantized(plain: nn.Linear) -> None:
    with torch.no_grad():
        plain.weight.zero_()
        plain.weight[5, 3] = 1  # and every row that is noted is zero
    alone, noted = _quantized(plain, torch.randn(64, K).bfloat16())
    assert alone.weight.nonzero().tolist() == [[5, 3]]
    assert noted["error"] == noted["plain_error"] == 0
