"""Text encoders of pipelines, in BF16: T5 (FLUX.1, SD3, Chroma) and UMT5 (Wan)."""

from __future__ import annotations

from typing import Final

from fp4trt.families.config import problem_of_sizes
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Stack
from fp4trt.families.shapes import Shapes

__all__ = ["COMPONENTS", "DIMS", "INPUTS", "is_class"]

_SIZES: Final = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets")

_MOST_BLOCKS: Final = 64

_ATTENTION: Final = "layer.0.SelfAttention"


def _problem(config: Config) -> str | None:
    if (wrong := problem_of_sizes(config, _SIZES, "num_layers")) is not None:
        return wrong
    if config["num_layers"] > _MOST_BLOCKS:
        return f"num_layers is {config['num_layers']}, expected {_MOST_BLOCKS} at most"
    if config.get("feed_forward_proj", "relu") != "gated-gelu":
        return f"feed_forward_proj is {config.get('feed_forward_proj')!r}, expected 'gated-gelu'"
    return None


def _state(config: Config, every: bool) -> Shapes:
    """Return name to shape of every tensor; ``every`` block, or the first alone, has a table of positions."""
    width, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    shapes = Shapes({"shared.weight": (config["vocab_size"], width)})
    for index in range(config["num_layers"]):
        path = f"encoder.block.{index}.layer"
        shapes.linears(f"encoder.block.{index}.{_ATTENTION}", inner, width, "q", "k", "v", bias=False)
        shapes.linear(f"encoder.block.{index}.{_ATTENTION}.o", width, inner, bias=False)
        if every or not index:
            table = f"encoder.block.{index}.{_ATTENTION}.relative_attention_bias.weight"
            shapes[table] = (config["relative_attention_num_buckets"], config["num_heads"])
        shapes.norms(path, width, "0.layer_norm")
        shapes.linears(f"{path}.1.DenseReluDense", hidden, width, "wi_0", "wi_1", bias=False)
        shapes.linear(f"{path}.1.DenseReluDense.wo", width, hidden, bias=False)
        shapes.norms(path, width, "1.layer_norm")
    shapes.norms("encoder", width, "final_layer_norm")
    return shapes


_BLOCKS: Final = Stack(
    path="encoder.block",
    count="num_layers",
    groups=(
        Group("T", tuple(f"{_ATTENTION}.{leaf}" for leaf in "qkv")),
        Group("T", (f"{_ATTENTION}.o",)),
        Group("T", ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1")),
        Group("T", ("layer.1.DenseReluDense.wo",)),
    ),
    attentions=(_ATTENTION,),
    masked=(_ATTENTION,),
    equal=False,
)


DIMS: Final = {
    "B": Dim("batch", min=1, max=4, default=1),
    "T": Dim("text_tokens", min=1, max=512, default=512),
}
INPUTS: Final = {
    "input_ids": Input(("B", "T"), "token", "int64"),
    "attention_mask": Input(("B", "T"), "mask", "int64"),
}
"""What an encoder of masked tokens is called with."""


def is_class(name: str, config: Config) -> bool:
    """Return whether a config of transformers is one of a class."""
    return "_class_name" not in config and config.get("architectures") == [name]


def _t5(name: str, class_name: str, adapter: str, every: bool) -> Family:
    tables = (f"encoder.block.{index}.{_ATTENTION}.relative_attention_bias" for index in range(_MOST_BLOCKS))
    return Family(
        name=name,
        class_name=class_name,
        matches=lambda config: is_class(class_name, config),
        problem=_problem,
        stacks=(_BLOCKS,),
        dims=DIMS,
        inputs=INPUTS,
        outputs={"last_hidden_state": ("B", "T", None)},
        positions=lambda _: {},
        state=lambda config: _state(config, every),
        adapter=f"calibration.adapters.t5:{adapter}",
        lookups=("shared", *tables),
    )


COMPONENTS: Final = (
    _t5("t5-encoder", "T5EncoderModel", "T5TextEncoder", every=False),
    _t5("umt5-encoder", "UMT5EncoderModel", "UMT5TextEncoder", every=True),
)
