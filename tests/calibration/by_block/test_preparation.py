"""What a method that quantizes block by block is given."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration.by_block.input_statistics import Moments, observe_moments
from calibration.by_block.quantize_blocks import BlockResult, BlockTask, prepared_by_block
from calibration.inputs.captured import load_inputs
from fp4trt.families.flux import FLUX
from fp4trt.json_file import load_json


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def test_a_run_may_be_left_where_all_that_is_wanted_was_reached(
    digits: Path, quantized_digits: Path, tmp_path: Path
) -> None:
    calls = load_inputs(quantized_digits / "calibration" / "inputs.safetensors")[::10]
    formats = dict.fromkeys(FLUX.quantized(load_json(digits / "config.json")), "nvfp4")
    seen: dict[str, list[int]] = {}

    def method(task: BlockTask) -> BlockResult:
        first, last = (task.linear(group[0]) for group in (task.groups[1], task.groups[-1]))
        reached: list[int] = []
        last.register_forward_pre_hook(lambda *_: reached.append(1))
        task.run([first])  # the first goes to its end: the next block needs what comes of it
        found: list[Moments] = []
        for wanted in ([], [first]):
            with observe_moments({"first": first}, {"first": _identity}, 1000) as moments:
                task.run(wanted)
            found.append(moments["first"])
        assert torch.equal(found[0].product, found[1].product)
        assert found[0].count == found[1].count
        seen[task.path] = reached
        return BlockResult({})

    with prepared_by_block(digits, calls, formats, method, {}, tmp_path / "blocks"):
        pass
    assert {path: len(reached) for path, reached in seen.items()} == dict.fromkeys(seen, 2 * len(calls))
    assert len(seen) == 2


def test_a_half_of_the_products_gives_all_of_them() -> None:
    rows = torch.randn(2, 50, 700, generator=torch.Generator().manual_seed(0))  # more channels than one slab has
    module = torch.nn.Linear(700, 1)
    with observe_moments({"": module}, {"": _identity}, 50) as found, torch.no_grad():
        for call in rows:
            module(call)
    product = found[""].product
    assert torch.equal(product, product.T)
    flat = rows.flatten(0, 1).double()
    torch.testing.assert_close(product.double(), flat.T @ flat, atol=1e-3, rtol=1e-5)


def test_moments_become_their_covariance_in_place() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 700, generator=random) + 1
    moments = Moments(50, rows.sum(dim=0), rows.sum(dim=0), torch.zeros(700), rows.T @ rows)
    mean = moments.rounded / 50
    expected = moments.product / 50 - torch.outer(mean, mean)
    found = moments.into_covariance()
    assert torch.equal(found, expected)
    assert found.data_ptr() == moments.product.data_ptr()


def test_moments_of_a_linear_without_bias_keep_their_mean() -> None:
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) + 1
    rounded = rows.round()
    sums = rows.sum(dim=0), rounded.sum(dim=0)
    change = rows - rounded
    moments = Moments(50, *sums, change.square().sum(dim=0), rounded.T @ rounded, change.T @ rounded)
    power, noise = moments.power_and_noise(centred=False)
    torch.testing.assert_close(noise, change.square().mean(dim=0))
    torch.testing.assert_close(power, rounded.square().mean(dim=0))
    torch.testing.assert_close(moments.into_lost_covariance().addr_(*moments.lost_means()), change.T @ rounded / 50)
    torch.testing.assert_close(moments.into_covariance().addr_(*moments.means()), rounded.T @ rounded / 50)
