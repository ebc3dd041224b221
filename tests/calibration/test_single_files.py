"""Single files as sources: under other names, behind prefixes, in FP8 and GGUF, from the hub's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fp4trt
from calibration.checkpoints.plain import find_source, load_source, open_plain, weights_fingerprint
from fp4trt.errors import BadCheckpoint, BadEnvironment, BadLora, BadOption
from fp4trt.families import family_of
from fp4trt.single_files.opening import open_file
from fp4trt.single_files.tables import SINGLE_FILES
from fp4trt.source_folder import SOURCE

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state(digits: Path) -> Tensors:
    return load_file(digits / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def original(digits: Path, state: Tensors) -> Tensors:
    """The built-in model under BFL's names, joined here by hand, with none of the tables."""
    found: Tensors = {}
    inside = {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    }
    outside = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
    }
    single = {
        "modulation.lin": "norm.linear",
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
        "linear2": "proj_out",
    }
    norms = {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    }
    pairs = {a: [b] for a, b in outside.items() if f"{b}.weight" in state}
    for index in range(sum(f"transformer_blocks.{i}.norm1.linear.weight" in state for i in range(99))):
        pairs |= {
            f"double_blocks.{index}.{a}": [f"transformer_blocks.{index}.{part}" for part in b.split()]
            for a, b in inside.items()
        }
        for a, b in norms.items():
            found[f"double_blocks.{index}.{a}.scale"] = state[f"transformer_blocks.{index}.{b}.weight"]
    for index in range(sum(f"single_transformer_blocks.{i}.norm.linear.weight" in state for i in range(99))):
        block = f"single_transformer_blocks.{index}"
        pairs |= {f"single_blocks.{index}.{a}": [f"{block}.{part}" for part in b.split()] for a, b in single.items()}
        for key, norm in (("query", "q"), ("key", "k")):
            found[f"single_blocks.{index}.norm.{key}_norm.scale"] = state[f"{block}.attn.norm_{norm}.weight"]
    for name, parts in pairs.items():
        for leaf in ("weight", "bias"):
            found[f"{name}.{leaf}"] = torch.cat([state[f"{part}.{leaf}"] for part in parts])
    for leaf in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    return found


def _values(folder: Path) -> Tensors:
    source = open_plain(folder)
    return {name: source.tensor(name) for name in source.stored}


def _same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def _bytes(result: Path) -> list[bytes]:
    return [(result / name).read_bytes() for name in ("diffusion_pytorch_model.safetensors", "config.json")]


def test_a_file_and_the_folder_of_the_same_weights_give_the_same_bytes(
    digits: Path, original: Tensors, quantized_digits: Path, five_calls: Path, tmp_path: Path
) -> None:
    """Where blocks are run, and where the file is read in the order of its bytes."""
    file = tmp_path / "bfl.safetensors"
    save_file(original, file)
    fp4trt.quantize(file, tmp_path / "by-block", recipe="nvfp4-ptq", calibration=five_calls, like=digits)
    assert _bytes(tmp_path / "by-block") == _bytes(quantized_digits)
    for name, source, like in (("file", file, digits), ("folder", digits, None)):
        fp4trt.quantize(source, tmp_path / name, recipe="mxfp8-ptq", like=like)
    assert _bytes(tmp_path / "file") == _bytes(tmp_path / "folder")


