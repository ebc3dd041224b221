"""Every tensor of a quantized checkpoint counts: all verbs read the same function, or refuse it by name."""

from __future__ import annotations

import collections
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exporter
import onnx_functions
import trt_build
from calibration import quantize
from calibration.checkpoints.plain import load_source, model_class
from calibration.checkpoints.quantized import load, plain_config, read
from calibration.inputs.captured import save_inputs
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from onnx_functions.inspection.inspect import describe
from onnx_functions.linting import lint
from tests.frame import every_tensor

pytestmark = pytest.mark.slow

WEIGHTS = every_tensor.WEIGHTS
FAKE_QUANTIZED: dict[str, torch.Tensor] = {}
"""What ModelOpt's own fake-quantized model gave on the first call, by kind."""

KINDS = ("ptq", "quality", "svdquant", "fp8", "mixed", "modelopt-svdquant", "modelopt-attention")
ALIKE = ("quality", "svdquant", "fp8")
"""Whose tensors are of the kinds that another one has, too."""

RECIPES: dict[str, dict[str, Any]] = {
    "ptq": {"method": {"name": "ptq"}},
    "quality": {"method": {"name": "quality", "sequential": False, "descent_sweeps": 1}},
    "svdquant": {"method": {"name": "svdquant", "rank": 8}},
    "fp8": {"method": {"name": "ptq"}, "formats": {"default": "fp8"}},
    "mixed": {
        "method": {"name": "ptq"},
        "attention": "fp8",
        "formats": {"default": "nvfp4", "rules": [{"linears": "*norm*", "format": "fp8"}]},
    },
}


@pytest.fixture(scope="module")
def source(tiny_flux: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("every") / "flux")


@pytest.fixture(scope="module")
def calls(source: Path) -> list[dict[str, torch.Tensor]]:
    config = load_json(source / "config.json")
    return [family_of(config).example_inputs(config, (1, 36, 8), seed, torch.bfloat16) for seed in range(3)]


