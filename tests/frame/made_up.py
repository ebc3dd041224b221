"""A transformer that nobody has: two stacks whose blocks pass unlike tensors, and one modulation for all blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Stack

WIDTH = 64


class _Wide(nn.Module):
    """Gives two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.norm(x) * (1 + scale)
        return x + self.down(nn.functional.silu(self.gate(given)) * self.up(given)), y + x


class _Narrow(nn.Module):
    """Gives one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + self.out(self.norm(x) * (1 + scale))


class MadeUpTransformer(ModelMixin, ConfigMixin):
    """Reads ``state`` [B, N, channels] and ``time`` [B]; gives [B, N, channels]."""

    @register_to_config
    def __init__(self, channels: int = 16, wide_layers: int = 2, narrow_layers: int = 3) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(channels, WIDTH), nn.Linear(1, WIDTH)
        self.modulation = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.ModuleList(_Wide() for _ in range(wide_layers))
        self.narrow = nn.ModuleList(_Narrow() for _ in range(narrow_layers))
        self.last = nn.Linear(WIDTH, channels)

    def forward(self, state: torch.Tensor, time: torch.Tensor, return_dict: bool = True) -> Any:
        scale = self.modulation(nn.functional.silu(self.time(time[:, None])))[:, None]
        x = self.embed(state)
        y = x
        for block in self.wide:
            x, y = block(x, y, scale)
        x = torch.cat((x, y), dim=1)
        for block in self.narrow:
            x = block(x, scale)
        return (self.last(x[:, : state.shape[1]]),)


def _state(config: Config) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(path: str, rows: int, columns: int) -> None:
        shapes[f"{path}.weight"], shapes[f"{path}.bias"] = (rows, columns), (rows,)

    linear("embed", WIDTH, config["channels"])
    linear("time", WIDTH, 1)
    linear("modulation", WIDTH, WIDTH)
    for index in range(config["wide_layers"]):
        linear(f"wide.{index}.up", 96, WIDTH)
        linear(f"wide.{index}.gate", 96, WIDTH)
        linear(f"wide.{index}.down", WIDTH, 96)
    for index in range(config["narrow_layers"]):
        linear(f"narrow.{index}.out", WIDTH, WIDTH)
    linear("last", config["channels"], WIDTH)
    return shapes


MADE_UP = Family(
    name="made-up",
    class_name="MadeUpTransformer",
    matches=lambda config: config.get("_class_name") == "MadeUpTransformer",
    problem=lambda config: None,
    stacks=(
        Stack("wide", "wide_layers", groups=(Group("N", ("up", "gate")), Group("N", ("down",))), attentions=()),
        Stack("narrow", "narrow_layers", groups=(Group("N", ("out",)),), attentions=()),
    ),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "N": Dim("image_tokens", pixels_per_token=4, min_resolution=8, max_resolution=64, default_resolution=32),
    },
    inputs={"state": Input(("B", "N", "channels")), "time": Input(("B",), "time")},
    outputs={"answer": ("B", "N", None)},
    positions=lambda sizes: {},
    state=_state,
    outside=(Group("", ("modulation",)),),
    adapter="tests.frame.made_up:MadeUpTransformer",
)
