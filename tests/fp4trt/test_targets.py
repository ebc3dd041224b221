from __future__ import annotations

import pytest

from fp4trt.errors import UnknownGpuError, UnsupportedFormatError
from fp4trt.targets import TARGETS, parse_gpus, require_format


@pytest.mark.parametrize("spelling", ["rtx5090", "RTX 5090", "NVIDIA GeForce RTX 5090", "rtx-5090", " rtx_5090 "])
def test_a_gpu_is_found_however_it_is_spelled(spelling: str) -> None:
    (target,) = parse_gpus(spelling)
    assert (target.name, target.compute_capability, target.memory_gib) == ("rtx5090", "SM120", 32)


@pytest.mark.parametrize(
    ("name", "capability", "backend"),
    [
        ("rtx5060", "SM120", "tensorrt_rtx"),
        ("rtxpro6000", "SM120", "tensorrt_rtx"),
        ("dgx-spark", "SM121", "tensorrt_rtx"),
        ("rtx4090", "SM89", "tensorrt_rtx"),
        ("h200", "SM90", "tensorrt"),
        ("b200", "SM100", "tensorrt"),
        ("b300", "SM103", "tensorrt"),
    ],
)
def test_a_gpu_has_its_compute_capability_and_backend(name: str, capability: str, backend: str) -> None:
    (target,) = parse_gpus(name)
    assert (target.compute_capability, target.backend) == (capability, backend)


def test_a_gpu_has_the_bandwidth_and_the_peak_of_each_format_that_it_multiplies() -> None:
    (geforce,) = parse_gpus("rtx5090")
    assert geforce.bandwidth == 1792
    assert geforce.tflops == {"fp16": 209.5, "bf16": 209.5, "fp8": 419.0, "nvfp4": 1676.0}
    rates = {name: set(TARGETS[name].tflops) for name in ("t4", "rtx3090", "rtx4090", "b200")}
    sixteen_bit = {"fp16", "bf16"}
    assert rates == {
        "t4": {"fp16"},
        "rtx3090": sixteen_bit,
        "rtx4090": {*sixteen_bit, "fp8"},
        "b200": {*sixteen_bit, "fp8", "mxfp8", "nvfp4"},
    }
    assert all(0 < target.bandwidth <= 8000 for target in TARGETS.values())


def test_several_gpus_are_listed_once_each() -> None:
    assert [target.name for target in parse_gpus("rtx5090,gb10,dgx-spark")] == ["rtx5090", "gb10"]


def test_an_unknown_gpu_lists_its_near_matches_in_one_line() -> None:
    with pytest.raises(UnknownGpuError, match=r"'rtx5099'; did you mean .*rtx5090") as caught:
        parse_gpus("rtx5099")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_gpu_that_is_near_to_none_lists_all_that_are_known() -> None:
    with pytest.raises(UnknownGpuError, match=r"unknown GPU 'foo'; known are rtx2060, .*rtx5090.*gb10$"):
        parse_gpus("foo")


def test_one_engine_has_one_backend() -> None:
    with pytest.raises(UnknownGpuError, match="build once for each backend"):
        parse_gpus("rtx5090,b200")
    with pytest.raises(UnknownGpuError, match="the one GPU in the machine"):
        parse_gpus("b200,b300")


def test_only_blackwell_multiplies_fp4() -> None:
    able = {target.compute_capability for target in TARGETS.values() if "nvfp4" in target.formats}
    assert able == {"SM100", "SM103", "SM120", "SM121"}


def test_a_gpu_without_fp4_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"rtx4090 \(SM89\) cannot compute") as caught:
        require_format(parse_gpus("rtx5090,rtx4090"), "nvfp4")
    assert caught.value.exit_code == 2
