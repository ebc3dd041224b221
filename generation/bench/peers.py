"""The same model in torch, for comparison: what runs where, and why one does not."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from generation.bench.place import Place

if TYPE_CHECKING:
    import torch

__all__ = ["PEERS", "Peer", "asked_for", "make_model", "why_not"]

_BLOCK_SCALED: Final = 100
"""The least compute capability, times ten, that multiplies block-scaled FP4 and FP8: data-center Blackwell."""


@dataclass(frozen=True)
class Peer:
    """A way to run the model in torch.

    Attributes:
        title: for people.
        dtype: to compute in.
        compiled: whether torch.compile has its part.
        config: of torchao's, that quantizes the linears which ours quantizes; "" for none.
        on_cpu: whether a CPU runs it, and does so unasked.
    """

    title: str
    dtype: str = "bfloat16"
    compiled: bool = False
    config: str = ""
    on_cpu: tuple[bool, bool] = (True, True)


PEERS: Final[Mapping[str, Peer]] = {
    "bf16": Peer("diffusers BF16"),
    "fp32": Peer("diffusers FP32", "float32"),
    "compile": Peer("diffusers BF16, torch.compile", compiled=True, on_cpu=(True, False)),
    "nvfp4": Peer(
        "torchao NVFP4, torch.compile",
        compiled=True,
        config="NVFP4DynamicActivationNVFP4WeightConfig",
        on_cpu=(False, False),
    ),
    "mxfp8": Peer(
        "torchao MXFP8, torch.compile", compiled=True, config="MXDynamicActivationMXWeightConfig", on_cpu=(False, False)
    ),
}
"""In the order in which they run. The first that does is what the others are held against."""


def asked_for(place: Place, asked: tuple[str, ...] | None) -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the peers to run, and why each of the others is not.

    Args:
        place: where.
        asked: names; None for all that make sense there.
    """
    run: dict[str, Peer] = {}
    not_run: dict[str, str] = {}
    for name, peer in PEERS.items():
        reason = "not asked for" if asked is not None and name not in asked else why_not(peer, place)
        if reason is None and asked is None:
            reason = _unasked(name, peer, place)
        if reason is None:
            run[name] = peer
        else:
            not_run[name] = reason
    return run, not_run


def _unasked(name: str, peer: Peer, place: Place) -> str | None:
    if place.device == "cpu" and not peer.on_cpu[1]:
        return f"takes minutes to compile on a CPU: ask for it with --peers {name}"
    return "no contender on a GPU: ask for it with --peers fp32" if place.device != "cpu" and name == "fp32" else None


def why_not(peer: Peer, place: Place) -> str | None:
    """Return why a peer cannot run, as far as that is known before it is tried."""
    if place.device == "cpu":
        return None if peer.on_cpu[0] else "its kernels need a GPU of compute capability 10.0 or newer"
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU: install its CUDA build"
    if not peer.config:
        return None
    if int(place.capability.removeprefix("SM")) < _BLOCK_SCALED:
        return f"its kernels need compute capability 10.0 or newer; here is {place.capability}"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install torchao"
    return None


def make_model(peer: Peer, folder: Path, weights: Path | None, device: str) -> Any:
    """Return a peer's model in eval mode.

    Args:
        peer: which.
        folder: of a transformer, for its config.
        weights: a plain checkpoint, or None for random ones, with which it takes as long.
        device: where it computes.
    """
    import torch

    from calibration.checkpoints.plain import load_source, model_class
    from calibration.checkpoints.quantized import plain_config
    from fp4trt.families import family_of
    from fp4trt.json_file import load_json

    config = plain_config(load_json(folder / "config.json"))
    family, dtype = family_of(config, folder), getattr(torch, peer.dtype)
    if weights is not None:
        model: Any = load_source(weights, dtype).to(device)
    else:
        with torch.device("meta"):
            model = model_class(family).from_config(config)
        torch.manual_seed(0)
        state = {name: _random(name, value.shape, dtype, device) for name, value in model.state_dict().items()}
        model.load_state_dict(state, strict=True, assign=True)
    model = model.eval().requires_grad_(False)
    if peer.config:
        quantized = set(family.quantized(config))
        configs = importlib.import_module("torchao.prototype.mx_formats")
        quantize = importlib.import_module("torchao.quantization").quantize_
        quantize(model, getattr(configs, peer.config)(), filter_fn=lambda _, path: path in quantized)
    return torch.compile(model) if peer.compiled else model


def _random(name: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return weights with which values keep an ordinary size, as in a model: tiny ones are slower on a CPU."""
    import torch

    value = torch.empty(*shape, dtype=dtype, device=device)
    if value.ndim > 1:
        return value.normal_(0, value[0].numel() ** -0.5)
    return value.fill_(1.0 if name.endswith("weight") else 0.0)
