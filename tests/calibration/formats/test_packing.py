"""The packer of integer comparisons gives the reference's bytes, for every BF16 number there is."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.formats import nvfp4
from calibration.formats.bfloat16 import largest_magnitude
from calibration.formats.compiled import compiled
from calibration.formats.nvfp4_packer import DevicePacker, Packer

SCALES = [float(np.float32(value)) for value in (1e-45, 1e-38, 2.3e-7, 0.02 / 2688, 1e-3, 1.0, 31.0, 1e30, 3e38)]


def _finite(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    return np.where((bits & 0x7FFF) >= 0x7F80, np.uint16(0x8000), bits)


def _values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _expected(bits: npt.NDArray[np.uint16], g: float) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    codes, scales = nvfp4.quantize(torch.from_numpy(_values(bits)), torch.tensor(g))
    return nvfp4.pack_codes(codes).numpy(), scales.view(torch.uint8).numpy()


def _assert_equal(bits: npt.NDArray[np.uint16], g: float) -> None:
    for found, wanted in zip(Packer(g).pack(bits), _expected(bits, g), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("g", SCALES)
def test_every_number_is_packed_as_the_fast_code_quantizes_it(g: float) -> None:
    rng = np.random.default_rng(1)
    everything = _finite(rng.permutation(np.arange(65536, dtype=np.uint16)).reshape(256, 256))
    _assert_equal(everything, g)
    around = rng.standard_normal((512, 256)) * np.exp2(rng.integers(-6, 14, (512, 16)).repeat(16, 1)) * g
    _assert_equal(_finite((around.clip(-3e38, 3e38).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)), g)


@settings(max_examples=100, deadline=None)
@given(
    bits=hnp.arrays(np.uint16, st.tuples(st.integers(1, 3), st.sampled_from([16, 48]))),
    g=st.floats(min_value=float(np.float32(1e-44)), max_value=float(np.float32(3e38)), width=32),
)
def test_packing_equals_the_slow_reference(bits: npt.NDArray[np.uint16], g: float) -> None:
    bits = _finite(bits)
    with np.errstate(all="ignore"):
        codes, scales = nvfp4.quantize_reference(_values(bits), np.float32(g))
    packed, packed_scales = Packer(g).pack(bits)
    np.testing.assert_array_equal(packed & 0xF, codes[:, 0::2])
    np.testing.assert_array_equal(packed >> 4, codes[:, 1::2])
    np.testing.assert_array_equal(packed_scales, scales)


def test_more_blocks_than_are_packed_at_a_time_are_packed_alike() -> None:
    rng = np.random.default_rng(2)
    bits = _finite(rng.integers(0, 65536, (2000, 464), np.uint16))  # 58,000 blocks: 906 times 64 and a rest
    _assert_equal(bits, 0.01)
    turned = np.asfortranarray(bits)
    for found, wanted in zip(Packer(0.01).pack(turned), Packer(0.01).pack(bits), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_it_packs_where_machine_code_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    njit, asked = numba.njit, []

    def nowhere(*functions: object, cache: bool = False, **options: object) -> object:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function '_pack': no locator available")
        return njit(*functions, **options)

    monkeypatch.setattr(numba, "njit", nowhere)
    compiled.cache_clear()  # type: ignore[attr-defined]
    try:
        _assert_equal(np.arange(0x3F00, 0x3F40, dtype=np.uint16).reshape(2, 32), 0.01)
    finally:
        compiled.cache_clear()  # type: ignore[attr-defined]
    assert asked == [True, False]


@settings(max_examples=200, deadline=None)
@given(bits=hnp.arrays(np.uint16, st.integers(0, 40)))
def test_the_largest_magnitude_is_that_of_the_values(bits: npt.NDArray[np.uint16]) -> None:
    values = _values(bits)
    wanted = float(np.abs(values).max(initial=0)) if np.isfinite(values).all() else None
    assert largest_magnitude(bits) == wanted


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("g", SCALES)
def test_packing_on_a_device_gives_the_same_bytes(g: float, device: str) -> None:
    bits = _finite(np.random.default_rng(3).integers(0, 65536, (64, 256), np.uint16))
    for found, wanted in zip(DevicePacker(g, device).pack(bits), Packer(g).pack(bits), strict=True):
        np.testing.assert_array_equal(found, wanted)
