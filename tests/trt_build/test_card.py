"""NVIDIA's driver as a session calls it: in pairs, on its own context, and its errors in words."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import pytest

from fp4trt.errors import CannotRun
from trt_build.runtime import card as cards
from trt_build.runtime.card import NvidiaCard, open_card
from trt_build.runtime.dlpack import CUDA

OUT_OF_MEMORY = 2


class Driver:
    """A driver that notes what it is called, and answers as the real one does where a call gives something."""

    def __init__(self, gpus: int = 2) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.gpus, self.depth, self.fails = gpus, 0, {}
        self.given = {"cuDevicePrimaryCtxRetain": 11, "cuMemAlloc_v2": 4096, "cuStreamCreate": 22}
        self.given |= {"cuStreamEndCapture": 33, "cuGraphInstantiateWithFlags": 44, "cuDeviceGet": 1}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append((name, tuple(getattr(argument, "value", argument) for argument in arguments)))
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"out of memory"
            elif name in self.fails:
                return self.fails[name]
            elif name == "cuDeviceGetCount":
                arguments[0]._obj.value = self.gpus
            elif name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 12, 76: 0}[arguments[1]]
            elif name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA GeForce RTX 5090"
            elif name == "cuMemGetInfo_v2":
                arguments[0]._obj.value, arguments[1]._obj.value = 5, 7
            elif name in self.given:
                arguments[0 if name != "cuStreamEndCapture" else 1]._obj.value = self.given[name]
            self.depth += (name == "cuCtxPushCurrent_v2") - (name == "cuCtxPopCurrent_v2")
            if name.startswith(("cuMem", "cuStream", "cuGraph")):
                assert self.depth > 0, f"{name} outside of the card's context"
            return 0

        return call


def test_a_card_is_named_and_all_that_is_made_is_unmade_in_its_own_context() -> None:
    driver = Driver()
    card = NvidiaCard(driver, 1)
    assert (card.device, card.name, card.compute_capability) == ((CUDA, 1), "NVIDIA GeForce RTX 5090", "SM120")
    assert card.memory() == (5, 7)
    stream, pointer = card.stream(), card.allocate(1 << 40)
    card.copy_in(pointer, 100, 8, stream)
    card.copy(pointer, 200, 8, stream)
    card.copy_out(300, pointer, 8, stream)
    card.copy(pointer, 200, 0, stream)  # nothing to copy
    graph = card.capture(stream, lambda: True)
    card.launch(graph, stream)
    card.wait(stream)
    card.end_graph(graph)
    card.free(pointer)
    card.end_stream(stream)

    assert driver.depth == 0
    counted = Counter(name for name, _ in driver.calls)
    assert counted["cuMemAlloc_v2"] == counted["cuMemFree_v2"] == counted["cuStreamCreate"] == 1
    assert counted["cuStreamDestroy_v2"] == counted["cuGraphExecDestroy"] == counted["cuGraphDestroy"] == 1
    given = dict(driver.calls)
    assert given["cuMemcpyHtoDAsync_v2"] == (4096, 100, 8, 22)
    assert given["cuMemcpyDtoDAsync_v2"] == (4096, 200, 8, 22)
    assert given["cuMemcpyDtoHAsync_v2"] == (300, 4096, 8, 22)
    assert given["cuMemAlloc_v2"][1] == 1 << 40
    assert given["cuGraphLaunch"] == (44, 22)
    assert given["cuStreamBeginCapture_v2"] == (22, 1)
    order = [name for name, _ in driver.calls]
    assert order.index("cuCtxSynchronize") < order.index("cuMemFree_v2")


def test_a_driver_s_error_is_one_line_and_a_failed_capture_ends() -> None:
    driver = Driver()
    card = NvidiaCard(driver)
    driver.fails = {"cuMemAlloc_v2": OUT_OF_MEMORY}
    with pytest.raises(CannotRun, match=r"says of cuMemAlloc_v2: out of memory \(2\); free memory, or give a weight"):
        card.allocate(8)
    with pytest.raises(CannotRun, match="TensorRT enqueued nothing"):
        card.capture(22, lambda: False)
    ended = [name for name, _ in driver.calls if name in ("cuStreamEndCapture", "cuGraphDestroy")]
    assert ended == ["cuStreamEndCapture", "cuGraphDestroy"]
    assert driver.depth == 0


def test_a_card_that_is_not_there_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotRun, match=r"there is no GPU 2; expected one of 2, from 0"):
        NvidiaCard(Driver(), 2)
    driver = Driver()
    driver.fails = {"cuInit": 100}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    with pytest.raises(CannotRun, match="no NVIDIA GPU is here: NVIDIA's driver says of cuInit"):
        open_card()
    monkeypatch.setattr(cards, "NvidiaCard", _too_old)
    with pytest.raises(CannotRun, match="NVIDIA's driver here is too old: no cuGraphInstantiateWithFlags; install"):
        open_card()


def _too_old(*_: object) -> None:
    raise AttributeError("no cuGraphInstantiateWithFlags")
