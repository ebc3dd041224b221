"""LoRAs as inputs of a graph: from LoRA files to what the graph computes, and to the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

import fp4trt
from calibration import load
from calibration.digits.description import DESCRIPTION
from calibration.digits.latents import decode
from calibration.digits.sampling import denoise
from calibration.lora_inputs import lora_inputs
from calibration.pixel_space.sampling import noise
from exporter import export
from fp4trt.errors import BadLora, OutputExists
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from generation.pipelines import model_of
from generation.pipelines.batches import largest_batch
from generation.transformer import GraphTransformer
from onnx_functions.linting import lint
from onnx_functions.simulation import session
from onnx_functions.validation.run_gates import validate
from tests.shared_folders import SharedFolder
from trt_build import build

Tensors = dict[str, torch.Tensor]

MAX_RANK = 128
WIDTH = 128
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


@pytest.fixture(scope="module")
def slotted(svdquant_checkpoint: Path, shared_folder: SharedFolder) -> Path:
    """A checkpoint with smoothed inputs and branches, exported with slots; not to be changed."""

    def make(folder: Path) -> None:
        export(shutil.copytree(svdquant_checkpoint, folder / "digits"), lora_rank=MAX_RANK)

    return shared_folder("slotted", make) / "digits"


def _pair(key: str, rows: int, columns: int, rank: int, ends: tuple[str, str]) -> Tensors:
    """Return factors that BF16 can hold, of a change as large as the weight."""
    random = torch.Generator().manual_seed(rank + rows)
    down = torch.randn(rank, columns, generator=random) / columns**0.5
    up = torch.randn(rows, rank, generator=random) / rank**0.5
    return {f"{key}.{ends[0]}": down.bfloat16(), f"{key}.{ends[1]}": up.bfloat16()}


def _lora(rank: int) -> Tensors:
    """Return a LoRA in two namings: of linears that read one input, with factors of their own and with a common one."""
    own = ("lora_A.weight", "lora_B.weight")
    sizes = {
        f"{SINGLE}.attn.to_q": (WIDTH, WIDTH),
        f"{SINGLE}.proj_mlp": (4 * WIDTH, WIDTH),
        f"{SINGLE}.proj_out": (WIDTH, 5 * WIDTH),
        f"{BLOCK}.norm1.linear": (6 * WIDTH, WIDTH),
        f"{BLOCK}.ff_context.net.2": (WIDTH, 4 * WIDTH),
    }
    found = {}
    for path, (rows, columns) in sizes.items():
        found |= _pair(f"transformer.{path}", rows, columns, rank, own)
    return found | _pair("diffusion_model.double_blocks.0.img_attn.qkv", 3 * WIDTH, WIDTH, rank, own)


def _added_in_torch(model: Any, lora: Tensors, strength: float) -> None:
    """Let a model's linears add what a LoRA of :func:`_lora` gives, by the file's own tensors."""

    def add(path: str, down: torch.Tensor, up: torch.Tensor) -> None:
        def hook(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return output + strength * functional.linear(functional.linear(args[0], down), up)

        model.get_submodule(path).register_forward_hook(hook)

    for key in (key for key in lora if key.endswith("lora_A.weight")):
        down, up = lora[key].float(), lora[key.replace("lora_A", "lora_B")].float()
        if "qkv" in key:
            for path, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
                add(f"{BLOCK}.attn.{path}", down, rows)
        else:
            add(key.removeprefix("transformer.").removesuffix(".lora_A.weight"), down, up)


def _inputs(folder: Path) -> Tensors:
    config = load_json(folder / "config.json")
    return family_of(config).example_inputs(config, (2, 16, 8), 0, torch.float32)


@pytest.fixture(scope="module")
def runs(slotted: Path) -> Any:
    """One session of the graph with slots, computing in FP32 with inputs that are not rounded to FP4."""
    return session(slotted / "model.onnx", bypass_activation_quantizers=True, float32=True)


def _factors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.float().numpy() for name, value in load_file(path).items()}


@pytest.mark.parametrize("rank", [0, 4, 32])
def test_one_graph_computes_what_torch_does_with_loras_of_several_ranks(
    rank: int, slotted: Path, runs: Any, tmp_path: Path
) -> None:
    """The factors of proj_mlp and to_q, which read one input, stand beside each other: twice the LoRA's rank."""
    lora = _lora(max(rank, 1))
    save_file(lora, tmp_path / "lora.safetensors")
    strength = 0.5 if rank else 0.0
    made = lora_inputs((tmp_path / "lora.safetensors", strength), tmp_path / "x", checkpoint=slotted)
    given = _inputs(slotted)
    model = load(slotted, dtype=torch.float32, quantize_activations=False)
    with torch.inference_mode():
        plain = model(**given, return_dict=False)[0]
        _added_in_torch(model, lora, strength)
        expected = model(**given, return_dict=False)[0]

    arrays = {name: value.numpy() for name, value in given.items()}
    found = torch.from_numpy(runs.run(None, {**arrays, **_factors(tmp_path / "x")})[0])

    assert made.rank == 2 * rank
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    if rank:
        assert float((plain - expected).norm() / expected.norm()) > 0.05
    else:
        assert torch.equal(plain, expected)


