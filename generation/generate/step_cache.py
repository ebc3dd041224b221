"""Steps that are left out while something is drawn, as ``fp4trt teacache`` found for the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from fp4trt.checkpoint_folder import files_of
from fp4trt.errors import BadOption, BadStepCache
from fp4trt.families import Transformer
from generation.pipelines import Model
from generation.step_caching.cache import StepCache
from generation.step_caching.deciders import signal_of
from generation.step_caching.front import modulated_signal
from generation.step_caching.settings import described_as, read_settings, refuse_other_model

__all__ = ["StepCachingOf"]

_SAID: Final = ("decider", "threshold", "first", "last", "reuse")


class StepCachingOf:
    """Step caching for an artifact; the settings are held against its model first.

    Where its checkpoint lies beside, weights tell models of one config apart; else the config has to do.

    Args:
        model: which model the artifact is.
        path: of the settings, or the folder with them.
        steps: of the schedule; None for those that it was fitted for.
        has_second: whether the pipeline has a second transformer.

    Attributes:
        settings: as they were read.
        steps: of the schedule.

    Raises:
        BadStepCache: the settings are damaged, or for another model.
        BadOption: step caching is not for two transformers.
    """

    def __init__(self, model: Model, path: Path, steps: int | None, has_second: bool) -> None:
        if has_second:
            raise BadOption("teacache is for one transformer, and there is a --transformer-2; leave one of them out")
        self.settings = read_settings(path)
        self._has_checkpoint = all(file.is_file() for file in files_of(model.folder))
        self._model = model
        if self._has_checkpoint:
            refuse_other_model(self.settings, model.folder, path)
        elif (model.family.name, described_as(model.config)) != (
            self.settings.model.family,
            self.settings.model.config,
        ):
            raise BadStepCache(f"{path} is for another model than {model.path}; fit one for its checkpoint")
        self.steps = steps or self.settings.steps
        self._cache: StepCache | None = None

    def around(self, transformer: Transformer) -> Transformer:
        """Return a transformer that leaves out steps of the schedule.

        Raises:
            BadStepCache: the decider needs the checkpoint, which is not there.
        """
        if self.settings.decider != "modulated":
            signal = signal_of(self.settings.decider, self._model.family)
        elif self._has_checkpoint:
            signal = modulated_signal(self._model.folder)
        else:
            raise BadStepCache(
                f"the decider 'modulated' reads the checkpoint's embedders, which are not beside {self._model.path}; "
                "copy it there, or fit with --decider time"
            )
        self._cache = StepCache(transformer, self.settings, signal, steps=self.steps)
        return self._cache

    def counts(self) -> tuple[int, int]:
        """Return how many calls of the transformer there were, and how many of them were left out."""
        counts = None if self._cache is None else self._cache.counts
        return (0, 0) if counts is None else (counts.computed + counts.skipped, counts.skipped)

    def described(self) -> dict[str, Any]:
        """Return what decides which steps are left out, as JSON."""
        return {key: getattr(self.settings, key) for key in _SAID} | {"fitted_for_steps": self.settings.steps}
