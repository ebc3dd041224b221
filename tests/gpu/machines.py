"""Where the tests of this folder run: a GPU of this machine, or a stand-in that shows that the tests are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from fp4trt.number_formats import NVFP4
from fp4trt.targets import TARGETS
from tests.trt_build.stand_in_card import HostCard, OnGpu
from tests.trt_build.stand_in_tensorrt import StandIn, write_engine
from trt_build.graph import read_graph
from trt_build.profile_set import make_profiles
from trt_build.runtime import engine as engines
from trt_build.runtime.card import open_card
from trt_build.session import Session, open_session

__all__ = ["Machine", "OnCard", "OnStandIn"]


class Machine(Protocol):
    """A place to run engines.

    Attributes:
        graph: the deployable graph of its engines, in a format that it has GEMMs of.
        tolerance: how far an engine may be from the graph in ONNX Runtime, |a - b| / |b|.
    """

    graph: Path
    tolerance: float

    def engine(self, *profiles: str, weight_streaming: bool = False) -> Path:
        """Return an engine of the graph."""
        ...

    def engine_of_another_gpu(self) -> Path:
        """Return one that this machine does not run."""
        ...

    def open(self, engine: Path, **options: Any) -> Session:
        """Open an engine."""
        ...

    def put(self, tensor: torch.Tensor) -> Any:
        """Return a tensor in the memory of the GPU."""
        ...

    def pointer(self, array: Any) -> int:
        """Return where it lies."""
        ...

    def free(self) -> int:
        """Return how many bytes of the GPU's memory are free."""
        ...


class OnCard:
    """A real GPU: engines are built, once for each request, and run."""

    tolerance = 0.05  # BF16 sums in another order move some codes, through two blocks

    def __init__(self, quantized: Path, plain: Path, folder: Path) -> None:
        self._card = open_card()
        capability = self._card.compute_capability
        self._gpus = [target for target in TARGETS.values() if target.compute_capability == capability]
        if not self._gpus:
            pytest.skip(f"fp4trt builds no engine for {self._card.name} ({capability})")
        pytest.importorskip(self._gpus[0].backend)
        self.graph = (quantized if NVFP4.name in self._gpus[0].formats else plain) / "model.onnx"
        self._folder = folder

    def _built(self, gpu: str, profiles: tuple[str, ...], weight_streaming: bool) -> Path:
        from trt_build import build

        name = "-".join([gpu, *(each.replace(" ", "-") for each in profiles), str(weight_streaming)])
        engine = self._folder / f"{name}.engine"
        if not engine.exists():
            build(self.graph, gpu=gpu, output=engine, profiles=profiles, weight_streaming=weight_streaming)
        return engine

    def engine(self, *profiles: str, weight_streaming: bool = False) -> Path:
        return self._built(self._gpus[0].name, profiles, weight_streaming)

    def engine_of_another_gpu(self) -> Path:
        pytest.importorskip("tensorrt_rtx")
        fp4 = NVFP4.name in self._gpus[0].formats
        others = (
            target for target in TARGETS.values() if target.backend == "tensorrt_rtx" and target not in self._gpus
        )
        return self._built(next(each.name for each in others if not fp4 or NVFP4.name in each.formats), (), False)

    def open(self, engine: Path, **options: Any) -> Session:
        return open_session(engine, **options)

    def put(self, tensor: torch.Tensor) -> Any:
        return tensor.cuda()

    def pointer(self, array: Any) -> int:
        return int(array.data_ptr())

    def free(self) -> int:
        return self._card.memory()[0]


class OnStandIn:
    """No GPU: any engine computes by ONNX Runtime on the same graph."""

    tolerance = 0.0

    def __init__(self, quantized: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("tensorrt_rtx")
        self.graph = quantized / "model.onnx"
        self._folder = folder
        self._profiles: dict[Path, tuple[str, ...]] = {}
        self._patch = monkeypatch
        self._card = HostCard()
        self._streamable = 0
        self._on_gpu = False
        monkeypatch.setenv("FP4TRT_CACHE", str(folder / "cache"))

    def engine(self, *profiles: str, weight_streaming: bool = False) -> Path:
        self._streamable = 1000 if weight_streaming else 0
        path = write_engine(self._folder / f"{len(self._profiles)}.engine")
        self._profiles[path] = profiles
        return path

    def engine_of_another_gpu(self) -> Path:
        path = write_engine(self._folder / "other.engine", "SM89")
        self._profiles[path] = ()
        return path

    def open(self, engine: Path, **options: Any) -> Session:
        graph = read_graph(self.graph)
        made = make_profiles(
            graph.input_shapes, graph.symbols, {"shapes": ()}, self._profiles[engine], fp8_attention=False
        )
        card = self._card if not self._on_gpu else HostCard(on_gpu=True)
        module = StandIn(self.graph, [each.inputs for each in made], card, streamable=self._streamable)
        self._patch.setattr(engines, "open_card", lambda _: card)
        self._patch.setattr(engines, "backend_of", lambda _: module)
        return open_session(engine, **options)

    def put(self, tensor: torch.Tensor) -> Any:
        self._on_gpu = True
        return OnGpu(tensor.float().numpy(), "BFLOAT16" if tensor.dtype == torch.bfloat16 else "FLOAT")

    def pointer(self, array: Any) -> int:
        return int(array.pointer)

    def free(self) -> int:
        return self._card.memory()[0]
