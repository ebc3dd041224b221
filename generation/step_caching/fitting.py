"""From what a step changes in the signal to what it changes in the output: a polynomial, fitted to recorded runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from fp4trt.errors import BadInputs
from generation.step_caching.recording import Array, Distances
from generation.step_caching.settings import Polynomial

__all__ = ["Fit", "fit"]

_DIGITS: Final = 8
"""Significant digits of a coefficient that are kept: sums come out otherwise on other machines."""


@dataclass(frozen=True)
class Fit:
    """A polynomial, and how well it tells the output's distances.

    Attributes:
        polynomial: from the signal's distance to the output's.
        r2: coefficient of determination.
        residual_mean: mean of the residuals' amounts, in relative L1 distance.
        residual_max: the largest of them.
        monotone: whether it never falls within its domain.
        points: that it was fitted to.
    """

    polynomial: Polynomial
    r2: float
    residual_mean: float
    residual_max: float
    monotone: bool
    points: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, without the polynomial, as JSON."""
        figures = {key: value for key, value in asdict(self).items() if key != "polynomial"}
        return {key: _rounded(value, 4) if isinstance(value, float) else value for key, value in figures.items()}


def fit(distances: Distances, degree: int, first: int = 1) -> Fit:
    """Fit a polynomial by least squares.

    Args:
        distances: of recorded runs.
        degree: of the polynomial; fewer distinct distances than it needs lower it.
        first: steps at the start that are always computed, and left out of the fit: a model's first step changes more
            than any later one, and would decide the fit.

    Raises:
        BadInputs: the recorded steps are too few, or all alike.
    """
    signal, output = distances.signal[first - 1 :].ravel(), distances.output[first - 1 :].ravel()
    kept = np.isfinite(signal) & np.isfinite(output) & (output > 0)
    signal, output = signal[kept], output[kept]
    distinct = np.unique(signal)
    if len(distinct) < 2:
        raise BadInputs(
            f"{len(distinct)} different distances between recorded steps; expected several: record more --steps"
        )
    low, high = _outwards(float(distinct[0]), down=True), _outwards(float(distinct[-1]), down=False)
    found = np.polynomial.Polynomial.fit(signal, output, min(degree, len(distinct) - 1), domain=[low, high])
    polynomial = Polynomial(
        coefficients=tuple(_rounded(float(value), _DIGITS) for value in found.coef),
        domain=(low, high),
        least=_rounded(float(output.min()), _DIGITS),
    )
    return Fit(polynomial, *_residuals(polynomial, signal, output), _is_monotone(polynomial), len(signal))


def _residuals(polynomial: Polynomial, signal: Array, output: Array) -> tuple[float, float, float]:
    """Return the coefficient of determination, the mean and the largest amount of the residuals."""
    residuals = output - np.array([polynomial(value) for value in signal.tolist()])
    spread = float(np.square(output - output.mean()).sum())
    r2 = 1 - float(np.square(residuals).sum()) / spread if spread > 0 else 1.0
    return r2, float(np.abs(residuals).mean()), float(np.abs(residuals).max())


def _is_monotone(polynomial: Polynomial) -> bool:
    values = [polynomial(value) for value in np.linspace(*polynomial.domain, 257).tolist()]
    return bool((np.diff(values) >= 0).all())


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _outwards(value: float, *, down: bool) -> float:
    """Return an end of the domain with few digits, so that no recorded distance lies outside."""
    step = 10.0 ** (np.floor(np.log10(value)) - 5) if value > 0 else 1e-6
    return _rounded(float((np.floor if down else np.ceil)(value / step) * step), _DIGITS)
