"""ModelOpt states: the result computes what ModelOpt's own model computes, or the state is refused by name."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.config import RotateConfig
from torch import nn

import fp4trt
from calibration import quantize
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import load, read
from calibration.formats import nvfp4
from calibration.formats.modelopt_backend import SequentialQuantizer, TensorQuantizer, mto, mtq
from calibration.modelopt_states import to_checkpoint
from calibration.modelopt_states.contents import contents_of, tensors_of
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.errors import BadAmax, BadCheckpoint, BadInputs
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import sha256_of

TO_Q = "transformer_blocks.0.attn.to_q"
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])


def _ours(x: torch.Tensor, _block: int, amax: torch.Tensor | None, *_: int) -> torch.Tensor:
    """NVFP4 by the arithmetic of the stored format, in the place of ModelOpt's kernel for a GPU."""
    return nvfp4.fake_quantize(x, nvfp4.global_scale((x.abs().amax() if amax is None else amax).float()))


def _independent(x: torch.Tensor, _block: int, amax: torch.Tensor | None, *_: int) -> torch.Tensor:
    """The same format from its definition, with other roundings on the way."""
    blocks = x.float().reshape(-1, 16)
    g = (blocks.abs().max() if amax is None else amax.float().max()) / 2688
    scales = (blocks.abs().amax(1, keepdim=True) / 6 / g).clamp(2**-9, 448).to(torch.float8_e4m3fn).float() * g
    codes = torch.bucketize((blocks / scales).abs(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]))
    return (GRID[codes] * blocks.sign() * scales).reshape(x.shape).to(x.dtype)


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ModelOpt quantize dynamic blocks without a GPU."""
    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", _ours)


def _call(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    config = load_json(folder / "config.json")
    return family_of(config).example_inputs(config, (1, 16, 8), seed, torch.bfloat16)


def _output(model: nn.Module, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**_call(folder, seed), return_dict=False)[0].float() for seed in (7, 8)])


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _quantized(folder: Path, config: str, filtered: bool) -> nn.Module:
    """Quantize the built-in model as NVIDIA's example does; ``filtered`` switches off all outside the blocks."""
    model = load_source(folder)
    inside = set(family_of(load_json(folder / "config.json")).quantized(load_json(folder / "config.json")))
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        mtq.quantize(model, copy.deepcopy(getattr(mtq, config)), lambda model: model(**_call(folder, 0)))
        if filtered:
            mtq.disable_quantizer(model, lambda name: name.rpartition(".")[0] not in inside)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            quantizer: Any = module.input_quantizer
            quantizer.disable()
    return model


@pytest.fixture(scope="module")
def svdquant(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[nn.Module, Path]]:
    """ModelOpt's SVDQuant of the built-in model, of which all outside the blocks is switched off again; its state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_quant, "dynamic_block_quantize_op", _independent)
        model = _quantized(digits, "NVFP4_SVDQUANT_DEFAULT_CFG", filtered=True)
        state = tmp_path_factory.mktemp("svdquant") / "state.pt"
        mto.save(model, str(state))
        yield model, state


@pytest.fixture(scope="module")
def plain_max(digits: Path) -> nn.Module:
    """ModelOpt's NVFP4 with amax values, of the blocks alone; to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_quant, "dynamic_block_quantize_op", _ours)
        return _quantized(digits, "NVFP4_DEFAULT_CFG", filtered=True)


@pytest.mark.parametrize(
    ("config", "filtered", "limit"),
    [
        ("NVFP4_DEFAULT_CFG", True, 0.0),
        ("NVFP4_DEFAULT_CFG", False, 0.0),
        ("NVFP4_AWQ_LITE_CFG", True, 0.0),
        ("NVFP4_AWQ_LITE_CFG", False, 0.0),
        ("NVFP4_FOUR_OVER_SIX_CFG", True, 0.0),
        ("FP8_DEFAULT_CFG", False, 0.02),  # ModelOpt multiplies by 448 / amax: at a tie another code
        ("NVFP4_FP8_MHA_CONFIG", False, 0.08),  # ModelOpt's torch model does not round what softmax gives
    ],
)
@pytest.mark.slow
def test_the_result_computes_what_modelopts_own_model_computes(
    config: str, filtered: bool, limit: float, digits: Path, tmp_path: Path
) -> None:
    model = _quantized(digits, config, filtered)
    wanted = _output(model, digits)
    mto.save(model, str(tmp_path / "state.pt"))
    result = quantize(digits, tmp_path / "out", modelopt_state=tmp_path / "state.pt", trust=True)
    assert result["modelopt_state"]["difference"] == 0
    assert _error(_output(load(tmp_path / "out"), digits), wanted) <= limit
    held = read(tmp_path / "out")
    scales = {path: float(held.raw(f"{path}.weight_scale")) for path in held.fp8}
    assert scales == {path: float(_of(model, path, "weight").amax.float() / 448) for path in held.fp8}
    for group in held.manifest["groups"]:
        assert len({scales.get(path) for path in group}) == 1


