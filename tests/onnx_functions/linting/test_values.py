"""What the lint says that a tensor holds is what numpy says of its elements."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from onnx_functions.linting.values import Values, read_values

_KINDS = {
    TensorProto.FLOAT8E4M3FN: (np.uint8, ml_dtypes.float8_e4m3fn),
    TensorProto.BFLOAT16: (np.uint16, ml_dtypes.bfloat16),
    TensorProto.FLOAT16: (np.uint16, np.float16),
}
_BYTE = st.sampled_from([0x00, 0x01, 0x7C, 0x7E, 0x7F, 0x80, 0x81, 0xFC, 0xFE, 0xFF]) | st.integers(0, 0xFF)


@pytest.mark.parametrize("kind", _KINDS)
@given(raw=st.lists(_BYTE, min_size=4, max_size=12))
def test_values_are_counted_as_numpy_counts_them(kind: int, raw: list[int]) -> None:
    word, element = _KINDS[kind]
    data = bytes(raw[: len(raw) // 2 * 2])
    numbers = np.frombuffer(data, word).view(element).astype(np.float32)
    tensor = TensorProto(name="x", data_type=kind, dims=[len(numbers)], raw_data=data)
    negative = int((numbers < 0).sum()) if kind == TensorProto.FLOAT8E4M3FN else 0
    wanted = Values(int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum()), negative, not numbers.any())
    found = read_values({"x": tensor}, {"x": None})["x"]
    assert (found.nan, found.infinite, found.negative, found.all_zero) == (
        wanted.nan, wanted.infinite, wanted.negative, wanted.all_zero,
    )  # fmt: skip
