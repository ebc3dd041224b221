"""Tracing, which torch does for one thread at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exporter import plain_checkpoint
from exporter.trace import trace


@pytest.mark.slow
def test_two_threads_export_at_once(tiny_flux: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = plain_checkpoint.read(tiny_flux(tmp_path / "flux"))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: trace(checkpoint), range(2))
    assert len(first.graph.nodes) == len(second.graph.nodes) > 100