def test_a_branch_and_smoothing_are_kept_of_each_linear_also_of_one_that_was_switched_off_again(
    svdquant: tuple[nn.Module, Path], digits: Path, tmp_path: Path
) -> None:
    model, state = svdquant
    result = quantize(digits, tmp_path / "out", modelopt_state=state, trust=True)
    found, wanted, plain = (_output(each, digits) for each in (load(tmp_path / "out"), model, load_source(digits)))
    # ModelOpt ran with another arithmetic; without a branch the error would be about 1.
    assert _error(found, wanted) < 0.02
    assert _error(found, plain) < 0.05
    held = read(tmp_path / "out")
    linears = {path: held.rank(path) for path in (TO_Q, "x_embedder", "single_transformer_blocks.0.proj_out")}
    assert linears == {TO_Q: 32, "x_embedder": 32, "single_transformer_blocks.0.proj_out": 0}
    assert held.tensors["x_embedder.weight"].dtype == "BF16"
    manifest = load_json(tmp_path / "out" / MANIFEST)
    assert manifest["calibration"] == {"data": "modelopt state", "sha256": sha256_of(state)}
    assert manifest["recipe"]["name"] == result["recipe"] == "modelopt-state"
    assert manifest["recipe"]["method"] == {"name": "modelopt-state", "algorithms": ["svdquant"]}
    assert "sharing_cost" not in manifest


def test_each_linear_keeps_the_scales_of_its_own_quantizers(digits: Path, plain_max: nn.Module, tmp_path: Path) -> None:
    mto.save(plain_max, str(tmp_path / "state.pt"))
    result = quantize(digits, tmp_path / "out", modelopt_state=tmp_path / "state.pt", trust=True)
    held = read(tmp_path / "out")
    for path in (TO_Q, "transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp"):
        for kind, leaf in (("weight", "weight_scale_2"), ("input", "input_scale")):
            amax: Any = plain_max.get_submodule(f"{path}.{kind}_quantizer").amax
            assert float(held.raw(f"{path}.{leaf}")) == float(nvfp4.global_scale(amax.float()))
    assert result["modelopt_state"]["apart"] == 4 + 3  # to_q, to_k and to_v; in a single block with proj_mlp


def _rotated(model: nn.Module) -> None:
    _of(model, TO_Q, "input")._rotate = RotateConfig(enable=True)


def _rotated_and_off(model: nn.Module) -> None:
    _rotated(model)
    _of(model, TO_Q, "input").disable()


def _of(model: nn.Module, path: str, kind: str) -> Any:
    return model.get_submodule(f"{path}.{kind}_quantizer")