@pytest.fixture(scope="module")
def checkpoints(
    source: Path, calls: list[dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One checkpoint of each kind, none exported."""
    folder = tmp_path_factory.mktemp("kinds")
    save_inputs(folder / "inputs.safetensors", calls)
    for kind, recipe in RECIPES.items():
        (folder / f"{kind}.yaml").write_text(json.dumps({"name": kind, **recipe}), encoding="utf-8")
        quantize(source, folder / kind, recipe=folder / f"{kind}.yaml", calibration=folder / "inputs.safetensors")
    for kind, config in (("svdquant", "NVFP4_SVDQUANT_DEFAULT_CFG"), ("attention", "NVFP4_FP8_MHA_CONFIG")):
        FAKE_QUANTIZED[f"modelopt-{kind}"] = modelopt_export(source, calls, config, folder / f"modelopt-{kind}")
    return {kind: folder / kind for kind in KINDS}


def modelopt_export(source: Path, calls: list[dict[str, torch.Tensor]], config: str, directory: Path) -> torch.Tensor:
    """Quantize and export with ModelOpt alone, as NVIDIA's example does; return its output on the first call."""
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization import tensor_quant

    from calibration.formats import nvfp4
    from calibration.formats.modelopt_backend import mtq

    def on_the_cpu(x: torch.Tensor, _block: object, amax: torch.Tensor | None, *_: object) -> torch.Tensor:
        largest = x.abs().amax() if amax is None or not amax.numel() else amax.max()
        return nvfp4.fake_quantize(x, nvfp4.global_scale(largest.float()))

    outside = re.compile(r".*(time_text_embed|context_embedder|x_embedder|norm_out).*|^proj_out.*")
    model = load_source(source)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode(False), torch.no_grad():
        patch.setattr(tensor_quant, "dynamic_block_quantize_op", on_the_cpu)  # ModelOpt's own is a Triton kernel
        mtq.quantize(model, getattr(mtq, config), lambda m: [m(**call, return_dict=False) for call in calls])
        mtq.disable_quantizer(model, lambda name: outside.match(name) is not None)
        output = model(**calls[0], return_dict=False)[0].float()
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=directory)
    return output


@pytest.fixture(scope="module")
def exported(checkpoints: dict[str, Path]) -> dict[str, Path]:
    for kind, folder in checkpoints.items():
        if kind != "quality":
            exporter.export(folder)
    # The same tensors with other values: its graph is that of plain rounding, but for the recipe in the metadata.
    shutil.copy(checkpoints["ptq"] / "model.onnx", checkpoints["quality"])
    return checkpoints


def verbs(folder: Path) -> dict[str, Callable[[], object]]:
    """Return what reads a folder that holds a quantized checkpoint and a graph, beside `load`."""
    return {
        "inspect": lambda: describe(folder),
        "export": lambda: exporter.export(folder, folder / "again"),
        "validate": lambda: onnx_functions.validate(folder),
        "build": lambda: trt_build.build(folder, output=folder / "x.engine"),
    }


def refusal(verb: Callable[[], object]) -> str | None:
    """Return the one line with which a verb refuses its input, None where it takes it."""
    try:
        verb()
    except Exception as error:
        if getattr(error, "exit_code", None) != 2:
            raise
        return str(error)
    return None


def assert_same_function(folder: Path, tensors: Mapping[str, Any], call: Mapping[str, torch.Tensor]) -> None:
    """Assert that what is loaded computes what the reading written apart says, and that inspect says its formats."""
    config = load_json(folder / "config.json")
    with torch.device("meta"):
        plain = model_class(family_of(config)).from_config(plain_config(config))
    state = {name: torch.from_numpy(np.array(value)) for name, value in every_tensor.plain_weights(tensors).items()}
    plain.load_state_dict(state, strict=True, assign=True)
    wide = {name: value.float() for name, value in call.items()}
    with torch.inference_mode():
        wanted = plain.eval()(**wide, return_dict=False)[0]
        found = load(folder, torch.float32, quantize_activations=False)(**wide, return_dict=False)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert {row["path"]: row["format"] for row in describe(folder)["linears"]} == every_tensor.formats(tensors)
    checkpoint = read(folder)
    for path in checkpoint.fp8_attentions:
        for name in "qkv":
            amax = tensors.get(f"{path}.{name}_bmm_quantizer._amax")
            scale = amax.floats.reshape(()) / np.float32(448) if amax else tensors[f"{path}.{name}_scale"].floats
            assert float(checkpoint.tensor(f"{path}.{name}_scale")) == float(scale.reshape(()))


@pytest.fixture
def counts() -> Iterator[collections.Counter[str]]:
    found: collections.Counter[str] = collections.Counter()
    yield found
    print("\n" + ", ".join(f"{count} {what}" for what, count in sorted(found.items())), end=" ")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.thorough) if kind in ("quality", "svdquant", "fp8") else kind
        for kind in KINDS
    ],
)
def test_a_mutation_of_one_tensor_is_read_alike_by_all_verbs_or_refused_by_name(
    kind: str,
    exported: dict[str, Path],
    calls: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    counts: collections.Counter[str],
) -> None:
    folder = shutil.copytree(exported[kind], tmp_path / "mutated")
    whole, refusals = every_tensor.read_file(exported[kind] / WEIGHTS), 0
    for mutation in every_tensor.mutations(whole):
        every_tensor.write_file(folder / WEIGHTS, mutation.tensors)
        refused = refusal(lambda: load(folder))
        told = f"{kind}: {mutation.kind} {mutation.name}"
        if refused is None:
            counts[f"{mutation.kind}: the same function"] += 1
            assert_same_function(folder, mutation.tensors, calls[0])
            assert not lint(folder).passed, f"{told}: the graph of before passes"
            continue
        counts[f"{mutation.kind}: refused"] += 1
        stem = mutation.name.rpartition(".")[0] or mutation.name
        names = {mutation.name, stem, *(mutation.tensors.keys() - whole.keys())}
        told_by = verbs(folder)
        if refusals > len(told_by) * 4:  # all verbs read a checkpoint by one account: from here on they take turns
            told_by = dict([list(told_by.items())[refusals % len(told_by)]])
        refusals += 1
        lines = {"load": refused, **{name: refusal(verb) for name, verb in told_by.items()}}
        for name, line in lines.items():
            assert line is not None, f"{told}: {name} takes it, load says: {refused}"
            assert any(each in line for each in names), f"{told}: {name} says: {line}"


