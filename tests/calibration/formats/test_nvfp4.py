"""The number format: the fast code equals the slow reference, an independent one, and ModelOpt's packer."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.formats import nvfp4

F32 = npt.NDArray[np.float32]
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, -0.0, 1e-8]
SUBNORMAL = np.float32(1e-42)


def _ml_dtypes_pack(x: F32, g: np.float32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize with ml_dtypes' own casts: nothing here is shared with the code under test."""
    with np.errstate(all="ignore"):
        blocks = x.reshape(-1, 16)
        s = np.minimum(np.abs(blocks).max(-1, keepdims=True) / (np.float32(6) * g), np.float32(448))
        s8 = s.astype(ml_dtypes.float8_e4m3fn)
        d = s8.astype(np.float32) * g
        q = np.clip(blocks / np.where(d == 0, np.float32(3e38), d), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    codes = q.view(np.uint8).reshape(x.shape) & 0xF
    return codes[..., 0::2] | (codes[..., 1::2] << 4), s8.view(np.uint8).reshape(*x.shape[:-1], -1)


def _pack(x: F32, g: torch.Tensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    codes, scales = nvfp4.quantize(torch.from_numpy(x), g)
    return nvfp4.pack_codes(codes).numpy(), scales.view(torch.uint8).numpy()


def _hard_cases() -> dict[str, F32]:
    rng = np.random.default_rng(7)
    wide = rng.standard_normal((64, 64)) * np.exp(6 * rng.standard_normal((64, 4)).repeat(16, axis=1))
    tied = rng.choice(TIES, (32, 64)) * rng.choice([-1.0, 1.0], (32, 64))
    return {
        "random": rng.standard_normal((64, 64)).astype(np.float32),
        "tied": tied.astype(np.float32),
        "subnormal": (rng.standard_normal((16, 64)) * SUBNORMAL).astype(np.float32),
        "huge": (rng.standard_normal((16, 64)) * 1e38).clip(-3e38, 3e38).astype(np.float32),
        "zero block": np.where(np.arange(64) < 32, np.float32(0), rng.standard_normal((8, 64)).astype(np.float32)),
        "negative zero": np.where(rng.random((8, 64)) < 0.5, np.float32(-0.0), np.float32(1)),
        "wide range": wide.astype(np.float32),
        "bfloat16": rng.standard_normal((64, 64)).astype(ml_dtypes.bfloat16).astype(np.float32),
    }


CASES = _hard_cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("amax", ["own", 2688.0, 1e-20])
def test_codes_and_scales_equal_the_slow_reference_and_ml_dtypes(name: str, amax: str | float) -> None:
    x = CASES[name]
    g = nvfp4.global_scale(max(float(np.abs(x).max()), 1e-38) if amax == "own" else float(amax))
    codes, scales = nvfp4.quantize(torch.from_numpy(x), g)
    slow_codes, slow_scales = nvfp4.quantize_reference(x, g.numpy())
    np.testing.assert_array_equal(codes.numpy(), slow_codes)
    np.testing.assert_array_equal(scales.view(torch.uint8).numpy(), slow_scales)
    packed, packed_scales = _ml_dtypes_pack(x, np.float32(g))
    np.testing.assert_array_equal(_pack(x, g)[0], packed)
    np.testing.assert_array_equal(_pack(x, g)[1], packed_scales)


@settings(max_examples=150, deadline=None)
@given(
    x=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([16, 48])),
        elements=st.one_of(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.sampled_from([float(np.float32(v)) for v in (*TIES, *(-v for v in TIES))]),
        ),
    ),
    amax=st.floats(2.0**-60, 2.0**60, width=32),
)
def test_any_finite_data_are_packed_as_ml_dtypes_packs_them(x: F32, amax: float) -> None:
    g = nvfp4.global_scale(amax)
    for ours, theirs, slow in zip(
        _pack(x, g), _ml_dtypes_pack(x, np.float32(g)), nvfp4.quantize_reference(x, g.numpy()), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        if ours.shape == slow.shape:
            np.testing.assert_array_equal(ours, slow)
    fake = nvfp4.fake_quantize(torch.from_numpy(x), g).numpy()
    codes, scales = nvfp4.quantize_reference(x, g.numpy())
    np.testing.assert_array_equal(
        fake.view(np.int32), nvfp4.dequantize_reference(codes, scales, g.numpy()).view(np.int32)
    )


def _modelopt_pack(x: F32, g: torch.Tensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, scales, _ = NVFP4QTensor.quantize(torch.from_numpy(x.copy()), 16, weights_scaling_factor_2=g)
    return packed._quantized_data.numpy(), scales.view(torch.uint8).numpy()


def _positive_zeros(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    low, high = packed & 0xF, packed >> 4
    return np.where(low == 8, 0, low) | (np.where(high == 8, 0, high) << 4)


def _as_modelopt_means_it(x: F32, g: torch.Tensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return our bytes with ModelOpt's three deviations by design: zero blocks, tiny blocks, the sign of zero."""
    packed, scales = _pack(x, g)
    with np.errstate(all="ignore"):
        wanted = np.abs(x.reshape(*x.shape[:-1], -1, 16)).max(-1) / (np.float32(6) * g.numpy())
    # A block of zeros gets the scale 1 and one whose scale would round to zero the smallest one above it.
    scales = np.where(wanted == 0, np.uint8(0x38), np.where(scales == 0, np.uint8(1), scales))
    tiny = np.repeat((wanted > 0) & (_pack(x, g)[1] == 0), 8, axis=-1)
    d = np.float32(2.0**-9) * g.numpy()
    with np.errstate(all="ignore"):
        codes = np.clip(x / (d if d else np.float32(3e38)), -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    return _positive_zeros(np.where(tiny, codes[..., 0::2] | (codes[..., 1::2] << 4), packed)), scales


@pytest.mark.parametrize("name", CASES)
def test_modelopts_packer_gives_the_same_bytes_but_where_it_differs_by_design(name: str) -> None:
    x = CASES[name]
    g = nvfp4.global_scale(max(float(np.abs(x).max()), 1e-30))
    packed, scales = _modelopt_pack(x, g)
    expected = _as_modelopt_means_it(x, g)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(_positive_zeros(packed), expected[0])


@settings(max_examples=100, deadline=None)
@given(
    x=hnp.arrays(np.float32, (2, 32), elements=st.floats(-(2.0**20), 2.0**20, width=32)),
    amax=st.floats(2.0**-20, 2.0**20, width=32),
)
def test_modelopts_packer_agrees_on_any_data_but_where_it_differs_by_design(x: F32, amax: float) -> None:
    g = nvfp4.global_scale(amax)
    packed, scales = _modelopt_pack(x, g)
    expected = _as_modelopt_means_it(x, g)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(_positive_zeros(packed), expected[0])


def test_modelopt_differs_where_it_means_to() -> None:
    g = nvfp4.global_scale(2688.0)
    zero = np.zeros((1, 16), np.float32)
    assert _pack(zero, g)[1].item() == 0
    assert _modelopt_pack(zero, g)[1].item() == 0x38, "ModelOpt gives a block of zeros the scale 1.0"
    tiny = np.full((1, 16), 1e-3, np.float32)
    assert _pack(tiny, g)[1].item() == 0, "1e-3 / 6 is under half of the smallest E4M3 number and rounds to 0"
    assert _modelopt_pack(tiny, g)[1].item() == 1, "ModelOpt never goes below the smallest E4M3 number"
    negative = np.where(np.arange(16) % 2, np.float32(-0.0), np.float32(6)).reshape(1, 16)
    assert (_pack(negative, g)[0] == 0x87).all()
    assert (_modelopt_pack(negative, g)[0] == 0x07).all(), "ModelOpt drops the sign of a zero"


def test_packing_puts_the_first_code_into_the_low_nibble() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    packed = nvfp4.pack_codes(codes)
    assert packed[0].item() == 0x10
    assert torch.equal(nvfp4.unpack_codes(packed), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fake_quantization_keeps_dtype_and_equals_quantize_then_dequantize(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    g = nvfp4.global_scale(x.abs().max().float())
    codes, scales = nvfp4.quantize(x, g)
    expected = nvfp4.dequantize(codes, scales, g).to(dtype)
    assert torch.equal(nvfp4.fake_quantize(x, g), expected)
    assert nvfp4.fake_quantize(x, g).dtype == dtype


@pytest.mark.parametrize("shape", [(7, 64), (3, 5, 32), (0, 64), (2, 48)])
def test_fake_quantization_in_parts_gives_the_same_bits(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = nvfp4.fake_quantize(x, torch.tensor(0.01))
    monkeypatch.setattr(nvfp4, "_PART", 32)
    assert torch.equal(nvfp4.fake_quantize(x, torch.tensor(0.01)).view(torch.int16), whole.view(torch.int16))


@pytest.mark.gpu
def test_cuda_gives_the_same_codes_and_scales() -> None:
    for x in CASES.values():
        g = nvfp4.global_scale(max(float(np.abs(x).max()), 1e-38))
        here = nvfp4.quantize(torch.from_numpy(x), g)
        there = nvfp4.quantize(torch.from_numpy(x).cuda(), g.cuda())
        assert torch.equal(here[0], there[0].cpu())
        assert torch.equal(here[1].view(torch.uint8), there[1].cpu().view(torch.uint8))