def _in(**attributes: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for kind in ("input", "weight"):
            _of(model, TO_Q, kind).set_from_attribute_config(attributes)

    return change


def _in_turn(model: nn.Module) -> None:
    quantizers = [TensorQuantizer(), TensorQuantizer()]
    for quantizer, attributes in zip(
        quantizers, ({"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}), strict=True
    ):
        quantizer.set_from_attribute_config(attributes)
    model.get_submodule(TO_Q).weight_quantizer = SequentialQuantizer(*quantizers)


def _layer_norm_on(model: nn.Module) -> None:
    _of(model, "transformer_blocks.0.norm2", "input").enable()


def _set(kind: str, name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda model: setattr(_of(model, TO_Q, kind), name, value)


def _query_alone(model: nn.Module) -> None:
    quantizer = _of(model, "transformer_blocks.0.attn", "q_bmm")
    quantizer.set_from_attribute_config({"num_bits": (4, 3)})
    quantizer.enable()


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a rotation": (_rotated, r"to_q.input_quantizer rotates its tensor .*; .*quantize without"),
    "a rotation that is off": (_rotated_and_off, r"rotates its tensor"),
    "INT8": (_in(num_bits=8, axis=None, block_sizes=None), r"to_q.input_quantizer is in INT8 with one scale a tensor"),
    "MXFP4": (
        _in(num_bits=(2, 1), block_sizes={-1: 32, "type": "dynamic", "scale_bits": (8, 0)}),
        r"is in MXFP4 in blocks of 32",
    ),
    "FP8 per channel": (_in(num_bits=(4, 3), block_sizes=None, axis=0), r"is in FP8 with one scale a channel"),
    "W4A8": (
        _in_turn,
        r"to_q.weight_quantizer rounds several times: INT4 in blocks of 128 .*, then FP8 with one scale",
    ),
    "weights alone": (
        lambda model: _of(model, TO_Q, "input").disable(),
        r"weight_quantizer .* and input_quantizer off",
    ),
    "a LayerNorm's input": (_layer_norm_on, r"norm2.input_quantizer rounds the input of a LayerNorm to NVFP4.*disable"),
    "a linear's output": (
        lambda model: (_set("output", "_num_bits", (4, 3))(model), _of(model, TO_Q, "output").enable()),
        r"to_q.output_quantizer rounds the output of a linear to FP8",
    ),
    "query alone": (_query_alone, r"attn.q_bmm_quantizer is on, and k_bmm_quantizer off"),
    "what nobody knows": (_set("weight", "_gain", 2.0), r"to_q.weight_quantizer has _gain, which fp4trt does not know"),
    "another backend": (_set("weight", "backend", "mine"), r"computes with the backend 'mine'"),
    "a bias": (_set("input", "_bias", {-1: None}), r"subtracts a bias before it rounds"),
    "a dynamic scale": (_set("input", "_dynamic", True), r"takes its scale from each tensor"),
    "compressed weights": (_set("weight", "_dequantize", True), r"holds compressed values"),
    "the weight scaled": (
        lambda model: setattr(_of(model, TO_Q, "weight"), "pre_quant_scale", torch.ones(128)),
        r"scales the weight by channel at each call",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_checkpoint_has_no_place_for_is_refused_by_name(name: str, plain_max: nn.Module, digits: Path) -> None:
    change, message = REFUSED[name]
    model, config = copy.deepcopy(plain_max), load_json(digits / "config.json")
    change(model)
    with pytest.raises(BadCheckpoint, match=message):
        contents_of(model, family_of(config), config, "state.pt")


def test_a_quantizer_that_was_never_calibrated_is_refused(plain_max: nn.Module, digits: Path) -> None:
    model, config = copy.deepcopy(plain_max), load_json(digits / "config.json")
    _of(model, TO_Q, "input").reset_amax()
    with pytest.raises(BadAmax, match=r"to_q.input_quantizer has amax None.*calibrate first"):
        contents_of(model, family_of(config), config, "state.pt")


def test_a_state_with_a_rotation_ends_the_command_with_status_2(
    digits: Path, plain_max: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a state holds an object of ModelOpt's, which torch reads only of a file that is trusted."""
    model = copy.deepcopy(plain_max)
    _rotated(model)
    mto.save(model, str(tmp_path / "state.pt"))
    arguments = ["quantize", str(digits), "-o", str(tmp_path / "out"), "--modelopt-state", str(tmp_path / "state.pt")]
    assert fp4trt.run([*arguments, "--trust"]) == 2
    assert "to_q.input_quantizer rotates its tensor" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_result_that_computes_something_else_gets_no_name(
    digits: Path,
    svdquant: tuple[nn.Module, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def forgetful(*given: Any) -> dict[str, torch.Tensor]:
        return {name: value for name, value in tensors_of(*given).items() if not name.startswith(f"{TO_Q}.svdquant_")}

    monkeypatch.setattr(to_checkpoint, "tensors_of", forgetful)
    arguments = ["quantize", str(digits), "-o", str(tmp_path / "out"), "--modelopt-state", str(svdquant[1]), "--trust"]
    assert fp4trt.run(arguments) == 1
    assert "does not compute what the model of state.pt computes: relative difference" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (
            {"method": {"name": "ptq"}},
            BadCheckpoint,
            r"proj_out is not quantized, which the recipe mine wants in NVFP4",
        ),
        (
            {"method": {"name": "ptq"}, "formats": {"rules": [{"linears": "single*.proj_out", "format": "bf16"}]}},
            BadCheckpoint,
            r"it was calibrated by ModelOpt's svdquant, and the recipe mine is plain PTQ; leave --recipe out",
        ),
        (
            {
                "method": {"name": "svdquant", "rank": 8},
                "formats": {"rules": [{"linears": "single*.proj_out", "format": "bf16"}]},
            },
            BadCheckpoint,
            r"its branches have rank 32, and the recipe mine asks for 8",
        ),
        ({"method": {"name": "quality"}}, BadInputs, r"whose method quality is not ModelOpt's"),
    ],
)
def test_a_recipe_that_says_anything_else_than_the_state_is_refused(
    digits: Path,
    recipe: dict[str, Any],
    error: type[Exception],
    message: str,
    svdquant: tuple[nn.Module, Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"name": "mine", **recipe}), encoding="utf-8")
    with pytest.raises(error, match=message):
        quantize(digits, tmp_path / "out", recipe=tmp_path / "mine.yaml", modelopt_state=svdquant[1], trust=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [1, 2], r"holds list; expected a file that modelopt.torch.opt.save wrote"),
        (lambda found: found["modelopt_state"], r"holds ModelOpt's state without the weights"),
        (
            lambda found: {**found, "model_state_dict": {f"m.{k}": v for k, v in found["model_state_dict"].items()}},
            r"context_embedder.bias is absent, and \[128\] in the checkpoint; expected a state of this model",
        ),
        (
            lambda found: {
                **found,
                "modelopt_state": {
                    **found["modelopt_state"],
                    "modelopt_state_dict": [
                        *found["modelopt_state"]["modelopt_state_dict"],
                        ("real_quantize", {"config": {}, "metadata": {}}),
                    ],
                },
            },
            r"ModelOpt did real_quantize to the model; expected quantization and calibration alone",
        ),
    ],
)
def test_a_file_that_is_no_state_of_this_model_is_refused(
    digits: Path, change: Callable[[Any], Any], message: str, svdquant: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    torch.save(change(torch.load(svdquant[1], weights_only=False)), tmp_path / "other.pt")
    with pytest.raises(BadCheckpoint, match=message):
        quantize(digits, tmp_path / "out", modelopt_state=tmp_path / "other.pt", trust=True)
