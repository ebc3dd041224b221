"""An engine as a session: all but the card, on a stand-in whose engines ONNX Runtime computes."""

from __future__ import annotations

import functools
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from fp4trt.errors import BadCall, BadLora, BadOption, CannotRun
from fp4trt.progress import reporting
from tests.trt_build import stand_in_tensorrt
from tests.trt_build.conftest import WIDTH
from tests.trt_build.stand_in_card import HostCard, OnGpu
from tests.trt_build.stand_in_tensorrt import PROFILES, Opens, StandIn, write_engine
from trt_build.session import Session, open_session

trt = pytest.importorskip("tensorrt_rtx")


def _states(batch: int = 1, tokens: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _bits(session: Session, states: Any) -> np.ndarray:
    return np.asarray(session.run({"hidden_states": states})["latent"]).view(np.uint16)


def test_the_stand_in_has_no_member_that_tensorrt_rtx_has_not() -> None:
    for ours in stand_in_tensorrt.REPLACED:
        real = getattr(trt, ours.__name__)
        members = {name for name in vars(ours) if not name.startswith("_")} - stand_in_tensorrt.OURS
        assert members, ours
        assert {name for name in members if not hasattr(real, name)} == set()
    attributes = {
        "ICudaEngine": ("num_io_tensors", "num_optimization_profiles", "streamable_weights_size"),
        "IRuntimeConfig": ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"),
        "Runtime": ("engine_header_size",),
    }
    assert all(hasattr(getattr(trt, name), each) for name, names in attributes.items() for each in names)


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("generation", ["tensorrt_rtx", "tensorrt"])
def test_an_engine_gives_the_bits_of_its_graph_whatever_the_order_of_shapes(
    opens: Opens, small_graph: Path, generation: str, cuda_graph: bool
) -> None:
    session, module = opens(generation=generation, cuda_graph=cuda_graph)
    sizes = [(1, 16), (1, 16), (1, 16), (2, 32), (1, 40), (1, 40), (1, 40), (1, 16), (1, 16)]
    with open_session(small_graph) as reference, session:
        for seed, (batch, tokens) in enumerate(sizes):
            states = _states(batch, tokens, seed)
            assert np.array_equal(_bits(session, states), _bits(reference, states)), (seed, batch, tokens)
    assert module.profiles_used == [1, 0]
    captures = generation == "tensorrt" and cuda_graph
    # A graph is captured in the second call of the same shapes, dropped at others, and captured again.
    assert (module.card.captures, module.card.launches) == ((3, 5) if captures else (0, 0))
    if generation == "tensorrt_rtx":
        config = module.contexts[0].get_runtime_config()
        wanted = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if cuda_graph else trt.CudaGraphStrategy.DISABLED
        assert config is not None
        assert config.cuda_graph_strategy == wanted
        assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    assert (module.card.streams, module.card.graphs) == ({}, {})


def test_without_a_graph_tensors_on_the_card_are_read_and_written_where_they_lie(opens: Opens) -> None:
    card = HostCard(on_gpu=True)
    session, module = opens(card=card, cuda_graph=False)
    states = OnGpu(_states().float().numpy(), "BFLOAT16")
    shifted = OnGpu(_states().float().numpy(), "BFLOAT16", offset=2)

    found = session.run({"hidden_states": states})["latent"]
    again = session.run({"hidden_states": shifted})["latent"]

    assert module.enqueued[0] == {"hidden_states": states.pointer, "latent": found.pointer}
    assert found.__dlpack_device__() == (2, 0)
    assert states.streams == [next(iter(card.streams))]
    assert module.enqueued[1]["hidden_states"] not in (states.pointer, shifted.pointer)  # TensorRT wants it aligned
    assert card.copies == 1
    assert np.array_equal(np.asarray(found).view(np.uint16), np.asarray(again).view(np.uint16))
    for wrong, words in (
        (OnGpu(_states().float().numpy(), "BFLOAT16", number=1), r"lies on cuda:1, and the engine runs on cuda:0"),
        (_Strided(), r"does not lie in row-major order; make it contiguous"),
    ):
        with pytest.raises(BadCall, match=words):
            session.run({"hidden_states": wrong})
    session.close()


class _Strided(OnGpu):
    def __init__(self) -> None:
        super().__init__(np.zeros((1, 16, 2 * WIDTH), np.float32), "BFLOAT16")

    def __dlpack__(self, **_: object) -> object:
        from trt_build.runtime import dlpack

        capsule = super().__dlpack__()
        tensor = dlpack._Managed.from_address(dlpack._pointer(capsule, b"dltensor")).tensor
        tensor.shape[2] = WIDTH
        self.strides = (dlpack.ctypes.c_int64 * 3)(16 * 2 * WIDTH, 2 * WIDTH, 1)
        tensor.strides = dlpack.ctypes.cast(self.strides, dlpack.ctypes.POINTER(dlpack.ctypes.c_int64))
        return capsule


def test_a_graph_reads_and_writes_what_stays_in_place_and_results_stay_as_they_were(
    opens: Opens, small_graph: Path
) -> None:
    session, module = opens(card=HostCard(on_gpu=True), generation="tensorrt", cuda_graph=True)
    states = [OnGpu(_states(seed=seed).float().numpy(), "BFLOAT16") for seed in range(4)]
    found = [session.run({"hidden_states": each})["latent"] for each in states]
    session.close()

    assert len({tuple(addresses.values()) for addresses in module.enqueued}) == 1
    assert module.card.launches == 3
    with open_session(small_graph) as reference:
        for seed, result in enumerate(found):
            assert np.array_equal(np.asarray(result).view(np.uint16), _bits(reference, _states(seed=seed)))


def test_what_cannot_be_captured_runs_without_a_graph_and_says_so_once(opens: Opens, small_graph: Path) -> None:
    card, told = HostCard(), []
    card.can_capture = False
    session, _ = opens(card=card, generation="tensorrt")
    with open_session(small_graph) as reference, session, reporting(note=told.append):
        for _ in range(4):
            assert np.array_equal(_bits(session, _states()), _bits(reference, _states()))
    (line,) = told
    assert "x.engine runs without a CUDA graph: operation not permitted" in line


def test_threads_share_a_session(opens: Opens, small_graph: Path) -> None:
    session, _ = opens()
    sizes = [(1, 16), (2, 32), (1, 40), (2, 64)]
    with open_session(small_graph) as reference, session, ThreadPoolExecutor(4) as threads:
        calls = [_states(*size, seed) for seed, size in enumerate(sizes * 4)]
        found = list(threads.map(functools.partial(_bits, session), calls))
        assert all(np.array_equal(a, _bits(reference, call)) for a, call in zip(found, calls, strict=True))


def test_all_memory_goes_but_that_of_results_which_goes_with_them(opens: Opens) -> None:
    session, module = opens()
    with session:
        result = session.run({"hidden_states": _states(2, 64)})["latent"]
        session.run({"hidden_states": _states()})
        assert len(module.card.live) == 3
    values = np.asarray(result).copy()
    assert len(module.card.live) == 1
    tensor = torch.utils.dlpack.from_dlpack(result)
    del result
    gc.collect()
    assert np.array_equal(tensor.float().numpy(), values.astype(np.float32))
    del tensor
    gc.collect()
    assert module.card.live == {}
    session.close()
    with pytest.raises(BadCall, match="closed"):
        session.run({"hidden_states": _states()})


def test_a_card_without_memory_says_so_and_the_session_goes_on(opens: Opens) -> None:
    session, module = opens()
    with session:
        module.card.limit = 0
        with pytest.raises(CannotRun, match="out of memory"):
            session.run({"hidden_states": _states()})
        module.card.limit = 1 << 30
        assert session.run({"hidden_states": _states()})["latent"].shape == (1, 16, WIDTH)


def test_what_tensorrt_says_of_a_call_is_said_and_not_what_it_said_of_another(opens: Opens) -> None:
    session, module = opens()
    module.log("of another")
    module.refused.add("hidden_states")
    with session:
        with pytest.raises(
            CannotRun, match=r"take hidden_states as \[1, 16, 128\]: hidden_states is refused for a test$"
        ):
            session.run({"hidden_states": _states()})
        module.refused.clear()
        session.run({"hidden_states": _states()})
    with pytest.raises(BadCall, match="the session is closed"):
        session.layers()


def test_compiled_kernels_are_kept_for_the_next_start_of_the_same_engine(opens: Opens, tmp_path: Path) -> None:
    engine, cache = write_engine(tmp_path / "a.engine"), tmp_path / "kernels" / "a.cache"

    def compiled(path: Path = engine, tokens: int = 16, **options: Any) -> int:
        session, module = opens(path, **{"runtime_cache": cache, **options})
        with session:
            session.run({"hidden_states": _states(1, tokens)})
            assert session.cache_was_used is (module.compiled == 0 or tokens != 16)
        return module.compiled

    assert [compiled(), compiled(), compiled(tokens=24), compiled(tokens=24)] == [1, 0, 1, 0]
    told: list[str] = []
    with reporting(note=told.append):
        assert compiled(change=lambda module: setattr(module, "driver", "driver 2")) == 1
        assert compiled(write_engine(tmp_path / "b.engine", size=5000), change=_driver_2) == 1  # thrown away
        assert compiled(change=_driver_2) == 1
    assert [line.partition(" is of another driver")[0] for line in told] == [f"the runtime cache {cache}"]
    assert [path.name for path in cache.parent.iterdir()] == ["a.cache"]
    assert compiled(runtime_cache=None) == 1
    assert compiled(runtime_cache=None) == 0
    (kept,) = (tmp_path / "cache" / "runtime").iterdir()
    assert kept.name.endswith("-sm120.cache")


def _driver_2(module: StandIn) -> None:
    module.driver = "driver 2"


def test_a_file_that_is_no_cache_is_kept_and_without_a_place_nothing_is_written(opens: Opens, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    told: list[str] = []
    for cache in (mine, mine / "below", False):
        session, module = opens(runtime_cache=cache)
        with reporting(note=told.append), session:
            session.run({"hidden_states": _states()})
    assert (module.compiled, mine.read_text()) == (0, "mine")
    assert [line.split(" ", 3)[-1].partition(" (")[0] for line in told] == [
        "runtime cache of fp4trt's and is kept; name another file",
        "runtime cache of fp4trt's and is kept; name another file",
        f"{mine / 'below'} cannot be written",
        f"{mine / 'below'} cannot be written",
    ]
    assert not (tmp_path / "cache").exists()


def test_a_weight_streaming_budget_is_set_before_the_engine_starts(opens: Opens) -> None:
    for budget, expected in ((None, 1000), (300, 300), ("auto", 500), (5000, 1000)):
        session, module = opens(streamable=1000, weight_streaming_budget=budget)
        with session:
            assert module.contexts[0].trt is module
            assert session._engine.weight_streaming_budget_v2 == expected
    with pytest.raises(
        BadOption, match=r"was built to hold all weights on the GPU, .* build it with --weight-streaming"
    ):
        opens(weight_streaming_budget=300)
    with pytest.raises(BadOption, match="the weight streaming budget is -1; expected bytes, 0 at least, or 'auto'"):
        opens(streamable=1000, weight_streaming_budget=-1)
    with pytest.raises(BadOption, match="the weight streaming budget is '8 GB'; expected bytes"):
        opens(streamable=1000, weight_streaming_budget="8 GB")


def test_shapes_outside_every_profile_are_refused_by_name_and_nothing_is_left(opens: Opens) -> None:
    session, module = opens()
    with session:
        with pytest.raises(BadCall) as caught:
            session.run({"hidden_states": _states(4, 16)})
        assert str(caught.value) == (
            "profile 0 takes hidden_states [1, 16, 128], and it is [4, 16, 128]; profile 1 takes hidden_states "
            "[1, 8, 128] to [2, 64, 128], and it is [4, 16, 128]: build the engine for that size, with --resolution, "
            "--batch, --text or --profile"
        )
        with pytest.raises(BadCall, match="hidden_states is FLOAT; expected BFLOAT16"):
            session.run({"hidden_states": _states().float()})
    assert module.card.live == {}
    session, _ = opens(profiles=PROFILES[:1])
    with (
        session,
        pytest.raises(BadCall, match=r"^the engine takes hidden_states \[1, 16, 128\], and it is \[1, 24, 128\]"),
    ):
        session.run({"hidden_states": _states(1, 24)})


def test_slots_take_a_lora_when_the_session_is_opened_and_none_of_rank_0(opens: Opens, tmp_path: Path) -> None:
    graph = _slotted(tmp_path)
    rng = np.random.default_rng(0)
    factors = {"l.lora_a": (2, WIDTH), "l.lora_b": (WIDTH, 2)}
    save_file({name: rng.standard_normal(shape).astype(np.float32) for name, shape in factors.items()}, tmp_path / "f")
    profile = {"x": ((1, WIDTH), (1, WIDTH), (4, WIDTH))}
    profile |= {"l.lora_a": ((0, WIDTH), (2, WIDTH), (4, WIDTH)), "l.lora_b": ((WIDTH, 0), (WIDTH, 2), (WIDTH, 4))}
    given = {"x": rng.standard_normal((1, WIDTH)).astype(ml_dtypes.bfloat16)}
    found = []
    for lora in (None, tmp_path / "f"):
        session, _ = opens(of=graph, profiles=[profile], lora=lora)
        with open_session(graph, lora=lora) as reference, session:
            assert list(session.inputs) == list(reference.inputs) == ["x"]
            found.append(np.asarray(session.run(given)["y"]).view(np.uint16))
            assert np.array_equal(found[-1], np.asarray(reference.run(given)["y"]).view(np.uint16))
    assert np.array_equal(found[0], given["x"].view(np.uint16))
    assert not np.array_equal(found[0], found[1])
    with pytest.raises(BadLora, match=r"which has no slot for l\.lora_a"):
        opens(lora=tmp_path / "f")


def _slotted(folder: Path) -> Path:
    kind = TensorProto.BFLOAT16
    shapes = {"x": ["B", WIDTH], "l.lora_a": ["lora_rank", WIDTH], "l.lora_b": [WIDTH, "lora_rank"]}
    nodes = [
        helper.make_node("Transpose", ["l.lora_a"], ["a"], "l/a", perm=[1, 0]),
        helper.make_node("Transpose", ["l.lora_b"], ["b"], "l/b", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "a"], ["xa"], "l/xa"),
        helper.make_node("MatMul", ["xa", "b"], ["xab"], "l/xab"),
        helper.make_node("Add", ["x", "xab"], ["y"], "l/y"),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("y", kind, ["B", WIDTH])]
    made = helper.make_graph(nodes, "g", inputs, outputs)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), folder / "l.onnx")
    return folder / "l.onnx"


def test_a_loaded_engine_tells_its_kernels(opens: Opens) -> None:
    kernel = {"Name": "q", "LayerType": "gemm", "Metadata": "[ONNX Layer: q/MatMul]"}
    kernel |= {"Inputs": [{"Datatype": "FP4E2M1"}], "Constants": [{"Datatype": "FP4E2M1"}], "Outputs": []}
    session, module = opens()
    module.inspected = json.dumps({"Layers": [kernel], "I/O Tensors": []})
    with session:
        (layer,) = session.layers()
    assert (layer.gemm_format, layer.onnx_nodes) == ("nvfp4", ("q/MatMul",))