def test_there_are_at_least_five_hundred_mutations(exported: dict[str, Path]) -> None:
    tensors = (every_tensor.read_file(folder / WEIGHTS) for folder in exported.values())
    assert sum(1 for each in tensors for _ in every_tensor.mutations(each)) >= 500


def legal_everywhere(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with its rest in FP16 and FP32, and smoothing and a branch on a linear of each format."""
    changed = {}
    for name, tensor in tensors.items():
        dtype = "F32" if "norm_q" in name else "F16"
        changed[name] = every_tensor.made(dtype, tensor.values) if tensor.dtype == "BF16" else tensor
    weights = every_tensor.plain_weights(tensors)
    numbers = np.random.default_rng(0)
    for path in ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.norm1.linear", "x_embedder"):
        rows, columns = weights[f"{path}.weight"].shape
        changed[f"{path}.pre_quant_scale"] = every_tensor.made("BF16", numbers.uniform(0.5, 2, columns))
        changed[f"{path}.svdquant_lora_a"] = every_tensor.made("F16", numbers.standard_normal((4, columns)) / 8)
        changed[f"{path}.svdquant_lora_b"] = every_tensor.made("BF16", numbers.standard_normal((rows, 4)) / 8)
    return changed


@pytest.mark.parametrize("kind", ["modelopt-svdquant", "modelopt-attention", "mixed"])
def test_what_is_legal_outside_our_own_selection_walks_the_whole_road(
    kind: str, source: Path, exported: dict[str, Path], calls: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported[kind], tmp_path / kind)
    if kind in FAKE_QUANTIZED:
        with torch.inference_mode():
            plain, ours = (
                model(**calls[0], return_dict=False)[0].float() for model in (load_source(source), load(folder))
            )
        theirs = float((FAKE_QUANTIZED[kind] - plain).norm() / plain.norm())
        # Its export gives q, k and v one scale, so that single codes differ from those of the model before it.
        assert float((ours - plain).norm() / plain.norm()) < 1.5 * theirs < 0.2
    tensors = every_tensor.read_file(folder / WEIGHTS)
    if kind == "mixed":
        tensors = legal_everywhere(tensors)
        every_tensor.write_file(folder / WEIGHTS, tensors)
        (folder / "fp4trt.json").unlink()  # whose hashes are of other files
        found = exporter.export(folder, force=True)
        assert found["copied_because"] == "weights stored as F16, F32 are rounded to BF16"
    assert_same_function(folder, tensors, calls[0])
    report = onnx_functions.validate(folder)
    assert report.passed, [gate.line for gate in report.failures]
    built = trt_build.build(folder, output=folder / "x.engine")
    checkpoint = read(folder)
    count = 19 if kind.startswith("modelopt-svd") else 20  # ModelOpt's default leaves a block's proj_out in BF16
    assert built["quantized_linears"] == len(checkpoint.quantized) + len(checkpoint.fp8) == count
    assert (built["lost"], built["lost_attentions"]) == ([], [])
    assert built["quantized_attentions"] == (0 if kind == "modelopt-svdquant" else 2)
    assert (built["branch"] or {}).get("linears", 0) == {"modelopt-svdquant": 28, "mixed": 3}.get(kind, 0)
