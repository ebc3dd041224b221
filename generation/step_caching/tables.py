"""Step caching as text: what was chosen, and how it does on other noise."""

from __future__ import annotations

from typing import Any, Final

from generation.comparison.table import aligned
from generation.step_caching.settings import StepCaching

__all__ = ["BASELINES", "table"]

BASELINES: Final = {
    "every_nth": "every n-th step, same reuse",
    "every_nth_within": "the same, between first and last",
    "every_nth_hold": "every n-th step, held",
}
"""What skips as many steps without looking, by its key in the figures."""


def table(settings: StepCaching) -> str:
    """Return what was chosen, the curve, and the check, as lines."""
    figures = settings.figures
    fit, checked = figures["fit"], figures["checked"]
    rising = "rising" if fit["monotone"] else "not rising everywhere"
    share = checked["skipped"] / checked["of"]
    chosen = (
        f"decider {settings.decider}, reuse {settings.reuse}, threshold {settings.threshold:g}, the first "
        f"{settings.first} and the last {settings.last} of {settings.steps} steps always computed"
    )
    fitted = (
        f"polynomial of degree {fit['degree']}: R2 {fit['r2']:.3f}, mean residual {fit['residual_mean']:.4f}, "
        f"{rising}, of {fit['points']} steps; {figures['tried']} schedules tried"
    )
    on_fitted = "what leaves out the most for its image error, on the noise that was fitted on"
    on_other = f"on other noise: {checked['skipped']:g} of {checked['of']} steps left out ({share:.0%})"
    lines = [chosen, fitted, "", on_fitted, _curve(figures), "", on_other, _checked(checked)]
    return "\n".join(lines)


def _curve(figures: dict[str, Any]) -> str:
    judged = "recognised" in figures["curve"][0]
    nth = {point["skipped"]: point for point in figures["every_nth"]}
    rows = [["steps left out", "PSNR", "every n-th step", *(["recognised"] if judged else [])]]
    for point in figures["curve"]:
        beside = nth.get(round(point["skipped"]))
        psnr = "" if beside is None else f"{beside['psnr_db']:.1f} dB"
        recognised = [f"{point['recognised']:.1%}"] if judged else []
        rows.append([f"{point['skipped']:g}", f"{point['psnr_db']:.1f} dB", psnr, *recognised])
    return aligned(rows)


def _checked(checked: dict[str, Any]) -> str:
    psnr = checked["psnr_db"]
    rows = [["", "PSNR", "against step caching", *(["recognised"] if "recognised" in checked else [])]]
    names = {"cached": "step caching"} | BASELINES
    if "recognised" in checked:
        rows.append(["all steps", "", "", f"{checked['recognised']['all_steps']['mean']:.1%}"])
    for key, title in names.items():
        beside = "" if key == "cached" else _less(psnr[f"better_than_{key}"])
        recognised = [f"{checked['recognised'][key]['mean']:.1%}"] if "recognised" in checked else []
        rows.append([title, f"{psnr[key]['mean']:.1f} dB", beside, *recognised])
    return aligned(rows)


def _less(better: dict[str, float | None]) -> str:
    """Return what another is worse by, with half of its interval."""
    half = None if better["high"] is None else better["high"] - (better["mean"] or 0)
    return f"{-(better['mean'] or 0):+.1f}" + ("" if half is None else f" ± {half:.1f}") + " dB"
