"""What enters some modules while they run: per channel, and as second moments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import nn

__all__ = ["Channels", "Moments", "observe_channels", "observe_moments"]

_TOGETHER: Final = 256
"""Rows of a matrix of K columns that are computed at a time."""

_SLAB: Final = 512
"""The same, of a symmetric one of which a half is computed."""

Transform = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Channels:
    """Sums over the rows of an input, FP32 [K].

    Attributes:
        count: of rows.
        total: sum of each channel.
        square: sum of its squares.
        amax: its largest magnitude.
        rows: some of the rows, FP32 [n, K], evenly from every call.
    """

    count: int
    total: torch.Tensor
    square: torch.Tensor
    amax: torch.Tensor
    rows: list[torch.Tensor]

    @property
    def mean(self) -> torch.Tensor:
        """Mean of each channel."""
        return self.total / self.count

    def shifted(self) -> Channels:
        """Return the same with the mean taken out of every channel; its largest magnitude is then that of the rows."""
        rows = [rows - self.mean for rows in self.rows]
        amax = torch.cat(rows).abs().amax(dim=0)
        square = (self.square - self.count * self.mean.square()).clamp_min(0)
        return Channels(self.count, torch.zeros_like(self.total), square, amax, rows)

    @property
    def rms(self) -> torch.Tensor:
        """Root of each channel's mean square."""
        return (self.square / self.count).sqrt()


@dataclass
class Moments:
    """Sums over the rows of an input, as it enters and as the quantizer gives it on.

    Attributes:
        count: of rows.
        total: sum of the input x, FP32 [K].
        rounded: sum of the quantized input q, FP32 [K].
        noise: sum of ``(x - q)^2`` by channel, FP32 [K].
        product: sum of ``q q^T``, FP32 [K, K].
        lost: sum of ``(x - q) q^T``, FP32 [K, K], where it was asked for.
    """

    count: int
    total: torch.Tensor
    rounded: torch.Tensor
    noise: torch.Tensor
    product: torch.Tensor
    lost: torch.Tensor | None = None

    def power_and_noise(self, centred: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the variance of ``q`` and of ``x - q`` by channel, FP32 [K]; ask before any ``into_``.

        Where ``centred`` is False, their mean squares.
        """
        power, noise = self.product.diagonal() / self.count, self.noise / self.count
        if centred:
            mean = self.rounded / self.count
            power, noise = power - mean.square(), noise - (self.total / self.count - mean).square()
        return power.clamp_min(0), noise.clamp_min(0)

    def into_covariance(self) -> torch.Tensor:
        """Return the mean of ``(q - mean) (q - mean)^T`` of the quantized input, in the place of ``product``.

        At 15,360 channels each such matrix has a gigabyte.
        """
        return _covariance(self.product, self.count, *self.means())

    def into_lost_covariance(self) -> torch.Tensor:
        """Return the same of ``x - q`` and ``q`` in the place of ``lost``; once."""
        lost, self.lost = self.lost, None
        assert lost is not None
        return _covariance(lost, self.count, *self.lost_means())

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of ``q`` twice: their outer product and the covariance are the mean of ``q q^T``."""
        mean = self.rounded / self.count
        return mean, mean

    def lost_means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means of ``x - q`` and ``q``, likewise."""
        return (self.total - self.rounded) / self.count, self.rounded / self.count


def _covariance(product: torch.Tensor, count: int, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Turn a sum of products, in place, into a covariance; ``left`` and ``right`` are the factors' means."""
    for rows, own in zip(product.split(_TOGETHER), left.split(_TOGETHER), strict=True):
        rows.div_(count).sub_(torch.outer(own, right))
    return product


@contextlib.contextmanager
def observe_channels(
    modules: Mapping[str, nn.Module], kept: int, most: int | None = None
) -> Iterator[dict[str, Channels]]:
    """Add up what enters some modules while the ``with`` statement runs them.

    Args:
        modules: name to module, called with one tensor [..., K].
        kept: rows to keep of each call.
        most: rows of each call that sums are of, those of :func:`observe_moments`; None for all. ``amax`` is of all.
    """
    found: dict[str, Channels] = {}

    def add(name: str, rows: torch.Tensor) -> None:
        some, amax = _spread(rows, kept), rows.abs().amax(dim=0)
        rows = rows if most is None else _spread(rows, most)
        total, square = rows.sum(dim=0), rows.square().sum(dim=0)
        if name not in found:
            found[name] = Channels(len(rows), total, square, amax, [some])
            return
        channels = found[name]
        channels.count += len(rows)
        channels.total += total
        channels.square += square
        channels.amax = torch.maximum(channels.amax, amax)
        channels.rows.append(some)

    with _watching(modules, add):
        yield found


@contextlib.contextmanager
def observe_moments(
    modules: Mapping[str, nn.Module], quantize: Mapping[str, Transform], most: int, with_lost: bool = False
) -> Iterator[dict[str, Moments]]:
    """Add up second moments of what enters some modules while the ``with`` statement runs them.

    Args:
        modules: name to module, called with one tensor [..., K].
        quantize: name to what rounds its input.
        most: rows to use of each call, evenly spread.
        with_lost: add up ``lost`` too.
    """
    found: dict[str, Moments] = {}

    def add(name: str, rows: torch.Tensor) -> None:
        rows = _spread(rows, most)
        rounded = quantize[name](rows)
        if name not in found:
            sums = [rows.new_zeros(rows.shape[1]) for _ in range(3)]
            squares = [rows.new_zeros(rows.shape[1], rows.shape[1]) for _ in range(1 + with_lost)]
            found[name] = Moments(0, *sums, *squares)
        moments, change = found[name], rows - rounded
        moments.count += len(rows)
        moments.total += rows.sum(dim=0)
        moments.rounded += rounded.sum(dim=0)
        moments.noise += change.square().sum(dim=0)
        for slab in _slabs(moments.product):
            moments.product[slab, : slab.stop].addmm_(rounded[:, slab].T, rounded[:, : slab.stop])
        if moments.lost is not None:
            moments.lost.addmm_(change.T, rounded)

    with _watching(modules, add):
        yield found
    for moments in found.values():
        for slab in _slabs(moments.product):
            moments.product[: slab.start, slab] = moments.product[slab, : slab.start].T


def _spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Return so many of the rows at most, evenly spread."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), device=rows.device).long()]


def _slabs(product: torch.Tensor) -> Iterator[slice]:
    """Yield the rows of a symmetric matrix, some together; the upper half is the lower one's mirror image."""
    for start in range(0, len(product), _SLAB):
        yield slice(start, min(start + _SLAB, len(product)))


@contextlib.contextmanager
def _watching(modules: Mapping[str, nn.Module], add: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        add(name, args[0].detach().reshape(-1, args[0].shape[-1]).float())

    handles = [module.register_forward_pre_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
