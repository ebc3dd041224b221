"""`inspect` says what an artifact is, from headers alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import fp4trt
from fp4trt.errors import BadCheckpoint, BadGraph, UnknownArtifact
from onnx_functions.inspection.inspect import describe
from onnx_functions.inspection.table import table
from tests.onnx_functions.small_graphs import array, integers, save, value


def test_a_quantized_checkpoint_is_described(quantized_digits: Path) -> None:
    found = describe(quantized_digits)
    assert found["kind"] == "quantized checkpoint"
    assert found["fp4_linears"] == 20
    assert found["formats"]["nvfp4"] == {"linears": 20, "parameters": 835584, "bytes": 835584 * 9 // 16 + 20 * 4}
    assert 0.8 < found["fp4_coverage"] < 1
    assert ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"] in (
        found["groups"]
    )


def test_a_16_bit_checkpoint_is_described() -> None:
    found = describe("digits")
    assert found["kind"] == "checkpoint"
    assert found["formats"].keys() == {"bf16"}
    assert found["fp4_coverage"] == 0


def test_a_graph_is_described(quantized_digits: Path) -> None:
    found = describe(quantized_digits / "model.onnx")
    assert found["kind"] == "onnx"
    assert found["fp4_linears"] == 20
    assert found["activation_quantizers"] == 13
    assert found["inputs"][0] == {"name": "hidden_states", "type": "BFLOAT16", "shape": ["B", "L", 16]}
    assert found["external_files"] == ["diffusion_pytorch_model.safetensors"]
    assert found["formats"] == describe(quantized_digits)["formats"] | {"nvfp4": found["formats"]["nvfp4"]}
    assert any("FP4 covers" in line for line in table(found))


@pytest.mark.parametrize(
    ("op", "attributes", "dims"),
    [
        ("Squeeze", {}, (1, 64, 32)),
        ("Reshape", {}, (2, 32, 32)),
        ("Transpose", {"perm": [1, 0]}, (32, 64)),
        ("TRT_FP4QDQ", {"domain": "trt"}, (64, 32)),
    ],
)
def test_a_linear_has_the_shape_that_its_product_reads(
    op: str, attributes: dict[str, Any], dims: tuple[int, ...], tmp_path: Path
) -> None:
    numbers = {"Squeeze": [integers("to", 0)], "Reshape": [integers("to", 64, 32)]}.get(op, [])
    moved = helper.make_node(op, ["stored", *(held.name for held in numbers)], ["moved"], "move", **attributes)
    product = helper.make_node("MatMul", ["x", "moved"], ["y"], "layer/MatMul")
    stored = [array("stored", *dims), *numbers]
    path = save(tmp_path / "g.onnx", [moved, product], [value("x", "B", 64)], [value("y", "B", 32)], stored)
    (found,) = describe(path)["linears"]
    assert (found["path"], found["shape"], found["nbytes"]) == ("layer", [32, 64], 4 * 64 * 32)


def test_an_engine_is_described_by_the_json_beside_it(tmp_path: Path) -> None:
    manifest = {
        "kind": "fp4trt engine",
        "format": 1,
        "engine": "a.engine",
        "engine_bytes": 1234,
        "fp4_gemms": 32,
        "fp4_linears": 52,
        "quantized_linears": 52,
        "request": {"gpus": ["rtx5090"], "compute_capabilities": ["12.0"]},
    }
    (tmp_path / "a.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "a.engine").write_bytes(b"engine")
    for name in ("a.json", "a.engine"):
        found = describe(tmp_path / name)
        assert found["kind"] == "engine"
        assert found["fp4_coverage"] == 1
        assert found["engine_present"]
        assert any("rtx5090" in line for line in table(found))


@pytest.mark.parametrize("name", ["absent", "note.txt", "list.json", "other.json"])
def test_anything_else_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "note.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnknownArtifact) as caught:
        describe(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def _damaged(path: Path, name: str, value: object) -> Path:
    (path / name).write_text(json.dumps(value), encoding="utf-8")
    return path


DAMAGE: dict[str, tuple[str, object]] = {
    "an index without names": ("diffusion_pytorch_model.safetensors.index.json", {"weight_map": [1]}),
    "an index of numbers": ("diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": 1}}),
    "an index of nothing": ("diffusion_pytorch_model.safetensors.index.json", {"weight_map": {}}),
    "an index of another folder": ("diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "../b"}}),
    "an index that lies": (
        "diffusion_pytorch_model.safetensors.index.json",
        {"weight_map": {"ghost": "diffusion_pytorch_model.safetensors"}},
    ),
    "an index that is a list": ("diffusion_pytorch_model.safetensors.index.json", []),
    "a manifest without a recipe": ("fp4trt.json", {"recipe": []}),
    "a manifest with other groups": ("fp4trt.json", {"groups": [1]}),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_json_is_refused_in_one_line(how: str, copy_of_digits: Path) -> None:
    name, value = DAMAGE[how]
    with pytest.raises(
        UnknownArtifact, match=rf"{name} .*(copy (it|the shards) again|quantize again|expected an object)"
    ):
        describe(_damaged(copy_of_digits, name, value))


@pytest.mark.parametrize(
    "value",
    [
        {"request": []},
        {"fp4_linears": "many"},
        {"quantized_linears": [1]},
        {"fp4_linears": float("inf")},
        {"engine": "../e"},
        {"coverage": {"fp8": 3}},
    ],
)
def test_a_damaged_manifest_of_an_engine_is_refused_in_one_line(tmp_path: Path, value: dict[str, object]) -> None:
    _damaged(tmp_path, "a.json", {"kind": "fp4trt engine", **value})
    with pytest.raises(UnknownArtifact, match="is a damaged manifest of an engine"):
        describe(tmp_path / "a.json")


def _edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change the header of a folder's safetensors."""
    file = folder / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return folder


