from __future__ import annotations

import pytest

from fp4trt.targets import parse_gpus
from trt_build import memory


def test_the_estimate_of_flux_in_fp4_is_about_what_was_measured() -> None:
    assert memory.build_memory(int(6.32 * memory.GIB)) / memory.GIB == pytest.approx(17.9, abs=0.5)


def test_a_build_that_does_not_fit_is_warned_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 8 * memory.GIB)
    lines = memory.memory_lines(12 * memory.GIB, parse_gpus("rtx5090,rtx5060"))
    assert len(lines) == 3
    assert lines[0] == "memory: the build of 12.0 GiB of weights needs about 34.1 GiB"
    assert lines[1] == "warning: only 8.0 GiB of memory are available; the build may be killed"
    assert "8 GiB of rtx5060; use --weight-streaming" in lines[2]


def test_a_build_that_fits_has_no_warning() -> None:
    assert len(memory.memory_lines(1 << 20, parse_gpus("rtx5090"))) == 1


@pytest.mark.parametrize(("count", "said"), [(900, "900 bytes"), (2_000_000, "1.9 MiB"), (3 << 30, "3.0 GiB")])
def test_the_weights_have_a_readable_unit(count: int, said: str) -> None:
    assert f"the build of {said} of weights needs" in memory.memory_lines(count, parse_gpus("rtx5090"))[0]


def test_available_memory_is_known_here_and_plausible() -> None:
    free = memory.available_memory()
    assert free is None or 1 << 26 < free < 1 << 46
