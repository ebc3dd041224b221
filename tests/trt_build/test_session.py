"""A graph as a session: arrays of any library by name, in the graph's own types, and calls that do not fit."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.dlpack import from_dlpack

from fp4trt.errors import BadCall, BadGraph, BadLora, CannotRun, UnknownArtifact
from onnx_functions.simulation import session
from tests.trt_build.conftest import WIDTH, write_attention_graph
from trt_build.runtime import dlpack
from trt_build.runtime.arrays import on_host
from trt_build.session import Session, open_session


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_attention_graph(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def opened(graph: Path) -> Iterator[Session]:
    with open_session(graph) as found:
        yield found


def _states(batch: int = 1, tokens: int = 16) -> torch.Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_graph_computes_what_its_simulation_does_in_the_graph_s_own_types(graph: Path, opened: Session) -> None:
    states = _states(2)

    found = opened.run({"hidden_states": states})["latent"]

    (wanted,) = session(graph).run(None, {"hidden_states": states.float().numpy()})
    assert (opened.inputs["hidden_states"].dtype, found.dtype) == ("BFLOAT16", "BFLOAT16")
    assert opened.inputs["hidden_states"].dims == ("B", "L", WIDTH)
    assert np.array_equal(np.asarray(found).astype(np.float32), wanted)
    assert float(np.abs(wanted).max()) > 0


@pytest.mark.parametrize("of", ["torch", "a transposed view of torch", "ml_dtypes", "a result of another session"])
def test_arrays_of_any_library_give_the_same_bits(opened: Session, of: str) -> None:
    states = _states()
    wanted = np.asarray(opened.run({"hidden_states": states})["latent"])
    given: Any = {
        "torch": states,
        "a transposed view of torch": states.transpose(1, 2).contiguous().transpose(1, 2),
        "ml_dtypes": states.float().numpy().astype(ml_dtypes.bfloat16),
        "a result of another session": on_host(states.float().numpy(), "BFLOAT16"),
    }[of]

    found = np.asarray(opened.run({"hidden_states": given})["latent"])

    assert np.array_equal(found.view(np.uint16), wanted.view(np.uint16))


def test_torch_takes_a_result_where_it_lies_and_keeps_it_after_the_session(graph: Path) -> None:
    gc.collect()
    before = len(dlpack._given)
    with open_session(graph) as opened:
        found = opened.run({"hidden_states": _states()})["latent"]
        address, values = found.pointer, np.asarray(found).astype(np.float32)
        tensor = from_dlpack(found)
        unused = found.__dlpack__()
        for asked in ({"copy": True}, {"dl_device": (2, 0)}):
            with pytest.raises(BufferError, match="given as it lies; copy or move it afterwards"):
                found.__dlpack__(**asked)
    del found, unused
    gc.collect()

    assert (tensor.data_ptr(), tensor.dtype) == (address, torch.bfloat16)
    assert np.array_equal(tensor.float().numpy(), values)
    assert len(dlpack._given) == before + 1
    del tensor
    gc.collect()
    assert len(dlpack._given) == before
    with pytest.raises(BadCall, match="the session is closed"):
        opened.run({"hidden_states": _states()})


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, r"the input hidden_states is missing; expected hidden_states"),
    "unknown": ({"hidden_states": _states(), "x": _states()}, r"x is no input; expected hidden_states: leave it out"),
    "type": ({"hidden_states": _states().float()}, r"hidden_states is FLOAT; expected BFLOAT16: convert it"),
    "rank": ({"hidden_states": _states()[0]}, r"hidden_states is \[16, 128\]; expected \[B, L, 128\]"),
    "size": ({"hidden_states": _states()[..., :64]}, r"hidden_states is \[1, 16, 64\]; expected \[B, L, 128\]"),
    "no array": ({"hidden_states": [1.0]}, r"hidden_states is a list; expected an array: numpy's, or with __dlpack__"),
    "gradient": (
        {"hidden_states": _states().requires_grad_()},
        r"hidden_states, a Tensor, cannot be read: .* require gradient",
    ),
    "odd type": (
        {"hidden_states": _states().to(torch.complex64)},
        r"is of DLPack's type 5 in 64 bits; expected one of",
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_does_not_fit_is_refused_in_one_line(opened: Session, what: str) -> None:
    given, words = CALLS[what]
    with pytest.raises(BadCall, match=words) as caught:
        opened.run(given)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadCall, match="inputs is a list; expected input name to array: hidden_states"):
        opened.run([given])  # type: ignore[arg-type]


def test_one_symbol_has_one_size_in_a_call(quantized_digits: Path) -> None:
    with open_session(quantized_digits / "model.onnx") as opened:
        given = {
            name: torch.zeros([dim if isinstance(dim, int) else 4 for dim in port.dims]).to(
                torch.bfloat16 if port.dtype == "BFLOAT16" else torch.float32
            )
            for name, port in opened.inputs.items()
        }
        given["timestep"] = torch.zeros(2).bfloat16()
        with pytest.raises(BadCall, match=r"timestep is \[2\], B 2, and hidden_states has B 4; expected one size of B"):
            opened.run(given)


@pytest.mark.parametrize(
    ("kind", "shape", "words"), [("INT4", [4], "x is INT4; a session serves float"), ("FLOAT", [3], "")]
)
def test_what_onnx_runtime_does_not_run_is_one_line(kind: str, shape: list[int], words: str, tmp_path: Path) -> None:
    dtype = TensorProto.DataType.Value(kind)
    inputs = [helper.make_tensor_value_info(name, dtype, [name]) for name in ("x", "y")]
    outputs = [helper.make_tensor_value_info("z", dtype, None)]
    made = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"], "sum/Add")], "g", inputs, outputs)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "m.onnx")
    if words:
        with pytest.raises(BadGraph, match=words):
            open_session(tmp_path / "m.onnx")
        return
    with open_session(tmp_path / "m.onnx") as opened:
        assert np.asarray(opened.run({"x": np.ones(2, np.float32), "y": np.ones(1, np.float32)})["z"]).tolist() == [
            2,
            2,
        ]
        with pytest.raises(CannotRun, match=r"ONNX Runtime does not run .*m\.onnx: ") as caught:
            opened.run({"x": np.ones(2, np.float32), "y": np.ones(shape, np.float32)})
        with pytest.raises(CannotRun, match=r"does not run .*m\.onnx with nothing in y: "):
            opened.run({"x": np.ones(2, np.float32), "y": np.ones(0, np.float32)})
    assert "\n" not in str(caught.value)


def test_what_is_no_graph_and_a_lora_for_a_graph_without_slots_are_refused(
    graph: Path, tmp_path: Path, slotted_factors: Path
) -> None:
    with pytest.raises(UnknownArtifact, match=r"model\.pt is neither a graph \(\.onnx\) nor an engine"):
        open_session(tmp_path / "model.pt")
    with pytest.raises(BadLora, match=r"not made for this graph, which has no slot for block\.to_q\.lora_a"):
        open_session(graph, lora=slotted_factors)


@pytest.fixture
def slotted_factors(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"block.to_q.lora_a": torch.zeros(4, WIDTH)}, tmp_path / "factors.safetensors")
    return tmp_path / "factors.safetensors"
