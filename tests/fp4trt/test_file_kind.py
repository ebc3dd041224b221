"""Files that are healthy, or are something else, and what is said of them in place of "damaged"."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from calibration.by_block.calibration import merged
from calibration.checkpoints.plain import finite_tensor
from calibration.inputs.prompts import read_prompts
from calibration.recipes.recipe import load_recipe
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadCheckpoint
from fp4trt.file_kind import what_it_is, what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import tensors_in_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23802932552\n"


def stored(path: Path, dtype: str, shape: list[int], data: bytes) -> Path:
    """Write a safetensors file of one tensor, w."""
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    ("dtype", "elements"),
    [("F8_E5M2", 4), ("F8_E8M0", 4), ("U16", 2), ("I16", 2), ("F4", 8), ("F6_E2M3", 0), ("F8_NEW", 4)],
)
def test_a_tensor_of_a_dtype_that_is_not_read_is_no_damage(dtype: str, elements: int, tmp_path: Path) -> None:
    file = stored(tmp_path / "a.safetensors", dtype, [elements], bytes(4) if elements else b"")
    assert tensors_in_file(file)["w"].dtype == dtype
    with pytest.raises(BadCheckpoint, match=f"holds a tensor .* as {dtype}, which fp4trt does not read"):
        tensors_in_file(file)["w"].tensor()
    with pytest.raises(BadCheckpoint, match=f"w is stored as {dtype}; expected one of: BF16, F16, F32"):
        finite_tensor(tmp_path, "w", tensors_in_file(file)["w"])


def test_a_finite_number_beyond_bf16_is_not_called_infinite(tmp_path: Path) -> None:
    file = stored(tmp_path / "a.safetensors", "F32", [2], struct.pack("<ff", 1, -3.4e38))
    with pytest.raises(BadCheckpoint, match=r"w holds 3\.4e\+38, beyond BF16's range of 3\.39e\+38"):
        finite_tensor(tmp_path, "w", tensors_in_file(file)["w"])
    stored(file, "F32", [2], struct.pack("<ff", 1, float("inf")))
    with pytest.raises(BadCheckpoint, match="w holds NaN or infinite values"):
        finite_tensor(tmp_path, "w", tensors_in_file(file)["w"])


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.json").write_bytes(mark + b'{"x": 2.5}')
    assert load_json(tmp_path / "a.json") == {"x": 2.5}
    assert merged([tmp_path / "a.json"], ["x"]).amax == {"x": 2.5}
    (tmp_path / "a.json").write_bytes('{"x": 2.5}'.encode("utf-16"))  # what PowerShell writes
    assert load_json(tmp_path / "a.json") == {"x": 2.5}
    (tmp_path / "prompts.txt").write_bytes(mark + b"a cat\r\na dog\r\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    (tmp_path / "mine.yaml").write_bytes(mark + b"name: mine\nmethod: {name: ptq}\n")
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "is a Git LFS pointer, not the file that it stands for: run git lfs pull"),
        (b"", "is empty"),
        (b"GGUF\x03\x00\x00\x00" + bytes(16), "is a GGUF file"),
        (b"PK\x03\x04" + bytes(16), r"is a zip archive, as torch\.save writes"),
        (b"\x80\x02}q\x00." + bytes(16), "is a pickle"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    for read in (load_json, tensors_in_file):
        with pytest.raises(BadCheckpoint, match=words):
            read(tmp_path / "file")


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(struct.pack("<Q", 0x0480) + b'{"w":')
    assert what_it_is(file) is None


def test_weights_in_other_files_than_the_one_that_is_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(16))
    with pytest.raises(BadCheckpoint, match=r"its diffusion_pytorch_model\.bin is a zip archive"):
        tensors_in_folder(tmp_path)
    stored(tmp_path / "diffusion_pytorch_model.fp16.safetensors", "F32", [1], bytes(4))
    with pytest.raises(BadCheckpoint, match=r"its diffusion_pytorch_model\.fp16\.safetensors is not the name"):
        tensors_in_folder(tmp_path)


def test_a_download_that_did_not_end_is_named(tmp_path: Path) -> None:
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert what_it_lacks(file) == "does not exist"
    (tmp_path / f"{file.name}.incomplete").touch()
    lacks = what_it_lacks(file)
    assert lacks.startswith("does not exist, and diffusion_pytorch_model.safetensors.incomplete is there: the download")
    file.symlink_to("../../blobs/4d7a")
    assert what_it_lacks(file).startswith("is a link to ../../blobs/4d7a, which does not exist")
