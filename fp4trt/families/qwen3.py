"""Qwen3 as a text encoder (Z-Image, FLUX.2 klein), in BF16."""

from __future__ import annotations

from typing import Final

from fp4trt.families.config import problem_of_sizes
from fp4trt.families.family import Config, Family, Group, Stack
from fp4trt.families.shapes import Shapes
from fp4trt.families.text_encoders import DIMS, INPUTS, is_class

__all__ = ["COMPONENTS"]

_SIZES: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"
)  # fmt: skip

_FIXED: Final = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
"""What every published text encoder has."""


class _ReadLayers(Stack):
    """The layers whose results are read: all but the last."""

    def blocks(self, config: Config) -> tuple[str, ...]:
        """Return the module paths of those layers, in the order in which they run."""
        return super().blocks(config)[:-1]


_LAYERS: Final = _ReadLayers(
    path="model.layers",
    count="num_hidden_layers",
    groups=(
        Group("T", tuple(f"self_attn.{leaf}_proj" for leaf in "qkv")),
        Group("T", ("self_attn.o_proj",)),
        Group("T", ("mlp.gate_proj", "mlp.up_proj")),
        Group("T", ("mlp.down_proj",)),
    ),
    attentions=("self_attn",),
    masked=("self_attn",),
    unused_in_last=("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
    equal=False,
)


def _problem(config: Config) -> str | None:
    if (wrong := problem_of_sizes(config, _SIZES, _LAYERS.count)) is not None:
        return wrong
    if config["num_hidden_layers"] % 4:
        return f"num_hidden_layers is {config['num_hidden_layers']}, expected a multiple of 4"
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % shared:
        return f"num_attention_heads is {heads}, expected a multiple of num_key_value_heads, {shared}"
    if config["head_dim"] % 2:
        return f"head_dim is {config['head_dim']}, expected an even number"
    for key, wanted in _FIXED.items():
        if config.get(key, wanted) != wanted:
            return f"{key} is {config[key]!r}, expected {wanted!r}"
    return _problem_of_positions(config)


def _problem_of_positions(config: Config) -> str | None:
    """Return what is wrong with the rotary positions, which older configs describe by ``rope_scaling``."""
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key) or {}
        kind = given.get("rope_type", given.get("type", "default")) if isinstance(given, dict) else given
        if kind != "default":
            return f"the rope_type of {key} is {kind!r}, expected 'default'"
    return None


def _state(config: Config) -> Shapes:
    width, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    inner, shared = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = Shapes({"model.embed_tokens.weight": (config["vocab_size"], width)})
    for path in (f"{_LAYERS.path}.{index}" for index in range(config[_LAYERS.count])):
        shapes.linear(f"{path}.self_attn.q_proj", inner, width, bias=False)
        shapes.linears(f"{path}.self_attn", shared, width, "k_proj", "v_proj", bias=False)
        shapes.linear(f"{path}.self_attn.o_proj", width, inner, bias=False)
        shapes.norms(f"{path}.self_attn", head, "q_norm", "k_norm")
        shapes.linears(f"{path}.mlp", hidden, width, "gate_proj", "up_proj", bias=False)
        shapes.linear(f"{path}.mlp.down_proj", width, hidden, bias=False)
        shapes.norms(path, width, "input_layernorm", "post_attention_layernorm")
    shapes.norms("model", width, "norm")
    if not config.get("tie_word_embeddings", False):
        shapes.linear("lm_head", config["vocab_size"], width, bias=False)
    return shapes


COMPONENTS: Final = (
    Family(
        name="qwen3-text",
        class_name="Qwen3ForCausalLM",
        matches=lambda config: is_class("Qwen3ForCausalLM", config),
        problem=_problem,
        stacks=(_LAYERS,),
        dims=DIMS,
        inputs=INPUTS,
        outputs={"penultimate_hidden_state": ("B", "T", None), "quarter_hidden_states": ("B", "T", None)},
        positions=lambda _: {},
        state=_state,
        adapter="calibration.adapters.qwen3:Qwen3TextEncoder",
        lookups=("model.embed_tokens",),
        unused=("model.norm", "lm_head"),
    ),
)