def test_other_names_prefixes_and_dtypes_are_the_same_model(
    digits: Path, state: Tensors, original: Tensors, tmp_path: Path
) -> None:
    pipeline = {f"model.diffusion_model.{name}": value for name, value in original.items()}
    pipeline |= {"vae.decoder.conv_in.weight": torch.zeros(2), "text_encoders.t5xxl.shared": torch.zeros(2)}
    wide = {name: value.float() for name, value in original.items()}
    files = {
        "whole": pipeline,
        "diffusers": {f"transformer.{name}": value for name, value in state.items()},
        "wide": wide,
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        folder = find_source(tmp_path / f"{name}.safetensors", digits)
        assert _same(_values(folder), state), name
        assert weights_fingerprint(folder) == weights_fingerprint(digits)


def _fp8(original: Tensors) -> tuple[Tensors, Tensors]:
    """Return weights in FP8 as ComfyUI keeps them, and what they stand for."""
    stored, meant = {}, {}
    for index, (name, value) in enumerate(original.items()):
        stored[name] = meant[name] = value
        if name.endswith(".weight") and value.ndim == 2 and "blocks" in name:
            scale = value.float().abs().amax() / 448
            stored[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            meant[name] = (stored[name].float() * scale).to(torch.bfloat16)
            leaf = ("weight_scale", "scale_weight")[index % 2]
            stored[f"{name.removesuffix('weight')}{leaf}"] = scale
            stored[f"{name.removesuffix('weight')}input_scale"] = torch.ones(())
    return {**stored, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, meant


def test_scaled_fp8_is_dequantized_and_said(
    digits: Path, original: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, meant = _fp8(original)
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    found = _values(find_source(tmp_path / "fp8.safetensors", digits))
    assert "dequantized to BF16" in capsys.readouterr().err
    assert _same(found, _values(find_source(tmp_path / "meant.safetensors", digits)))


def test_a_weight_that_was_cast_to_fp8_is_what_it_is(digits: Path, original: Tensors, tmp_path: Path) -> None:
    cast = {name: value.to(torch.float8_e5m2) if value.ndim == 2 else value for name, value in original.items()}
    save_file(cast, tmp_path / "cast.safetensors")
    save_file({name: value.to(torch.bfloat16) for name, value in cast.items()}, tmp_path / "meant.safetensors")
    found, wanted = (_values(find_source(tmp_path / f"{name}.safetensors", digits)) for name in ("cast", "meant"))
    assert _same(found, wanted)


def _write_gguf(path: Path, tensors: Tensors, kind: gguf.GGMLQuantizationType) -> Tensors:
    """Write a file as city96's converter does, in a quantized type; return what it stands for."""
    writer = gguf.GGUFWriter(path, "flux")
    meant: Tensors = {}
    for name, value in tensors.items():
        numbers = value.float().numpy()
        if value.ndim == 2 and value.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            data = gguf.quants.quantize(numbers, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            meant[name] = torch.from_numpy(np.array(gguf.dequantize(data, kind))).to(torch.bfloat16)
        else:
            writer.add_tensor(name, numbers)
            meant[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_gguf_is_what_its_own_package_dequantizes(kind: str, digits: Path, original: Tensors, tmp_path: Path) -> None:
    meant = _write_gguf(tmp_path / "model.gguf", original, gguf.GGMLQuantizationType[kind])
    save_file(meant, tmp_path / "meant.safetensors")
    found, wanted = (_values(find_source(tmp_path / name, digits)) for name in ("model.gguf", "meant.safetensors"))
    assert _same(found, wanted)


def test_the_manifest_has_the_hash_of_the_file(digits: Path, original: Tensors, tmp_path: Path) -> None:
    """The weights of a file in FP8, as they are read, are not what is hashed."""
    save_file(_fp8(original)[0], tmp_path / "fp8.safetensors")
    fp4trt.quantize(tmp_path / "fp8.safetensors", tmp_path / "out", recipe="mxfp8-ptq", like=digits)
    manifest = json.loads((tmp_path / "out" / "fp4trt.json").read_text())
    assert (
        manifest["source"]["fp8.safetensors"] == hashlib.sha256((tmp_path / "fp8.safetensors").read_bytes()).hexdigest()
    )


def test_a_graph_and_its_reference_come_from_a_file(digits: Path, original: Tensors, tmp_path: Path) -> None:
    save_file(original, tmp_path / "bfl.safetensors")
    folder = find_source(tmp_path / "bfl.safetensors", digits)
    assert (folder / SOURCE).is_file()
    model: Any = load_source(folder)
    assert _same(model.state_dict(), load_source(digits).state_dict())


def test_loras_are_fused_as_weights_are_read(
    digits: Path, state: Tensors, original: Tensors, five_calls: Path, tmp_path: Path
) -> None:
    """Into a folder and a single file, by block and in the order of the bytes; the arithmetic has its own tests."""
    random = torch.Generator().manual_seed(0)
    fused, factors = dict(state), {}
    for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"):
        rows, columns = state[f"{path}.weight"].shape
        down, up = (torch.randn(shape, generator=random).bfloat16() for shape in ((4, columns), (rows, 4)))
        factors |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
        delta = (up.float() @ down.float() * 0.5).bfloat16()
        fused[f"{path}.weight"] = state[f"{path}.weight"] + delta
    lora, file = tmp_path / "style.safetensors", tmp_path / "bfl.safetensors"
    save_file(factors, lora)
    save_file(original, file)
    shutil.copytree(digits, tmp_path / "fused")
    save_file(fused, tmp_path / "fused" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    given = f"{lora}:0.5"
    by_block: dict[str, Any] = {"recipe": "nvfp4-ptq", "calibration": five_calls}
    runs: dict[str, tuple[Path, dict[str, Any]]] = {
        "wanted": (tmp_path / "fused", by_block),
        "folder": (digits, {"lora": given, **by_block}),
        "wanted-mx": (tmp_path / "fused", {"recipe": "mxfp8-ptq"}),
        "file-mx": (file, {"like": digits, "lora": given, "recipe": "mxfp8-ptq"}),
    }
    for name, (source, options) in runs.items():
        fp4trt.quantize(source, tmp_path / name, **options)
    assert _bytes(tmp_path / "folder") == _bytes(tmp_path / "wanted")
    assert _bytes(tmp_path / "file-mx") == _bytes(tmp_path / "wanted-mx")
    (said,) = json.loads((tmp_path / "folder" / "fp4trt.json").read_text())["lora"]
    assert said == {
        "file": "style.safetensors",
        "sha256": hashlib.sha256(lora.read_bytes()).hexdigest(),
        "strength": 0.5,
    }
    prints = {weights_fingerprint(find_source(digits, lora=strength)) for strength in ((), given, str(lora))}
    assert len(prints) == 3
    assert weights_fingerprint(find_source(digits, lora=f"{lora}:0")) in prints  # which changes nothing
    with pytest.raises(BadLora, match=r"no longer finite once style.safetensors at 1e\+38 is fused into it"):
        _values(find_source(digits, lora=f"{lora}:1e38"))


def test_prompts_go_through_the_pipeline_that_like_names(pipeline: Path, tmp_path: Path) -> None:
    shutil.copyfile(pipeline / "transformer/diffusion_pytorch_model.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat")
    found = []
    for name, source, like in (("file", tmp_path / "mine.safetensors", pipeline), ("folder", pipeline, None)):
        path = tmp_path / f"{name}.json"
        fp4trt.calibrate(source, path, prompts=tmp_path / "prompts.txt", steps=1, resolution=32, like=like)
        found.append(path.read_bytes())
    assert found[0] == found[1]


def _header_only(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of BF16 tensors with no data on disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


PUBLISHED = [(class_name, name) for class_name, table in SINGLE_FILES.items() for name in table.published]


@pytest.mark.parametrize(("class_name", "name"), PUBLISHED)
def test_the_config_of_a_published_model_comes_from_its_shapes(class_name: str, name: str, tmp_path: Path) -> None:
    table = SINGLE_FILES[class_name]
    config = dict(table.published[name])
    shapes = {key: one.shape for key, one in table.layout(family_of(config).state(config)).items()}
    _header_only(tmp_path / "x.safetensors", shapes)
    if class_name == "QwenImageTransformer2DModel" and "Layered" not in name:
        with pytest.raises(BadCheckpoint, match="'Qwen-Image' or 'Qwen-Image-Edit-2511', which compute differently"):
            open_file(tmp_path / "x.safetensors")
    else:
        assert open_file(tmp_path / "x.safetensors").config == config
        assert fp4trt.inspect(tmp_path / "x.safetensors")["family"] == class_name


def test_variants_of_flux_are_told_by_their_shapes(tmp_path: Path) -> None:
    table = SINGLE_FILES["FluxTransformer2DModel"]
    usual = dict(table.published["FLUX.1"])
    variants: dict[str, dict[str, Any]] = {
        "schnell": {"guidance_embeds": False},
        "fill": {"in_channels": 384, "out_channels": 64},
        "canny": {"in_channels": 128, "out_channels": 64},
        "lite": {"num_layers": 8},
    }
    for name, change in variants.items():
        config = {**usual, **change}
        layout = table.layout(family_of(config).state(config))
        _header_only(tmp_path / f"{name}.safetensors", {key: one.shape for key, one in layout.items()})
        assert open_file(tmp_path / f"{name}.safetensors").config == config, name


def _without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


def _scaled(tensors: Tensors, scale: float, among: int = 2) -> Tensors:
    """Return tensors of which two weights are in FP8 and the first ones have a scale."""
    names = ["img_in", "txt_in"]
    cast = {f"{name}.weight": tensors[f"{name}.weight"].to(torch.float8_e4m3fn) for name in names}
    return {**tensors, **cast, **{f"{name}.weight_scale": torch.tensor(scale) for name in names[:among]}}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a scale is missing": (lambda t: _scaled(t, 1.0, 1), "txt_in.weight has no scale, as img_in.weight has one"),
    "a scale below 0": (lambda t: _scaled(t, -1.0), "_in has a scale of -1; expected numbers above 0"),
    "scales that differ": (
        lambda t: {**_scaled(t, 1.0), "img_in.scale_weight": torch.tensor(2.0)},
        "img_in has two scales .weight_scale and scale_weight. that differ",
    ),
    "no model": (lambda _: {"a.b": torch.zeros(2)}, "under the names of no model that is known"),
    "lacks one": (lambda t: _without(t, "img_in.bias"), r"lacks img_in.bias, which is \[128\] in the model"),
    "has another": (lambda t: {**t, "extra.weight": torch.zeros(2)}, "holds extra.weight, which is no tensor"),
    "quantized": (
        lambda t: {**t, "img_in.weight": torch.zeros(128, 8, dtype=torch.uint8)},
        "is quantized already .img_in.weight is U8",
    ),
    "scales in no order": (
        lambda t: {
            **t,
            "img_in.weight": t["img_in.weight"].to(torch.float8_e4m3fn),
            "img_in.weight_scale": torch.ones(3),
        },
        "img_in has 3 scales for 128 rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_file_is_refused_by_name(case: str, digits: Path, original: Tensors, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    save_file(change(original), tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match=message):
        find_source(tmp_path / "x.safetensors", digits)


def test_what_like_may_be(digits: Path, original: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(original, tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match="of other sizes or tensors than its published models"):
        find_source(tmp_path / "x.safetensors")
    with pytest.raises(BadCheckpoint, match=r"holds a FluxTransformer2DModel, and its config .* of a WanTr"):
        find_source(tmp_path / "x.safetensors", "wan 14b")
    with pytest.raises(BadCheckpoint, match=r"--like nothing is no config.json, no folder with one, and none of: 'Ch"):
        find_source(tmp_path / "x.safetensors", "nothing")
    (tmp_path / "axes.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": "two"}))
    with pytest.raises(BadCheckpoint, match=r"axes.json: in_channels is None"):
        find_source(tmp_path / "x.safetensors", tmp_path / "axes.json")
    with pytest.raises(BadCheckpoint, match=r"lacks double_blocks.1.img_mod.lin.weight"):  # digits has more blocks
        find_source(tmp_path / "x.safetensors", "digits")
    with monkeypatch.context() as patch:
        patch.setenv("FP4TRT_CACHE", str(tmp_path / "axes.json"))
        with pytest.raises(BadEnvironment, match="name another folder in FP4TRT_CACHE"):
            find_source(tmp_path / "x.safetensors", digits)
    with pytest.raises(BadOption, match="digits has its own: drop it"):
        find_source("digits", digits)
    with pytest.raises(BadCheckpoint, match=r"gone.safetensors does not exist; expected a single file there"):
        find_source(tmp_path / "gone.safetensors", digits)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')  # of something else, which says nothing
    with pytest.raises(BadCheckpoint, match="of other sizes or tensors than its published models"):
        find_source(tmp_path / "x.safetensors")
    shutil.copyfile(digits / "config.json", tmp_path / "config.json")  # which is enough
    assert find_source(tmp_path / "x.safetensors") == find_source(tmp_path / "x.safetensors", digits)


def test_a_file_that_has_changed_since_is_not_read_on(digits: Path, original: Tensors, tmp_path: Path) -> None:
    save_file(original, tmp_path / "x.safetensors")
    folder, before = find_source(tmp_path / "x.safetensors", digits), (tmp_path / "x.safetensors").stat()
    save_file({**original, "img_in.bias": original["img_in.bias"] * 2}, tmp_path / "x.safetensors")
    os.utime(tmp_path / "x.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p leaves it
    with pytest.raises(BadCheckpoint, match="has changed or is gone; give the source itself again"):
        open_plain(folder)


def test_the_hubs_cache_is_enough(
    digits: Path, original: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of links to blobs, as huggingface_hub keeps them, without a network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cache(repository: str, files: Mapping[str, bytes]) -> None:
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        commit = "0" * 40
        (place / "refs").mkdir(parents=True)
        (place / "blobs").mkdir()
        (place / "refs" / "main").write_text(commit)
        for index, (name, data) in enumerate(files.items()):
            (place / "blobs" / str(index)).write_bytes(data)
            link = place / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place / "blobs" / str(index))

    save_file(original, tmp_path / "bfl.safetensors")
    weights = {name: (digits / name).read_bytes() for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    single = (tmp_path / "bfl.safetensors").read_bytes()
    cache("me/pipeline", {"model_index.json": b"{}", **{f"transformer/{n}": d for n, d in weights.items()}})
    cache("me/transformer", weights)
    cache("me/single", {"bfl.safetensors": single})
    for name in ("me/pipeline", "me/transformer"):
        assert weights_fingerprint(find_source(name)) == weights_fingerprint(digits)
    folder = find_source("me/single/bfl.safetensors", digits)
    assert weights_fingerprint(folder) == weights_fingerprint(digits)
    with pytest.raises(BadCheckpoint, match="nor in the hub's cache, and the hub cannot be reached"):
        find_source("me/nothing")
