"""Real TensorRT-RTX builds of small graphs; each takes about a second."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

import trt_build
from fp4trt.errors import (
    BackendMissingError,
    BadModelError,
    BuilderFailedError,
    EngineWriteError,
    LintError,
    OutputExistsError,
    UnsupportedFormatError,
)

pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).resolve().parents[2]


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("gpu", "capabilities"),
    [("rtx5090", ["SM120"]), ("gb10", ["SM121"]), ("rtx5090,gb10", ["SM120", "SM121"])],
)
def test_the_same_graph_builds_for_sm120_for_sm121_and_for_both(
    attention_graph: Any, gpu: str, capabilities: list[str]
) -> None:
    model = attention_graph()
    result = trt_build.build(model, gpu=gpu, resolution="512:1024:1360", batch="1:1:4")
    engine = Path(result["engine"])
    assert engine == model.parent / (gpu.replace(",", "_") + ".engine")
    assert engine.stat().st_size == result["engine_bytes"] > 100_000
    assert result["compute_capabilities"] == capabilities
    assert result["profile"] == {"B": [1, 1, 4], "L": [1024, 4096, 7225]}
    assert (result["fp4_gemms"], result["fp4_linears"], result["quantized_linears"]) == (2, 4, 4)
    assert not result["cached"]


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_both_scale_dtypes_build_with_full_coverage(attention_graph: Any, scale_dtype: str) -> None:
    result = trt_build.build(attention_graph(scale_dtype=scale_dtype))
    assert (result["fp4_gemms"], result["fp4_linears"]) == (2, 4)


def test_merged_qkv_is_one_fp4_gemm_that_covers_three_linears(attention_graph: Any) -> None:
    result = trt_build.build(attention_graph(merged=True))
    fp4 = [gemm["linears"] for gemm in result["gemms"] if gemm["format"] == "nvfp4"]
    assert fp4 == [["block.to_q", "block.to_k", "block.to_v"], ["block.to_out"]]


def test_qkv_with_different_global_scales_are_three_fp4_gemms(attention_graph: Any) -> None:
    result = trt_build.build(attention_graph(merged=False))
    fp4 = sorted(gemm["linears"] for gemm in result["gemms"] if gemm["format"] == "nvfp4")
    assert fp4 == [["block.to_k"], ["block.to_out"], ["block.to_q"], ["block.to_v"]]
    assert result["fp4_linears"] == 4


def test_the_linear_that_the_graph_keeps_in_16_bit_is_listed_with_its_kernel(attention_graph: Any) -> None:
    result = trt_build.build(attention_graph())
    (kept,) = result["sixteen_bit"]
    assert kept["linear"] == "head"
    assert kept["kernel"].startswith("head/MatMul")
    assert kept["reason"] == "not quantized in the graph"
    assert [gemm["format"] for gemm in result["gemms"] if gemm["linears"] == ["head"]] == ["bfloat16"]


def test_lost_fp4_is_an_error_that_names_the_linear_and_leaves_nothing(attention_graph: Any) -> None:
    model = attention_graph(unquantized_input=True)
    before = names_in(model.parent)
    with pytest.raises(LintError, match=r"activation-missing: block\.to_out/MatMul .*Tanh.*--allow-slow") as caught:
        trt_build.build(model)
    assert caught.value.exit_code == 1
    assert names_in(model.parent) == before


def test_allow_slow_publishes_what_lost_fp4_and_the_cache_does_not_hide_it(attention_graph: Any) -> None:
    model = attention_graph(unquantized_input=True)
    result = trt_build.build(model, allow_slow=True)
    assert (result["fp4_gemms"], result["fp4_linears"], result["quantized_linears"]) == (1, 3, 4)
    assert [item["linear"] for item in result["lost"]] == ["block.to_out"]
    with pytest.raises(LintError, match=r"block\.to_out"):
        trt_build.build(model)
    assert trt_build.build(model, allow_slow=True)["cached"]


def test_the_promise_of_a_graph_without_metadata_is_read_from_its_weights(attention_graph: Any) -> None:
    model = attention_graph(metadata=False)
    result = trt_build.build(model, shapes=["B=1:1:2", "L=64"])
    assert (result["fp4_linears"], result["quantized_linears"]) == (4, 4)
    assert [item["linear"] for item in result["sixteen_bit"]] == ["head"]
    lost = attention_graph("lost", metadata=False, unquantized_input=True)
    with pytest.raises(LintError, match=r"block\.to_out"):
        trt_build.build(lost, shapes=["B=1:1:2", "L=64"])


def test_weight_streaming_keeps_fp4(attention_graph: Any) -> None:
    assert trt_build.build(attention_graph(), weight_streaming=True)["fp4_linears"] == 4


def test_the_manifest_tells_inputs_and_outputs_but_neither_time_nor_absolute_path(attention_graph: Any) -> None:
    first = trt_build.build(attention_graph("here"))
    second = trt_build.build(attention_graph("there"))
    contents = [json.loads(Path(result["manifest"]).read_text()) for result in (first, second)]
    assert contents[0]["request"] == contents[1]["request"]
    assert contents[0].keys() == contents[1].keys()
    assert str(Path(first["engine"]).parent) not in Path(first["manifest"]).read_text()
    told = {"dtype": "BFLOAT16", "shape": ["B", "L", 128]}
    assert contents[0]["inputs"] == [{"name": "hidden_states", **told}]
    assert contents[0]["outputs"] == [{"name": "latent", **told}]


def test_fp4_for_a_gpu_without_it_is_refused_before_anything_is_built(attention_graph: Any) -> None:
    model = attention_graph()
    with pytest.raises(UnsupportedFormatError, match=r"rtx4090 \(SM89\)"):
        trt_build.build(model, gpu="rtx4090")
    with pytest.raises(UnsupportedFormatError, match=r"h200 \(SM90\)"):
        trt_build.build(model, gpu="h200")


def test_progress_reaches_its_end_without_going_back(attention_graph: Any) -> None:
    seen: list[float] = []
    trt_build.build(attention_graph(), on_progress=lambda fraction, phase: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(set(seen)) > 4


def test_a_graph_that_the_parser_refuses_is_one_line_and_leaves_nothing(attention_graph: Any) -> None:
    path = attention_graph()
    model = onnx.load(path, load_external_data=False)
    tanh = next(node for node in model.graph.node if node.op_type == "Tanh")
    tanh.op_type = "Softmax"
    tanh.attribute.append(onnx.helper.make_attribute("axis", 7))
    onnx.save(model, path)
    before = names_in(path.parent)
    with pytest.raises(BuilderFailedError, match="cannot parse") as caught:
        trt_build.build(path)
    assert "\n" not in str(caught.value)
    assert names_in(path.parent) == before


def test_an_operator_that_tensorrt_lacks_is_named(attention_graph: Any) -> None:
    path = attention_graph()
    model = onnx.load(path, load_external_data=False)
    tanh = next(node for node in model.graph.node if node.op_type == "Tanh")
    tanh.op_type = "SequenceConstruct"
    onnx.save(model, path)
    with pytest.raises(BuilderFailedError, match=r"node 'block/Tanh' \(SequenceConstruct\): UNSUPPORTED_NODE"):
        trt_build.build(path)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, attention_graph: Any) -> None:
    with pytest.raises(BadModelError, match=r"holds no model\.onnx"):
        trt_build.build(tmp_path)
    with pytest.raises(BadModelError, match="does not exist"):
        trt_build.build(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(BadModelError, match="is not an ONNX model"):
        trt_build.build(tmp_path / "text.onnx")
    model = attention_graph()
    weights = model.parent / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(
        BadModelError, match=r"initializer head\.bias needs bytes .* which ends at byte .* export it again"
    ):
        trt_build.build(model)
    weights.unlink()
    with pytest.raises(BadModelError, match=r"weights\.bin, which does not exist"):
        trt_build.build(model)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("fp4trt.linears", '{"nvfp4":5}'),
        ("fp4trt.linears", "[]"),
        ("fp4trt.symbols", "[]"),
        ("fp4trt.symbols", '{"B":{"kind":"batches"}}'),
        ("fp4trt.symbols", '{"B":{"kind":["batch"]}}'),
        ("fp4trt.symbols", '{"B":{"kind":"batch","min":"1"}}'),
        ("fp4trt.symbols", '{"B":{"kind":"batch","min":4,"default":1,"max":2}}'),
    ],
)
def test_metadata_that_cannot_be_read_are_refused_in_one_line(attention_graph: Any, key: str, text: str) -> None:
    path = attention_graph()
    model = onnx.load(path, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == key).value = text
    onnx.save(model, path)
    with pytest.raises((BadModelError, LintError), match=r"export (it |the graph )?again") as caught:
        trt_build.build(path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_cannot_be_read_is_refused_in_one_line(attention_graph: Any) -> None:
    path = attention_graph()
    (path.parent / "fp4trt.json").write_text('{"files": []}')
    with pytest.raises(BadModelError, match=r"fp4trt\.json is not a manifest of fp4trt"):
        trt_build.build(path)


def test_weights_outside_the_models_folder_are_refused(attention_graph: Any) -> None:
    path = attention_graph()
    (path.parent / "inner").mkdir()
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../weights.bin"
    onnx.save(model, path.parent / "inner" / "model.onnx")
    with pytest.raises(BadModelError, match=r"lies at '\.\./weights\.bin'; expected a path inside"):
        trt_build.build(path.parent / "inner")


def test_a_range_may_be_a_plain_number(attention_graph: Any) -> None:
    result = trt_build.build(attention_graph(), resolution=1024, batch=1)
    assert result["profile"] == {"B": [1, 1, 1], "L": [4096, 4096, 4096]}


def test_a_manifest_that_cannot_be_written_names_its_file(attention_graph: Any, monkeypatch: Any) -> None:
    model = attention_graph()
    before = names_in(model.parent)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        trt_build.build(model)
    assert caught.value.filename == str(model.parent / "rtx5090.json")
    assert names_in(model.parent) == before


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_compiled(
    attention_graph: Any, monkeypatch: Any
) -> None:
    model = attention_graph()
    before = names_in(model.parent)
    monkeypatch.setattr("trt_build.builder.run_child", lambda *_: pytest.fail("it was compiled"))

    def refuse(**asked: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(asked["dir"]))

    with monkeypatch.context() as patched:
        patched.setattr("tempfile.mkstemp", refuse)
        with pytest.raises(OSError, match="Read-only") as caught:
            trt_build.build(model)
    assert caught.value.filename == str(model.parent / "rtx5090.engine.partial")
    usage = shutil.disk_usage(model.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500))
    with pytest.raises(
        EngineWriteError, match=r"has 500 bytes free, and the engine holds .* KiB of weights: make room"
    ):
        trt_build.build(model)
    assert names_in(model.parent) == before


def test_an_output_that_is_not_ours_is_not_replaced(attention_graph: Any) -> None:
    model = attention_graph()
    engine = model.parent / "mine.engine"
    engine.write_text("precious")
    with pytest.raises(OutputExistsError, match="--force"):
        trt_build.build(model, output=engine)
    assert engine.read_text() == "precious"
    assert trt_build.build(model, output=engine, force=True)["fp4_linears"] == 4


def test_the_model_and_a_foreign_json_are_not_replaced_even_with_force(attention_graph: Any) -> None:
    model = attention_graph()
    (model.parent / "config.json").write_text("{}")
    for name in ("model.onnx", "weights.bin", "config.engine", "config.json"):
        with pytest.raises(OutputExistsError):
            trt_build.build(model, output=model.parent / name, force=True)


def test_a_model_without_external_data_builds(tmp_path: Path, attention_graph: Any) -> None:
    whole = onnx.load(attention_graph())
    onnx.save(whole, tmp_path / "whole.onnx")
    assert trt_build.build(tmp_path / "whole.onnx", output=tmp_path / "new" / "e.engine")["fp4_linears"] == 4


def test_a_missing_backend_says_what_to_install(attention_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendMissingError, match=r"pip install 'fp4trt\[rtx\]'"):
        trt_build.build(attention_graph())


def test_a_build_imports_no_torch(attention_graph: Any) -> None:
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'diffusers', 'modelopt'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "import trt_build\n"
        "assert trt_build.build(sys.argv[1])['fp4_linears'] == 4\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(attention_graph())], cwd=ROOT, check=True)


def test_importing_the_room_and_its_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, trt_build, trt_build.cli\n"
        "heavy = {'onnx', 'numpy', 'torch', 'polygraphy', 'tensorrt_rtx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