def test_an_empty_slot_changes_no_bit(slotted: Path, svdquant_digits: Path) -> None:
    given = {name: value.bfloat16() for name, value in _inputs(slotted).items()}

    with_slots, without = (GraphTransformer(folder / "model.onnx") for folder in (slotted, svdquant_digits))

    assert torch.equal(with_slots(**given)[0], without(**given)[0])


def test_a_graph_draws_with_a_lora_as_the_checkpoint_does_in_torch(slotted: Path, tmp_path: Path) -> None:
    """As far as roundings to BF16, after which some inputs get another FP4 code, let it."""
    lora, given = _lora(4), _inputs(slotted)
    save_file(lora, tmp_path / "lora.safetensors")
    lora_inputs(tmp_path / "lora.safetensors", tmp_path / "x", checkpoint=slotted)
    model = load(slotted, dtype=torch.float32)
    with torch.inference_mode():
        plain = model(**given, return_dict=False)[0]
        _added_in_torch(model, lora, 1.0)
        expected = model(**given, return_dict=False)[0]

    found = GraphTransformer(slotted / "model.onnx", lora=tmp_path / "x")(**given)[0]

    assert float((found - expected).norm()) < 0.25 * float((plain - expected).norm())


def test_generate_fills_the_slots_and_refuses_a_graph_without(
    slotted: Path, svdquant_digits: Path, tmp_path: Path
) -> None:
    file = tmp_path / "style.safetensors"
    save_file(_lora(4), file)
    lora_inputs((file, 0.5), tmp_path / "x", checkpoint=slotted)
    start = noise(DESCRIPTION, 1, 0)
    by_hand = GraphTransformer(slotted / "model.onnx", lora=tmp_path / "x")
    *_, last = denoise(by_hand, [7], start, steps=2, dtype=torch.bfloat16)
    run: dict[str, Any] = {"prompts": "seven", "steps": 2}

    fp4trt.generate(slotted / "model.onnx", tmp_path / "with.png", lora=f"{file}:0.5", **run)
    fp4trt.generate(slotted / "model.onnx", tmp_path / "without.png", **run)

    drawn, plain = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("with", "without"))
    assert (drawn == (decode(last.latents)[0] * 255).round().numpy()).all()
    assert (drawn != plain).any()
    with pytest.raises(BadLora, match=r"model\.onnx has no slots for LoRAs"):
        fp4trt.generate(svdquant_digits / "model.onnx", tmp_path / "x.png", lora=str(file), **run)
    with pytest.raises(BadLora, match="LoRAs are not fused into codes"):
        fp4trt.generate(slotted, tmp_path / "x.png", lora=str(file), **run)


