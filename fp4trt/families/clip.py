"""CLIP's text encoders, in BF16: FLUX.1's, and the two of SD3 with a projection."""

from __future__ import annotations

from typing import Any, Final

from fp4trt.families.config import problem_of_sizes
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Stack
from fp4trt.families.shapes import Shapes
from fp4trt.families.text_encoders import is_class

__all__ = ["COMPONENTS"]

_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "projection_dim",
)
_ACTIVATIONS: Final = ("quick_gelu", "gelu")

_TOKENS: Final = 77
"""How many tokens all published models are given."""

_LAYERS: Final = Stack(
    path="text_model.encoder.layers",
    count="num_hidden_layers",
    groups=(
        Group("T", tuple(f"self_attn.{leaf}_proj" for leaf in "qkv")),
        Group("T", ("self_attn.out_proj",)),
        Group("T", ("mlp.fc1",)),
        Group("T", ("mlp.fc2",)),
    ),
    attentions=("self_attn",),
    masked=("self_attn",),
    equal=False,
)


def _problem(config: Config) -> str | None:
    if (wrong := problem_of_sizes(config, _SIZES, _LAYERS.count)) is not None:
        return wrong
    if config["max_position_embeddings"] != _TOKENS:
        return f"max_position_embeddings is {config['max_position_embeddings']}, expected {_TOKENS}"
    if config.get("hidden_act") not in _ACTIVATIONS:
        return f"hidden_act is {config.get('hidden_act')!r}, expected one of {', '.join(_ACTIVATIONS)}"
    return None


def _state(config: Config, projected: bool) -> Shapes:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    tables = "text_model.embeddings"
    shapes = Shapes()
    shapes[f"{tables}.token_embedding.weight"] = (config["vocab_size"], width)
    shapes[f"{tables}.position_embedding.weight"] = (config["max_position_embeddings"], width)

    def norm(path: str) -> None:
        shapes[f"{path}.weight"] = shapes[f"{path}.bias"] = (width,)

    for path in _LAYERS.blocks(config):
        shapes.linears(f"{path}.self_attn", width, width, "k_proj", "v_proj", "q_proj", "out_proj")
        norm(f"{path}.layer_norm1")
        shapes.linear(f"{path}.mlp.fc1", hidden, width)
        shapes.linear(f"{path}.mlp.fc2", width, hidden)
        norm(f"{path}.layer_norm2")
    norm("text_model.final_layer_norm")
    if projected:
        shapes.linear("text_projection", config["projection_dim"], width, bias=False)
    return shapes


def _clip(name: str, class_name: str, adapter: str, outputs: dict[str, Any]) -> Family:
    return Family(
        name=name,
        class_name=class_name,
        matches=lambda config: is_class(class_name, config),
        problem=_problem,
        stacks=(_LAYERS,),
        dims={"B": Dim("batch", min=1, max=4, default=1), "T": Dim("text_tokens", min=1, max=_TOKENS, default=_TOKENS)},
        inputs={"input_ids": Input(("B", "T"), "token", "int64")},
        outputs=outputs,
        positions=lambda _: {},
        state=lambda config: _state(config, projected="text_embeds" in outputs),
        adapter=f"calibration.adapters.clip:{adapter}",
        lookups=("text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"),
    )


COMPONENTS: Final = (
    _clip("clip-text", "CLIPTextModel", "CLIPTextEncoder", {"pooler_output": ("B", None)}),
    _clip(
        "clip-text-projected",
        "CLIPTextModelWithProjection",
        "CLIPProjectedTextEncoder",
        {"text_embeds": ("B", None), "penultimate_hidden_state": ("B", "T", None)},
    ),
)