QUERY = "transformer_blocks.0.attn.to_q"
LOST_SCALES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no block scales": (lambda h: h.pop(f"{QUERY}.weight_scale"), "weight_scale is missing, expected F8_E4M3 [128, 8]"),
    "no global scale": (lambda h: h.pop(f"{QUERY}.weight_scale_2"), "weight_scale_2 is missing, expected F32 []"),
    "other shape": (
        lambda h: h[f"{QUERY}.weight_scale"].update(shape=[8, 128]),
        "weight_scale is F8_E4M3 [8, 128], expected F8_E4M3 [128, 8]",
    ),
}


@pytest.mark.parametrize("how", LOST_SCALES)
def test_codes_without_their_scales_are_refused_and_of_another_family_not_what_was_promised(
    how: str, copy_of_digits: Path
) -> None:
    edit, reason = LOST_SCALES[how]
    folder = _edited(copy_of_digits, edit)
    with pytest.raises(BadCheckpoint, match=rf"{QUERY}\.weight_scale"):
        describe(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"_class_name": "OtherTransformer"}
    del config["quantization_config"]
    found = describe(_damaged(folder, "config.json", config))  # of no family of ours: as far as the names go
    assert found["fp4_linears"] == 19
    assert found["promise"]["differing"] == [
        {"path": QUERY, "promised": "nvfp4", "found": "u8", "reason": f"{QUERY}.{reason}"}
    ]


def test_a_shape_of_negative_sizes_is_refused(copy_of_digits: Path) -> None:
    with pytest.raises(UnknownArtifact, match=r"U8\[-128, -64\] does not fill"):
        describe(_edited(copy_of_digits, lambda header: header[f"{QUERY}.weight"].update(shape=[-128, -64])))


def _sharded(folder: Path, shards: dict[str, list[str]], weight_map: dict[str, str]) -> Path:
    """Write files of one-element tensors and an index of them."""
    for file, names in shards.items():
        header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + bytes(len(names)))
    (folder / "config.json").write_text('{"_class_name": "OtherTransformer"}', encoding="utf-8")
    return _damaged(folder, "diffusion_pytorch_model.safetensors.index.json", {"weight_map": weight_map})


WHOLE = "diffusion_pytorch_model.safetensors"
OTHER_INDEX: dict[str, tuple[dict[str, list[str]], dict[str, str], str]] = {
    "a tensor that it does not know": (
        {"1": ["a", "b"], "2": ["c"]},
        {"a": "1", "c": "2"},
        "does not name b, which 1 holds",
    ),
    "a tensor in another shard": (
        {"1": ["a", "b"], "2": ["c"]},
        {"a": "1", "b": "2", "c": "2"},
        "that 2 holds b, which 1",
    ),
    "a tensor in two shards": (
        {"1": ["a"], "2": ["a", "c"]},
        {"a": "1", "c": "2"},
        "that 1 holds a, which 2",
    ),
    "a tensor that is gone": ({"1": ["a"]}, {"a": "1", "b": "1"}, "speaks of b, which no shard holds"),
    "a file beside the shards": ({"1": ["a"], WHOLE: ["a"]}, {"a": "1"}, f"does not speak of {WHOLE}"),
}