def test_two_loras_add_up_and_padding_changes_nothing(slotted: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{rank}.safetensors" for rank in (4, 8)]
    for rank, file in zip((4, 8), files, strict=True):
        save_file(_lora(rank), file)
    both = [(files[0], 0.5), (files[1], -1.0)]
    lora_inputs(both, tmp_path / "both", checkpoint=slotted)
    lora_inputs(both, tmp_path / "padded", checkpoint=slotted, rank=40)

    one, other = load_file(tmp_path / "both"), load_file(tmp_path / "padded")

    a, b = f"{SINGLE}.attn.to_q.lora_a", f"{SINGLE}.proj_mlp.lora_b"
    assert (one[a].shape, one[b].shape) == ((24, WIDTH), (4 * WIDTH, 24))
    wanted = sum(
        strength
        * lora[f"transformer.{SINGLE}.proj_mlp.lora_B.weight"].float()
        @ lora[f"transformer.{SINGLE}.proj_mlp.lora_A.weight"].float()
        for lora, strength in ((_lora(4), 0.5), (_lora(8), -1.0))
    )
    assert torch.allclose(one[b].float() @ one[a].float(), wanted, atol=1e-6)
    assert all(
        torch.equal(value.float(), other[name][:24].float() if name.endswith("_a") else other[name][:, :24].float())
        for name, value in one.items()
    )
    assert other[a].shape == (40, WIDTH)


@pytest.mark.slow
def test_every_gate_passes_with_a_lora_in_every_slot(slotted: Path) -> None:
    report = validate(slotted)

    assert report.passed, [gate.line for gate in report.gates if not gate.passed]
    assert not [gate.name for gate in report.gates if gate.was_skipped]


@pytest.mark.slow
def test_the_engine_has_the_same_fp4_gemms_as_without_slots(slotted: Path, tmp_path: Path) -> None:
    """13 groups, as of the graph without slots; two kernels a group, and one for each factor whose rank may change."""
    built = build(slotted, output=tmp_path / "x.engine", shapes="lora_rank=0:16:64")

    assert (built.fp4_gemms, built.fp4_linears, built.lost) == (13, 20, [])
    assert built.profile["lora_rank"] == [0, 16, 64]
    assert built.lora is not None
    assert (built.lora["linears"], built.lora["max_rank"]) == (20, MAX_RANK)
    assert built.lora["kernels"] >= 2 * 13
    assert json.loads(Path(built.manifest).read_text())["lora"] == built.lora
    known = model_of(tmp_path / "x.engine")
    assert (known.family.name, known.recipe, known.has_slots) == ("flux-digits", "svdquant-r8", True)
    assert known.config == model_of(slotted / "model.onnx").config
    assert largest_batch(known.profiles, known.family.input_shapes(known.config), _inputs(slotted)) == 4


def _changed(extra: Tensors) -> Tensors:
    return _lora(4) | extra


REFUSED: dict[str, tuple[Tensors, str]] = {
    "another model": (
        {"transformer.layers.0.attention.to_q.lora_A.weight": torch.zeros(4, 128)},
        "is a LoRA of another model: 0 of its 1 keys fit this FluxTransformer2DModel",
    ),
    "no slot": (
        _changed(_pair("transformer.x_embedder", WIDTH, 16, 4, ("lora_A.weight", "lora_B.weight"))),
        "changes x_embedder.weight, for which a graph has no slot",
    ),
    "a bias": (
        _changed({f"{BLOCK}.attn.to_q.diff_b": torch.zeros(WIDTH)}),
        f"changes {BLOCK}.attn.to_q.bias, for which a graph has no slot",
    ),
    "no product": (
        _changed({f"transformer.{SINGLE}.proj_out.lora_magnitude_vector": torch.ones(WIDTH)}),
        f"changes {SINGLE}.proj_out.weight by what is no product of two factors",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_lora_that_does_not_fit_into_slots_is_refused_in_one_line(
    what: str, slotted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, words = REFUSED[what]
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)

    assert fp4trt.run(["lora", str(file), "-o", str(tmp_path / "x"), "--checkpoint", str(slotted)]) == 2

    told = capsys.readouterr().err.strip()
    assert words in told
    assert "\n" not in told
    assert list(tmp_path.iterdir()) == [file]


def test_a_lora_is_not_put_behind_channels_that_were_scaled(
    slotted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the recipe nvfp4-quality scales them, of which nothing is kept."""
    file = tmp_path / "lora.safetensors"
    save_file(_lora(4), file)
    folder = shutil.copytree(slotted, tmp_path / "folded")
    manifest = load_json(folder / "fp4trt.json")
    method = {"name": "quality", "shift_fold": True, "smooth_fold": False}
    (folder / "fp4trt.json").write_text(json.dumps(manifest | {"recipe": {"name": "mine", "method": method}}))

    with pytest.raises(BadLora, match=r"scales unlike the model, by recipe mine; quantize with shift_fold"):
        lora_inputs(file, tmp_path / "x", checkpoint=folder)

    export(folder, lora_rank=4, force=True)
    told = capsys.readouterr().err
    assert "warning: LoRAs fit into 5 of 20 slots: channels of the others are scaled, by recipe mine;" in told


def test_the_command_tells_ranks_and_replaces_nothing_unasked(
    slotted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "lora.safetensors", tmp_path / "x.safetensors"
    save_file(_changed({"lora_te1_x.alpha": torch.tensor(1.0)}), file)

    assert fp4trt.run(["lora", f"{file}:0.5", "-o", str(output), "--checkpoint", str(slotted)]) == 0
    told = capsys.readouterr().out

    assert "1 keys are left out: lora_te1_" in told
    assert f"8 of 20 slots are used, at lora_rank 8 -> {output}" in told
    with pytest.raises(OutputExists):
        lora_inputs(file, output, checkpoint=slotted)
    with pytest.raises(BadLora, match=r"need factors of rank 8, more than 7"):
        lora_inputs(file, output, checkpoint=slotted, rank=7, force=True)
    with pytest.raises(OutputExists, match="is one of the LoRA files; choose another --output"):
        lora_inputs(file, file, checkpoint=slotted, force=True)
    with pytest.raises(BadLora, match=r"is not made for this graph"):
        GraphTransformer(slotted / "model.onnx", lora=file)


def test_lint_refuses_slots_that_are_not_what_the_metadata_say(slotted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(slotted, tmp_path / "digits")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = {node.name: node for node in graph.graph.node}
    q, k = (nodes[f"{BLOCK}.attn.{name}/lora_b/Transpose"] for name in ("to_q", "to_k"))
    q.input[0], k.input[0] = k.input[0], q.input[0]
    onnx.save(graph, folder / "model.onnx")

    (finding, _) = lint(folder / "model.onnx").findings

    assert (finding.rule, finding.tensor) == ("promise-metadata", "fp4trt.lora")
    assert f"{BLOCK}.attn.to_q has no slot that reads {BLOCK}.attn.to_q.lora_a and" in finding.message
