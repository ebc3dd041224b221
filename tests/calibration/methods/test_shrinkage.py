"""Shrunk covariances: nearer to the truth, and what is chosen by them holds for rows that were not seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration.by_block.quantize_blocks import BlockTask
from calibration.formats import nvfp4
from calibration.methods.quality.quantize_block import quantize_block
from calibration.methods.quality.shrinkage import chance, shrink
from calibration.recipes.recipe import Quality

K = 64


def _rows(count: int, directions: int, seed: int) -> torch.Tensor:
    """Rows that depend on each other as those of a model do not: tenfold, which counts as independent."""
    random = torch.Generator().manual_seed(seed)
    onto = torch.randn(directions, K, generator=torch.Generator().manual_seed(0)) / directions**0.5
    rows = torch.randn(count, directions, generator=random) @ onto + 0.01 * torch.randn(count, K, generator=random)
    return rows.repeat(10, 1)


@pytest.mark.parametrize(("count", "directions"), [(20, K), (60, K), (60, 4), (4000, 4)])
def test_the_share_is_nearly_the_one_that_is_nearest_to_the_truth(count: int, directions: int) -> None:
    truth = torch.cov(_rows(40_000, directions, 1).T)
    sample = torch.cov(_rows(count, directions, 2).T)
    shares = torch.linspace(0, 1, 101).tolist()
    errors = [float((shrink(sample.clone(), share) - truth).norm()) for share in shares]
    found = chance(sample, 10 * count)
    assert float((shrink(sample.clone(), found) - truth).norm()) <= 1.02 * min(errors)
    assert found == pytest.approx(shares[errors.index(min(errors))], abs=0.12)


def test_the_diagonal_stays() -> None:
    sample = torch.cov(_rows(20, K, 2).T)
    assert torch.equal(shrink(sample.clone(), 0.7).diagonal(), sample.diagonal())
    assert torch.equal(shrink(sample.clone(), 1.0), torch.diag(sample.diagonal()))


def test_what_depends_on_nothing_is_all_chance() -> None:
    assert chance(torch.eye(K), 1000) == 1
    assert chance(torch.zeros(K, K), 1) == 1


def test_rows_unlike_those_of_calibration_are_served_no_worse_than_by_rounding() -> None:
    """No channel depends on another, and there are fewer rows than channels: nothing is to be learned of them."""
    random = torch.Generator().manual_seed(3)
    plain = nn.Linear(256, 48).bfloat16()
    seen, fresh = (torch.randn(rows, 256, generator=random).bfloat16() for rows in (160, 2000))
    block = nn.ModuleDict({"alone": nn.Linear(256, 48).bfloat16()})
    block.load_state_dict({f"alone.{name}": value for name, value in plain.state_dict().items()})

    def run(*_: object) -> None:
        with torch.no_grad():
            block["alone"](seen)

    quantize_block(
        BlockTask("block", block, {"block.alone": "nvfp4"}, (("block.alone",),), run), Quality(name="quality"), ()
    )
    with torch.no_grad():
        wanted, given = plain(fresh).float(), block["alone"](fresh).float()
        scale = nvfp4.global_scale(plain.weight.float().abs().max())
        rounded = nvfp4.fake_quantize(plain.weight.float(), scale)
        inputs = nvfp4.fake_quantize(fresh.float(), nvfp4.global_scale(fresh.float().abs().max()))
        usual = inputs @ rounded.T + plain.bias.float()
    assert (given - wanted).norm() <= (usual - wanted).norm()