@pytest.mark.parametrize("how", OTHER_INDEX)
def test_an_index_that_is_not_that_of_its_shards_is_refused(how: str, tmp_path: Path) -> None:
    shards, weight_map, words = OTHER_INDEX[how]
    with pytest.raises(UnknownArtifact, match=words):
        describe(_sharded(tmp_path, shards, weight_map))


def test_shards_that_are_those_of_their_index_are_described(tmp_path: Path) -> None:
    found = describe(_sharded(tmp_path, {"1": ["a", "b"], "2": ["c"]}, {"a": "1", "b": "1", "c": "2"}))
    assert found["tensors"] == found["bytes"] == 3


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("_class_name", None, "has no _class_name"),
        ("_class_name", 7, "has no _class_name"),
        ("num_layers", "x", "num_layers is 'x', expected"),
        ("num_layers", -1, "num_layers is -1, expected"),
        ("num_single_layers", True, "num_single_layers is True, expected"),
        ("num_attention_heads", 0, "num_attention_heads is 0, expected"),
        ("joint_attention_dim", None, "joint_attention_dim is None, expected"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(
    key: str, value: object, words: str, digits: Path, tmp_path: Path
) -> None:
    shutil.copy(digits / WHOLE, tmp_path)
    config = json.loads((digits / "config.json").read_text(encoding="utf-8"))
    _damaged(tmp_path, "config.json", config)
    assert describe(tmp_path)["family"] == "FluxTransformer2DModel"
    with pytest.raises(UnknownArtifact, match=rf"config\.json:? {words}"):
        describe(_damaged(tmp_path, "config.json", {**config, key: value}))


def test_weights_that_are_not_of_their_config_are_refused_in_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(digits / WHOLE, tmp_path)
    config = json.loads((digits / "config.json").read_text(encoding="utf-8"))
    for key, words in (
        ("joint_attention_dim", r"context_embedder\.weight is \[128, 64\] in .*, \[128, 65\] by its config\.json"),
        ("num_layers", r"transformer_blocks\.1\.attn\.\S+ is absent in .*, \[\d+\] by its config\.json"),
    ):
        _damaged(tmp_path, "config.json", {**config, key: config[key] + 1})
        assert fp4trt.run(["inspect", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(f"fp4trt inspect: error: {words}; take", line), line


def test_an_engine_without_its_manifest_is_refused_with_the_file_that_lacks(tmp_path: Path) -> None:
    (tmp_path / "a.engine").write_bytes(b"engine")
    with pytest.raises(UnknownArtifact, match=r"a\.engine has no a\.json beside it"):
        describe(tmp_path / "a.engine")


def test_a_safetensors_file_that_is_cut_short_is_refused(copy_of_digits: Path) -> None:
    weights = copy_of_digits / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UnknownArtifact, match=r"safetensors ends at byte \d+, but .* needs \d+ bytes; copy it again"):
        describe(copy_of_digits)


def test_a_safetensors_header_whose_sizes_contradict_each_other_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "MochiTransformer3DModel"}')
    header = json.dumps({"a.weight": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 8]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(data)
    with pytest.raises(UnknownArtifact, match=r"BF16\[4, 4\] does not fill bytes 0 to 8"):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("offset", "many", "has the offset 'many'"),
        ("offset", "-1", "has the offset '-1'"),
        ("location", "../weights", "expected a path inside"),
    ],
)
def test_external_data_that_make_no_sense_are_refused_in_one_line(
    copied_model: Path, key: str, value: str, said: str
) -> None:
    model = onnx.load(copied_model, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    onnx.save(model, copied_model)
    with pytest.raises(BadGraph, match=said):
        describe(copied_model)


def test_the_command_prints_a_table_and_json(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fp4trt.run(["inspect", str(digits)]) == 0
    assert "bf16" in capsys.readouterr().out
    assert fp4trt.run(["inspect", str(digits), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"


def test_inspecting_needs_no_torch(quantized_digits: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from onnx_functions.inspection.inspect import describe\n"
        "for path in sys.argv[1:]: print(describe(path)['kind'])"
    )
    paths = [str(quantized_digits), str(quantized_digits / "model.onnx")]
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["quantized", "checkpoint", "onnx"]
