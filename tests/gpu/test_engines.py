"""Engines on a GPU: their numerics, memory, CUDA graphs, runtime cache, refusals, images, and the benchmark."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fp4trt
from calibration.digits.sampling import sample
from fp4trt.errors import BadCall, BadEngine
from fp4trt.families.digits import DIGITS
from fp4trt.json_file import load_json
from generation.transformer import GraphTransformer, open_transformer
from tests.gpu.machines import Machine
from trt_build.layer_info import find_gemms
from trt_build.manifest import read_manifest
from trt_build.runtime.arrays import DeviceArray
from trt_build.session import open_session

LEAK = 64 << 20
"""Bytes that a driver may keep of what was given back to it."""

Call = dict[str, Any]


def _call(machine: Machine, batch: int = 1, tokens: int = 16, text: int = 8, seed: int = 0) -> Call:
    """Return the inputs of one call, as torch has them, on the CPU."""
    config = load_json(machine.graph.parent / "config.json")
    return dict(DIGITS.example_inputs(config, (batch, tokens, text), seed, torch.bfloat16))


def _values(found: dict[str, DeviceArray]) -> np.ndarray:
    (velocity,) = found.values()
    return np.asarray(velocity).astype(np.float32)


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_an_engine_computes_what_its_graph_does_in_onnx_runtime(machine: Machine, cuda_graph: bool) -> None:
    with machine.open(machine.engine(), cuda_graph=cuda_graph) as engine, open_session(machine.graph) as graph:
        for size in ((1, 16, 8), (4, 64, 32), (1, 16, 8), (1, 4, 1)):
            call = _call(machine, *size)
            assert _error(_values(engine.run(call)), _values(graph.run(call))) <= machine.tolerance, size


def test_the_same_call_gives_the_same_bits_with_and_without_a_cuda_graph(machine: Machine) -> None:
    engine = machine.engine()
    found = []
    for cuda_graph in (True, False):
        with machine.open(engine, cuda_graph=cuda_graph) as session:
            first = _values(session.run(_call(machine)))
            for _ in range(3):
                assert np.array_equal(_values(session.run(_call(machine))), first)
            session.run(_call(machine, 2, 64, seed=1))
            assert np.array_equal(_values(session.run(_call(machine))), first)
        found.append(first)
    assert np.array_equal(*found)


def test_tensors_on_the_gpu_are_read_and_written_where_they_lie(machine: Machine) -> None:
    on_gpu = {name: machine.put(value) for name, value in _call(machine).items()}
    before = {name: machine.pointer(value) for name, value in on_gpu.items()}
    with machine.open(machine.engine(), cuda_graph=False) as session:
        given = _noting_addresses(session)
        (found,) = session.run(on_gpu).values()
        assert given == before | {"latent": found.pointer}
        assert found.__dlpack_device__() == (2, 0)
    if torch.cuda.is_available():
        tensor = torch.utils.dlpack.from_dlpack(found)
        assert (tensor.data_ptr(), tensor.dtype, tensor.device.type) == (found.pointer, torch.bfloat16, "cuda")
        assert np.array_equal(tensor.float().cpu().numpy(), np.asarray(found).astype(np.float32))


def _noting_addresses(session: Any) -> dict[str, int]:
    """Return what will hold the addresses that the engine is told."""
    given: dict[str, int] = {}
    enqueue: Callable[..., None] = session._enqueue

    def noted(addresses: dict[str, int]) -> None:
        given.update(addresses)
        enqueue(addresses)

    session._enqueue = noted
    return given


def test_results_outlive_the_session_and_all_other_memory_is_given_back(machine: Machine) -> None:
    engine = machine.engine()
    with machine.open(engine) as session:  # what a driver makes once for all
        session.run(_call(machine))
    del session
    gc.collect()
    free = machine.free()
    for seed in range(3):
        with machine.open(engine) as session:
            results = session.run(_call(machine, 4, 64, seed=seed))
            wanted = _values(results)
        del session
        gc.collect()
        assert np.array_equal(_values(results), wanted)
        del results
        gc.collect()
    assert free - machine.free() <= LEAK


def test_the_second_start_takes_the_kernels_that_the_first_compiled(machine: Machine, tmp_path: Path) -> None:
    engine, cache = machine.engine(), tmp_path / "kernels.cache"
    found = []
    for expected in (False, True):
        with machine.open(engine, runtime_cache=cache) as session:
            if not hasattr(session._trt, "CudaGraphStrategy"):
                pytest.skip("TensorRT compiles all kernels in the build")
            assert session.cache_was_used is expected
            found.append(_values(session.run(_call(machine))))
        assert cache.stat().st_size > 0
    assert np.array_equal(*found)


def test_weights_that_are_streamed_give_the_same_bits(machine: Machine) -> None:
    engine = machine.engine(weight_streaming=True)
    found = []
    for budget in (None, "auto", 1 << 10):
        with machine.open(engine, weight_streaming_budget=budget) as session:
            found.append(_values(session.run(_call(machine))))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_each_call_takes_the_profile_that_serves_it_and_others_are_refused(machine: Machine) -> None:
    engine = machine.engine("resolution=16 batch=1 text=8", "resolution=32 batch=4 text=8")
    with machine.open(engine) as session, open_session(machine.graph) as graph:
        for batch, tokens in ((1, 16), (4, 64), (1, 16)):
            call = _call(machine, batch, tokens)
            assert _error(_values(session.run(call)), _values(graph.run(call))) <= machine.tolerance
        with pytest.raises(BadCall, match=r"profile 0 takes hidden_states \[1, 16, 16\], .* profile 1 takes"):
            session.run(_call(machine, 2, 16))


def test_an_engine_of_another_gpu_is_refused_by_its_json_and_by_its_header(machine: Machine, tmp_path: Path) -> None:
    engine = machine.engine_of_another_gpu()
    with pytest.raises(BadEngine, match="build it with --gpu for that"):
        machine.open(engine)
    alone = tmp_path / "alone.engine"
    alone.write_bytes(engine.read_bytes())
    if hasattr(machine, "_profiles"):
        machine._profiles[alone] = ()
    with pytest.raises(BadEngine, match=r"was not built for .*: build it with --gpu for that"):
        machine.open(alone)


def test_an_engine_draws_the_images_of_its_graph(machine: Machine) -> None:
    engine = machine.engine()
    machine.open(engine).close()  # on a stand-in, from here on whatever opens it gets that
    transformer = open_transformer(engine)
    drawn = sample(transformer, [0, 3, 7], 1000, steps=3)
    wanted = sample(GraphTransformer(machine.graph), [0, 3, 7], 1000, steps=3)
    transformer.close()
    assert _error(drawn.numpy(), wanted.numpy()) <= machine.tolerance


@pytest.mark.gpu
def test_the_loaded_engine_has_the_fp4_gemms_that_the_build_promised(gpu: Machine) -> None:
    engine = gpu.engine()
    manifest = read_manifest(engine)
    assert manifest is not None
    with gpu.open(engine) as session:
        layers = session.layers()
    products = {f"{linear}/MatMul" for gemm in manifest["gemms"] for linear in gemm["linears"]}
    found = [gemm for gemm in find_gemms(layers, products) if gemm.format == "nvfp4"]
    assert len(found) == manifest["fp4_gemms"]


@pytest.mark.gpu
def test_the_benchmark_times_the_engine_and_torch_on_the_same_gpu(
    gpu: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = gpu.engine()
    (engine.parent / "config.json").write_bytes((gpu.graph.parent / "config.json").read_bytes())
    options = ["--steps", "2", "--repeats", "2", "--peers", "bf16", "--json"]
    assert fp4trt.run(["bench", str(engine), *options]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [each["name"] for each in result["subjects"]] == ["session", "bf16"]
    assert result["place"]["device"] == "cuda:0"
    assert all(each["memory_peak_bytes"] > 0 for each in result["subjects"])
