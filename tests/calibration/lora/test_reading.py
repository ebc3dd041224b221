"""What a LoRA file may call its modules, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calibration.lora.fusing import fused_tensors
from calibration.lora.names import names_of
from calibration.lora.option import parse_lora
from calibration.lora.reading import read_lora
from fp4trt.errors import BadCheckpoint, BadLora, BadOption
from fp4trt.safetensors_file import hold
from tests.calibration.lora.made_loras import (
    KOHYA,
    PEFT,
    Tensors,
    described,
    fused,
    normal,
    pairs,
    read,
    saved,
    weights,
)
from tests.frame.diffusers_models import MODELS

OWN = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "norm_out.linear", "x_embedder"]
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")

NAMINGS: dict[str, Callable[[str], str]] = {
    "DiffSynth": lambda key: key.replace(".weight", ".default.weight"),
    "peft": lambda key: f"base_model.model.{key}",
    "Mochi": lambda key: key.removesuffix(".weight"),
    "kohya of diffusers": lambda key: "lora_unet_" + _flat(key).replace("_A.", "_down.").replace("_B.", "_up."),
    "OneTrainer": lambda key: "lora_transformer_" + _flat(key).replace("_A.", "_down.").replace("_B.", "_up."),
    "old diffusers": lambda key: "unet." + key.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up."),
    "transformers": lambda key: key.replace("_A.", "_linear_layer.down.").replace("_B.", "_linear_layer.up."),
}


def _flat(key: str) -> str:
    module, _, end = key.partition(".lora_")
    return f"{module.replace('.', '_')}.lora_{end}"


def test_a_weight_and_its_bias_may_be_changed_under_two_names(tmp_path: Path) -> None:
    """Merged files of two tools have that; only one tensor may not be changed twice."""
    bias = {f"diffusion_model.{OWN[0]}.diff_b": torch.ones(32)}

    got = fused("flux", (saved(tmp_path, pairs("flux", OWN[:1], "transformer.") | bias), 1.0))

    assert got.keys() == {f"{OWN[0]}.weight", f"{OWN[0]}.bias"}
    assert torch.equal(got[f"{OWN[0]}.bias"], weights("flux")[f"{OWN[0]}.bias"] + 1)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_naming_of_diffusers_modules_means_the_same_as_diffusers_own(naming: str, tmp_path: Path) -> None:
    tensors = pairs("flux", OWN, "")
    own = saved(tmp_path, {f"transformer.{key}": value for key, value in tensors.items()}, "own")
    other = saved(tmp_path, {NAMINGS[naming](key): value for key, value in tensors.items()}, "other")

    expected, got = fused("flux", (own, 0.7)), fused("flux", (other, 0.7))

    assert len(got) == len(OWN)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize(
    ("prefix", "ends", "flat"),
    [
        ("diffusion_model.", PEFT, False),
        ("base_model.model.", PEFT, False),
        ("lora_unet_", KOHYA, True),
        ("", PEFT, False),
    ],
)
def test_a_module_of_single_files_is_several_of_diffusers(
    prefix: str, ends: tuple[str, str], flat: bool, tmp_path: Path
) -> None:
    """Rows of up belong to the parts; those of the last norm lie the other way round."""
    modules = ["double_blocks.0.txt_attn.qkv", "single_blocks.1.linear1", "final_layer.adaLN_modulation.1"]
    single = pairs("flux", modules, prefix, ends, flat=flat)
    down, up = list(single.values())[::2], list(single.values())[1::2]
    block = "single_transformer_blocks.1"
    parts = {
        f"transformer_blocks.0.attn.add_{part}_proj": (down[0], rows)
        for part, rows in zip("qkv", up[0].chunk(3), strict=True)
    }
    parts |= {f"{block}.attn.to_{part}": (down[1], rows) for part, rows in zip("qkv", up[1][:96].chunk(3), strict=True)}
    parts |= {f"{block}.proj_mlp": (down[1], up[1][96:])}
    parts |= {"norm_out.linear": (down[2], torch.cat([up[2][32:], up[2][:32]]))}
    own = {
        f"transformer.{name}.lora_{side}.weight": value
        for name, pair in parts.items()
        for side, value in zip("AB", pair, strict=True)
    }

    expected = fused("flux", (saved(tmp_path, own, "own"), 1.0))
    got = fused("flux", (saved(tmp_path, single, "single"), 1.0))

    assert got.keys() == expected.keys() == {f"{name}.weight" for name in parts}
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


@pytest.mark.parametrize("name", MODELS)
def test_no_two_modules_have_one_name_without_dots(name: str) -> None:
    family, config = described(name)
    names = names_of(family, config)

    originals = [original for module in names.values() for original in (module.weight, module.bias) if original]
    assert {part.name for original in originals for part in original.parts} == weights(name).keys()


def test_keys_of_text_encoders_are_counted(tmp_path: Path) -> None:
    text = {f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1.alpha": torch.tensor(1.0) for i in range(3)}
    text |= {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": normal(4, 8)}

    lora = read("flux", saved(tmp_path, pairs("flux", OWN, "transformer.") | text))

    assert lora.left_out == {"lora_te1_": 3, "text_encoder.": 1}
    assert lora.kinds == {"LoRA": len(OWN)}


def test_norms_of_a_control_lora_replace_the_models(tmp_path: Path) -> None:
    scale = normal(16)
    path = saved(tmp_path, {"double_blocks.0.img_attn.norm.query_norm.scale": scale})

    assert torch.equal(fused("flux", (path, 0.3))["transformer_blocks.0.attn.norm_q.weight"], scale.bfloat16())


def test_changes_of_weights_and_biases_are_added(tmp_path: Path) -> None:
    """As ComfyUI names them, of a norm and of a parameter too."""
    changes = {"blocks.0.modulation.diff": (1, 6, 32), "blocks.1.norm3.diff": (32,), "blocks.1.norm3.diff_b": (32,)}
    tensors = {f"diffusion_model.{key}": normal(*shape) for key, shape in changes.items()}
    names = ("blocks.0.scale_shift_table", "blocks.1.norm2.weight", "blocks.1.norm2.bias")

    got = fused("wan", (saved(tmp_path, tensors), 0.5))

    assert got.keys() == set(names)
    for name, value in zip(names, tensors.values(), strict=True):
        assert torch.allclose(got[name].float(), weights("wan")[name].float() + 0.5 * value, atol=2e-2)


def test_peft_s_own_files_are_scaled_by_the_config_beside_them(tmp_path: Path) -> None:
    tensors = pairs("flux", OWN[:1], "base_model.model.")
    folder = tmp_path / "adapter"
    folder.mkdir()
    path = saved(folder, tensors, "adapter_model")
    plain = fused("flux", (path, 2.0))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 5, "lora_alpha": 10}))

    assert torch.equal(fused("flux", (path, 1.0))[f"{OWN[0]}.weight"], plain[f"{OWN[0]}.weight"])


def test_makers_of_tensors_can_be_sent_to_another_process(tmp_path: Path) -> None:
    path = saved(tmp_path, pairs("flux", OWN, "transformer."))
    stored = {name: hold(name, value) for name, value in weights("flux").items()}
    file = read_lora(path, *described("flux"))
    makers = fused_tensors(stored, [(file, 1.0), (file, 0.0)], described("flux")[0])

    sent = pickle.loads(pickle.dumps(makers))

    expected = fused("flux", (path, 1.0))
    assert {name: make().dtype for name, make in sent.items()} == dict.fromkeys(expected, torch.bfloat16)
    assert all(torch.equal(make(), expected[name]) for name, make in sent.items())


def _without_up() -> Tensors:
    return {
        key: value for key, value in pairs("flux", OWN, "transformer.").items() if "norm_out.linear.lora_B" not in key
    }


def _too_wide() -> Tensors:
    tensors = pairs("flux", OWN, "transformer.")
    return tensors | {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": normal(5, 48)}


BAD: dict[str, tuple[Callable[[], Tensors], str]] = {
    "another model": (
        lambda: pairs("qwen-image", [f"transformer_blocks.0.{m}" for m in ("attn.to_q", "img_mod.1", "txt_mod.1")], ""),
        "is a LoRA of another model: 2 of its 6 keys fit this FluxTransformer2DModel, and transformer_blocks.0.",
    ),
    "no LoRA": (lambda: {"anything.weight": normal(3)}, "0 of its 1 keys fit"),
    "one key too many": (
        lambda: pairs("flux", OWN, "transformer.") | {"transformer.nothing.lora_A.weight": normal(2, 2)},
        "transformer.nothing.lora_A.weight, of 9 keys, fit nothing of this FluxTransformer2DModel",
    ),
    "half a pair": (_without_up, "transformer.norm_out.linear.lora_A.weight: expected down + up of norm_out.linear"),
    "the bias of half a pair": (
        lambda: (
            pairs("flux", OWN, "")
            | {
                "transformer_blocks.0.attn.to_k.lora_B.bias": normal(32),
                "transformer_blocks.0.attn.to_k.alpha": normal(1),
            }
        ),
        "transformer_blocks.0.attn.to_k.lora_B.bias is the bias of a pair that is not there",
    ),
    "a number for a matrix": (
        lambda: (
            pairs("flux", OWN, "")
            | {f"transformer_blocks.0.attn.to_k.lokr_w{half}": torch.tensor(1.0) for half in (1, 2)}
        ),
        "transformer_blocks.0.attn.to_k.lokr_w1 (its shape is not that of",
    ),
    "another shape": (_too_wide, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight (its shape is not that of"),
    "two adapters": (
        lambda: pairs("flux", OWN, "") | pairs("flux", OWN, "", DEFAULT),
        "are one tensor of two LoRAs; expected one LoRA",
    ),
    "two names": (
        lambda: pairs("flux", OWN[:1], "") | pairs("flux", OWN[:1], "transformer."),
        "changes transformer_blocks.0.attn.to_q.weight under two names",
    ),
    "a bias that is none": (
        lambda: pairs("flux", OWN, "") | {"transformer_blocks.0.attn.norm_q.diff_b": normal(16)},
        "changes the bias of transformer_blocks.0.attn.norm_q, which has none in this model",
    ),
    "a whole weight": (
        lambda: pairs("flux", OWN, "") | {"transformer_blocks.0.attn.to_k.weight": normal(32, 32)},
        "transformer_blocks.0.attn.to_k.weight is a whole weight and no change of one",
    ),
    "another kind": (
        lambda: pairs("flux", OWN, "") | {"lycoris_nothing.lambda_layer": normal(1, 4)},
        "T-LoRA, whose rank changes with the timestep",
    ),
    "a text encoder's": (lambda: {"lora_te1_x.alpha": torch.tensor(1.0)}, "changes nothing of a transformer"),
    "another size": (
        lambda: pairs("flux", OWN, "") | {"x_embedder.reshape_weight": torch.tensor([32, 128])},
        "x_embedder.reshape_weight widens x_embedder [32, 16] to [32, 128]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, expected = BAD[case]
    path = saved(tmp_path, make())

    with pytest.raises(BadLora) as error:
        read("flux", path)

    assert expected in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_that_are_none_and_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    tensors = pairs("flux", OWN, "transformer.")
    tensors["transformer.x_embedder.lora_B.weight"][0, 0] = torch.nan
    path = saved(tmp_path, tensors)
    (tmp_path / "x.pt").write_bytes(b"PK")

    with pytest.raises(BadLora, match=r"transformer.x_embedder.lora_B.weight holds NaN or infinity"):
        fused("flux", (path, 1.0))
    with pytest.raises(BadCheckpoint):
        read("flux", tmp_path / "x.pt")


def test_a_strength_follows_the_last_colon(tmp_path: Path) -> None:
    odd = tmp_path / "a:1"
    odd.touch()

    assert parse_lora("style.safetensors") == (Path("style.safetensors"), 1.0)
    assert parse_lora("style.safetensors:-0.5") == (Path("style.safetensors"), -0.5)
    assert parse_lora(r"C:\LoRA\style.safetensors") == (Path(r"C:\LoRA\style.safetensors"), 1.0)
    assert parse_lora(r"C:\LoRA\style.safetensors:1e-1") == (Path(r"C:\LoRA\style.safetensors"), 0.1)
    assert parse_lora(str(odd)) == (odd, 1.0)
    for bad in (f"{odd}:0,8", ":0.5", "style.safetensors:nan", ""):
        with pytest.raises(BadOption, match="expected"):
            parse_lora(bad)
