"""What the student is asked: states on the teacher's own ways from noise to image, at random times.

A way starts at fresh noise, with the text of a captured call, and visits some random times; at each visit the teacher's
answer is what the student is to give, and the step to the next visit. The states of one round of ways are shuffled, so
that a batch mixes all times. Everything is a function of (seed, process, step): nothing has to be kept to resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from calibration.inputs.captured import Inputs
from fp4trt.errors import BadInputs
from fp4trt.families import Family
from fp4trt.families.family import Config

__all__ = ["States", "Trajectories", "captured_times"]

_STATE: Final = "hidden_states"
_TIME: Final = "timestep"


@dataclass(frozen=True)
class States:
    """Some calls of the model, one image each, with the teacher's answers [N, ...]."""

    inputs: Inputs
    answers: torch.Tensor


def captured_times(calls: Sequence[Inputs]) -> torch.Tensor:
    """Return the different times of captured calls, ascending, FP32."""
    return torch.cat([call[_TIME].float().flatten() for call in calls]).unique()


class Trajectories:
    """Batches of states, by the number of the step."""

    def __init__(
        self,
        teacher: Callable[[Inputs], torch.Tensor],
        calls: Sequence[Inputs],
        family: Family,
        config: Config,
        *,
        batch: int,
        visits: int,
        seed: Sequence[int],
        synthesise: bool,
    ) -> None:
        """Prepare to walk.

        Args:
            teacher: a call's inputs to its velocity, on whatever device it computes.
            calls: captured; their text, guidance and ids are used, and their times tell the schedule.
            family: of the model.
            config: of the model.
            batch: images of a step.
            visits: states of each way.
            seed: numbers that make this stream another than others.
            synthesise: False takes captured states as they are.

        Raises:
            BadInputs: the model's state is more than what it denoises, as that of a model for filling in is, or ordered
                otherwise, and states were to be synthesised.
        """
        self._teacher, self._calls = teacher, calls
        self._batched = [name for name, shape in family.input_shapes(config).items() if shape[0] == "B"]
        self._first, self._noise_at = calls[0], family.noise_at
        alike = ((index, call) for index, call in enumerate(calls) if self._is_alike(call))
        self._rows = [(index, row) for index, call in alike for row in range(len(call[_TIME]))]
        self._times = captured_times(calls)
        self._batch, self._visits, self._seed, self._synthesise = batch, visits, tuple(seed), synthesise
        self._round: tuple[int, States] | None = None
        channels = config.get("out_channels") or config["in_channels"]
        if synthesise and family.reorders:
            raise BadInputs(
                "this model answers a token's channels in another order than it takes them: its answer is no step from "
                "one state to the next; expected data: captured in the recipe"
            )
        if synthesise and channels != config["in_channels"]:
            raise BadInputs(
                f"this model takes {config['in_channels']} channels and answers {channels}: noise alone is not a state "
                "of it; expected data: captured in the recipe"
            )

    def states(self, step: int) -> States:
        """Return the states of a step, on the CPU."""
        number, part = divmod(step, self._visits)
        if self._round is None or self._round[0] != number:
            self._round = (number, self._walk(number))
        chosen = slice(part * self._batch, (part + 1) * self._batch)
        whole = self._round[1]
        inputs = {name: value[chosen] if name in self._batched else value for name, value in whole.inputs.items()}
        return States(inputs, whole.answers[chosen])

    def _walk(self, number: int) -> States:
        """Return all states of one round, shuffled."""
        state = np.random.SeedSequence((*self._seed, number)).generate_state(1, np.uint32)[0]
        random = torch.Generator().manual_seed(int(state))
        visited = self._captured(random) if not self._synthesise else self._synthesised(random)
        order = torch.randperm(self._batch * self._visits, generator=random)
        inputs = {
            name: torch.cat([one.inputs[name] for one in visited])[order] if name in self._batched else value
            for name, value in visited[0].inputs.items()
        }
        return States(inputs, torch.cat([one.answers for one in visited])[order])

    def _synthesised(self, random: torch.Generator) -> list[States]:
        inputs = self._gathered(random)
        like = inputs[_STATE]
        state = torch.randn(like.shape, generator=random)
        times = self._random_times(random).to(inputs[_TIME].dtype).float()
        visited = []
        for visit in range(self._visits):
            now = {**inputs, _STATE: state.to(like.dtype), _TIME: times[visit].to(inputs[_TIME].dtype)}
            answers = self._teacher(now)
            visited.append(States(now, answers))
            if visit + 1 < self._visits:
                shape = (-1, *[1] * (state.ndim - 1))
                step = (times[visit + 1] - times[visit]) / self._noise_at
                state = state + step.reshape(shape) * answers.float()
        return visited

    def _captured(self, random: torch.Generator) -> list[States]:
        found = [self._gathered(random) for _ in range(self._visits)]
        return [States(inputs, self._teacher(inputs)) for inputs in found]

    def _gathered(self, random: torch.Generator) -> Inputs:
        """Return a batch of random rows of the captured calls."""
        chosen = torch.randint(len(self._rows), (self._batch,), generator=random).tolist()
        picked = [(self._calls[call], row) for call, row in (self._rows[index] for index in chosen)]
        return {
            name: torch.stack([call[name][row] for call, row in picked]) if name in self._batched else value
            for name, value in self._first.items()
        }

    def _is_alike(self, call: Inputs) -> bool:
        """Whether a call can be in one batch with the first: of the same picture size and text length."""
        return all(
            call[name].shape[1:] == value.shape[1:] if name in self._batched else torch.equal(call[name], value)
            for name, value in self._first.items()
        )

    def _random_times(self, random: torch.Generator) -> torch.Tensor:
        """Return the times of each image's visits, descending, FP32 [visits, batch]: the first is the schedule's own.

        Others are one in each of as many equal parts of the schedule, whose captured times are taken to be equally far
        apart: so a schedule that dwells in the noise is dwelt in here.
        """
        descending = self._times.flip(0).numpy()
        parts = torch.rand(self._visits, self._batch, generator=random) + torch.arange(self._visits).unsqueeze(1)
        parts[0] = 0
        at = parts.double().numpy() / self._visits * (len(descending) - 1)
        return torch.from_numpy(np.interp(at, np.arange(len(descending)), descending)).float()
