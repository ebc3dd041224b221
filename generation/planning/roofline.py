"""The least time that a call takes: each GEMM at the peak of the tensor cores or of the memory, the slower of both."""

from __future__ import annotations

from typing import Final

from fp4trt.number_formats import BF16, FORMATS, FP8
from fp4trt.targets import Target
from generation.planning.call import Attention, Call, Product
from generation.planning.weights import Weights

__all__ = ["HOST_BANDWIDTH", "call_flops", "call_seconds", "sixteen_bit_of"]

HOST_BANDWIDTH: Final = 25e9
"""Bytes a second from the host's memory to the GPU: about what a PCIe 4.0 x16 or 5.0 x8 slot gives of its 32 GB/s."""


def sixteen_bit_of(target: Target) -> str:
    """Return the 16-bit type that a GPU's tensor cores multiply; older ones have FP16 alone."""
    return BF16 if BF16 in target.tflops else "fp16"


def call_flops(call: Call) -> int:
    """Return the FLOPs of a call: of its linears to quantize, and of its attentions."""
    linears = sum(2 * each.rows * each.columns * sum(each.linears.values()) for each in call.products())
    return linears + sum(each.flops for each in call.attentions())


def call_seconds(call: Call, weights: Weights, target: Target, streamed: int = 0) -> float:
    """Return a lower bound of a call's seconds.

    Norms, embedders, quantization of activations and launches take no time in it, and nothing overlaps.

    Args:
        call: at its sizes.
        weights: of the transformer.
        target: the GPU.
        streamed: bytes of weights that come from the host's memory in every call, beside the computing.
    """
    computing = sum(_product(each, weights, target) for each in call.products())
    computing += sum(_attention(each, weights, target) for each in call.attentions())
    return max(computing, streamed / HOST_BANDWIDTH)


def _product(product: Product, weights: Weights, target: Target) -> float:
    """Return the seconds of linears that read one input, and of their low-rank branch."""
    seconds, moved = 0.0, float(product.nbytes)
    for path, rows in product.linears.items():
        kind = weights.formats.get(path, BF16)
        rate = target.tflops.get(kind, target.tflops[sixteen_bit_of(target)])
        size = rows * product.columns
        seconds += 2 * product.rows * size / (rate * 1e12)
        moved += size * (FORMATS[kind].bits if kind in FORMATS else 16) / 8
        if kind in FORMATS and kind not in target.tflops:
            moved += 4 * size  # unpacked: written once in 16 bit, and read
    rank = weights.ranks.get(product.first, 0)
    factors = rank * (product.columns + sum(product.linears.values()))
    branch = _seconds(2 * product.rows * factors, 2 * factors, target)
    return max(seconds, moved / (target.bandwidth * 1e9)) + branch


def _attention(attention: Attention, weights: Weights, target: Target) -> float:
    kind = FP8.name if weights.fp8_attention else sixteen_bit_of(target)
    return _seconds(attention.flops, attention.nbytes, target, kind)


def _seconds(flops: float, nbytes: float, target: Target, kind: str | None = None) -> float:
    rate = target.tflops[kind or sixteen_bit_of(target)] * 1e12
    return max(flops / rate, nbytes / (target.bandwidth * 1e9))
