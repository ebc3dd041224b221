"""What other programs expect of a FLUX.1 transformer, as data: one row for each model that each of them runs.

Every number is read from the programs' own sources, which docs/handing-over.md names. Tensors are as all of them have
them: that is the interface of the graphs that Black Forest Labs publishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from fp4trt.number_formats import FP8, NVFP4

__all__ = ["CONTRACTS", "PRECISIONS", "TITLES", "Contract", "Extent", "Program", "Tensor", "Variant", "contracts_of"]

Program = Literal["rtx-demo", "demo-diffusion", "bfl", "onnxruntime", "hub"]
Variant = Literal["dev", "schnell", "kontext", "canny", "depth"]

Extent = tuple[int, int, int]
"""The least, the usual and the largest size that a program asks for."""

TITLES: Final[Mapping[Program, str]] = {
    "rtx-demo": "TensorRT-RTX's demo",
    "demo-diffusion": "demoDiffusion",
    "bfl": "Black Forest Labs' flux",
    "onnxruntime": "ONNX Runtime",
    "hub": "the hub",
}
"""What messages call the programs."""

PRECISIONS: Final = {NVFP4.name: "fp4", FP8.name: "fp8"}
"""Number format to what the programs call a transformer that has it, the first that is there; without any bf16."""


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: its name.
        dtype: its ONNX element type.
        dims: of each axis a number, or the symbol of a contract's sizes.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class Contract:
    """What a program gives a model, and expects of it.

    Attributes:
        program: the program.
        variant: which FLUX.1 it is.
        model: what the program calls it.
        inputs, outputs: in order.
        sizes: symbol to what the program's own builds ask for.
        sides: the least and the largest side of a picture, in pixels.
        named: whether it is taken only where the user names it: its interface is that of another, more common one.
    """

    program: Program
    variant: Variant
    model: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sizes: Mapping[str, Extent]
    sides: tuple[int, int]
    named: bool = False


def _flux(
    program: Program,
    variant: Variant,
    model: str,
    image: Extent,
    *,
    batch: int,
    sides: tuple[int, int],
    channels: int = 64,
    text: int = 512,
) -> Contract:
    """Return the contract of a FLUX.1: all have its tensors, schnell without guidance."""
    inputs = (
        Tensor("hidden_states", "BFLOAT16", ("B", "L", channels)),
        Tensor("encoder_hidden_states", "BFLOAT16", ("B", "T", 4096)),
        Tensor("pooled_projections", "BFLOAT16", ("B", 768)),
        Tensor("timestep", "BFLOAT16", ("B",)),
        Tensor("img_ids", "FLOAT", ("L", 3)),
        Tensor("txt_ids", "FLOAT", ("T", 3)),
        Tensor("guidance", "FLOAT", ("B",)),
    )
    return Contract(
        program,
        variant,
        model,
        inputs=inputs[:-1] if variant == "schnell" else inputs,
        outputs=(Tensor("latent", "BFLOAT16", ("B", "L", 64)),),
        sizes={"B": (1, 1, batch), "L": image, "T": (text, text, text)},
        sides=sides,
        named=variant == "kontext",
    )


def _beside(picture: Extent) -> Extent:
    """Return the tokens of Kontext's picture and of the one that it edits."""
    return (picture[0] + _CONTEXT[0], picture[1] + _CONTEXT[1], picture[2] + _CONTEXT[2])


_TO_1360: Final = (256, 4096, 7225)
"""Tokens of demoDiffusion's pictures, 256 to 1360 pixels: 16 x 16 pixels are one."""

_FROM_768: Final = (2304, 4080, 7225)
"""Tokens of Black Forest Labs' pictures, 768 to 1360 pixels."""

_CONTEXT: Final = (43 * 94, 64 * 64, 50 * 83)
"""Tokens of the picture that Kontext edits, scaled to one of 17 sizes from 688 x 1504 to 800 x 1328 pixels."""

CONTRACTS: Final = (
    _flux("rtx-demo", "dev", "flux_transformer", (256, 1024, 4096), batch=4, sides=(256, 1024)),
    _flux("demo-diffusion", "dev", "flux.1-dev", _TO_1360, batch=4, sides=(256, 1360)),
    _flux("demo-diffusion", "schnell", "flux.1-schnell", _TO_1360, batch=4, sides=(256, 1360), text=256),
    _flux("demo-diffusion", "canny", "flux.1-dev-canny", _TO_1360, batch=4, sides=(256, 1360), channels=128),
    _flux("demo-diffusion", "depth", "flux.1-dev-depth", _TO_1360, batch=4, sides=(256, 1360), channels=128),
    _flux("demo-diffusion", "kontext", "flux.1-kontext-dev", _beside(_TO_1360), batch=4, sides=(256, 1360)),
    _flux("bfl", "dev", "flux-dev", _FROM_768, batch=2, sides=(768, 1360)),
    _flux("bfl", "schnell", "flux-schnell", _FROM_768, batch=2, sides=(768, 1360), text=256),
    _flux("bfl", "canny", "flux-dev-canny", _FROM_768, batch=2, sides=(768, 1360), channels=128),
    _flux("bfl", "depth", "flux-dev-depth", _FROM_768, batch=2, sides=(768, 1360), channels=128),
    _flux("bfl", "kontext", "flux-dev-kontext", _beside((3969, 4096, 4225)), batch=2, sides=(1008, 1040)),
)
"""The models that each program runs."""


def contracts_of(program: Program) -> tuple[Contract, ...]:
    """Return the models that a program runs; none for one that takes any model."""
    return tuple(contract for contract in CONTRACTS if contract.program == program)
