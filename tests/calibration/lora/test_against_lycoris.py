"""Fused weights, bit for bit against the LyCORIS package's own merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import modules as lycoris
from torch import nn

from tests.calibration.lora.made_loras import Tensors, fused, normal, saved, weights

FUSED = "lora_unet_double_blocks_0_img_attn_qkv"
"""A module of FLUX.1 whose rows are those of three tensors of diffusers."""

PARTS = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]


def _linear() -> nn.Linear:
    """Return the fused linear of a small FLUX.1."""
    linear = nn.Linear(32, 96).requires_grad_(False)
    linear.weight = nn.Parameter(torch.cat([weights("flux")[f"{part}.weight"] for part in PARTS]), False)
    linear.bias = nn.Parameter(torch.cat([weights("flux")[f"{part}.bias"] for part in PARTS]), False)
    return linear


def _state(cls: Any, lora_dim: int = 4, alpha: float = 4, **options: Any) -> Callable[[], Tensors]:
    """Return what makes the tensors that LyCORIS saves of a module, filled with random numbers."""

    def make() -> Tensors:
        state = cls("", _linear().float(), lora_dim=lora_dim, alpha=alpha, **options).state_dict()
        return {
            key: value if value.dim() == 0 else (1 if key in ("dora_scale", "rescale") else 0) + normal(*value.shape)
            for key, value in state.items()
        }

    return make


DORA = {"weight_decompose": True}
KINDS: dict[str, Callable[[], Tensors]] = {
    "DoRA": _state(lycoris.LoConModule, **DORA),
    "LoHa": _state(lycoris.LohaModule),
    "LoHa with DoRA": _state(lycoris.LohaModule, **DORA),
    "LoKr": _state(lycoris.LokrModule, factor=2),
    "LoKr of two whole factors": _state(lycoris.LokrModule, full_matrix=True),
    "LoKr of two products": _state(lycoris.LokrModule, 2, 2, decompose_both=True),
    "LoKr with DoRA": _state(lycoris.LokrModule, factor=2, **DORA),
    "GLoRA": _state(lycoris.GLoRAModule),
    "full": _state(lycoris.FullModule),
    "OFT": lambda: _state(lycoris.DiagOFTModule, rescaled=True)() | {"alpha": torch.tensor(0.001)},
    "BOFT": lambda: _state(lycoris.ButterflyOFTModule, 6, rescaled=True)() | {"alpha": torch.tensor(0.001)},
}


def _merged(state: Tensors, strength: float) -> nn.Linear:
    linear = _linear()
    cls, tensors = lycoris.get_module({f"m.{key}": value for key, value in state.items()}, "m")
    lycoris.make_module(cls, tensors, "m", linear).merge_to(strength)
    return linear


def _apart(linear: nn.Linear) -> Tensors:
    """Return a fused linear's tensors by diffusers' names."""
    sides = {"weight": linear.weight.chunk(3), "bias": linear.bias.chunk(3)}
    return {f"{part}.{side}": rows[i] for side, rows in sides.items() for i, part in enumerate(PARTS)}


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_a_fused_module_is_merged_as_lycoris_merges_it(kind: str, strength: float, tmp_path: Path) -> None:
    state = KINDS[kind]()
    path = saved(tmp_path, {f"{FUSED}.{key}": value for key, value in state.items()})

    got, expected = fused("flux", (path, strength)), _apart(_merged(state, strength))

    assert {name.rpartition(".")[2] for name in got} == ({"weight", "bias"} if kind == "full" else {"weight"})
    assert [name for name, value in got.items() if not torch.equal(value, expected[name])] == []
    assert not any(torch.equal(value, weights("flux")[name]) for name, value in got.items())


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_alpha_scales_a_product_once(kind: str, tmp_path: Path) -> None:
    """LyCORIS' ``merge_to`` does it twice, and its forward, in which such a file was trained, once."""
    state = KINDS[kind]() | {"alpha": torch.tensor(1.5)}
    path = saved(tmp_path, {f"{FUSED}.{key}": value for key, value in state.items()})
    linear = _linear()
    cls, tensors = lycoris.get_module({f"m.{key}": value for key, value in state.items()}, "m")
    module: Any = lycoris.make_module(cls, tensors, "m", linear).to(torch.bfloat16)

    linear.weight.data += module.get_weight(linear.weight.shape).detach() * 0.7

    expected = _apart(linear)
    assert all(torch.equal(value, expected[name]) for name, value in fused("flux", (path, 0.7)).items())


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_scales_columns_or_rows(on_input: bool, tmp_path: Path) -> None:
    """LyCORIS cannot make such a module from a file, but merges it."""
    linear = _linear()
    module = lycoris.IA3Module("", linear, train_on_input=on_input)
    nn.init.normal_(module.weight)
    path = saved(tmp_path, {f"{FUSED}.{key}": value.detach().clone() for key, value in module.state_dict().items()})
    module.merge_to(0.7)

    expected = _apart(linear)
    assert all(torch.equal(value, expected[name]) for name, value in fused("flux", (path, 0.7)).items())


@pytest.mark.parametrize("kind", ["LoCon", "DoRA of columns", "norm"])
def test_a_module_that_lycoris_wraps_is_merged_as_lycoris_merges_it(kind: str, tmp_path: Path) -> None:
    name = PARTS[0]
    if kind == "norm":  # of FLUX.1, which has none with a weight that LyCORIS knows
        name, norm = "transformer_blocks.0.attn.norm_q", nn.LayerNorm(16)
        module, layer = lycoris.NormModule("", norm), norm
        base = weights("flux")[f"{name}.weight"]
    else:
        layer = nn.Linear(32, 32)
        options = {"weight_decompose": True, "wd_on_out": False} if kind != "LoCon" else {}
        module = lycoris.LoConModule("", layer, lora_dim=6, alpha=4, **options)
        base = weights("flux")[f"{name}.weight"]
    layer.bfloat16().requires_grad_(False).weight.copy_(base)
    for value in module.parameters():
        nn.init.normal_(value, 0.2, 0.2)
    kept = {key: value.detach().clone() for key, value in module.state_dict().items() if key != "b_norm"}
    path = saved(tmp_path, {f"lycoris_{name.replace('.', '_')}.{key}": value for key, value in kept.items()})
    module.merge_to(0.7)

    got = fused("flux", (path, 0.7))
    assert got.keys() == {f"{name}.weight"}
    assert torch.equal(got[f"{name}.weight"], layer.weight)
    assert not torch.equal(layer.weight, base)
