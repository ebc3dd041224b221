"""The machines of the tests here: each test runs on a stand-in everywhere, and on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.machines import Machine, OnCard, OnStandIn


@pytest.fixture(scope="session")
def engines_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines lie that were built for the GPU, once for all tests."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(
    request: pytest.FixtureRequest, quantized_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """A stand-in, or the GPU."""
    if request.param == "stand-in":
        return OnStandIn(quantized_digits, tmp_path, monkeypatch)
    found: Machine = request.getfixturevalue("gpu")
    return found


@pytest.fixture
def gpu(
    quantized_digits: Path, plain_digits: Path, engines_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """The GPU, for what no stand-in shows."""
    monkeypatch.setenv("FP4TRT_CACHE", str(tmp_path / "cache"))
    return OnCard(quantized_digits, plain_digits, engines_folder)
