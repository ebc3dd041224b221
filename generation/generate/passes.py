"""Draw with a pipeline, all parts in memory at once or, for little memory, one part after the other.

For little memory the pipeline runs three times over each picture: to its transformer's first call, for the text's
embeddings; to its VAE's decoding, for what the transformer answers; and to the end, with these answers in place of the
transformer. So the transformer is in memory without a text encoder, and the pictures are decoded without either, by the
same code, and to the same bits, as in one run.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from generation.generate.request import Wanted
from generation.generate.text_encoders import TextEncoders
from generation.pipelines import PipelineTransformer

__all__ = ["Call", "in_one_pass", "part_by_part"]

Call = Callable[[Wanted], Any]
"""Runs the pipeline for what is wanted, and returns its output."""

Transformers = dict[str, PipelineTransformer]
"""A pipeline's transformers, by the names that it has them under."""


class _FirstCall(Exception):
    """The pipeline has come to its transformer."""


class _Decoding(Exception):
    """The pipeline has come to its VAE's decoding."""


class _InPlace:
    """A transformer to a pipeline, whose calls go elsewhere."""

    def __init__(self, of: PipelineTransformer, call: Callable[..., Any]) -> None:
        self._of, self._call = of, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def in_one_pass(pipe: Any, transformers: Transformers, call: Call, wanted: Sequence[Wanted]) -> Iterator[Any]:
    """Yield what the pipeline returns for each, keeping every part that was loaded."""
    for part, transformer in transformers.items():
        setattr(pipe, part, transformer)
    yield from map(call, wanted)


def part_by_part(
    pipe: Any, transformers: Transformers, encoders: TextEncoders, call: Call, wanted: Sequence[Wanted]
) -> Iterator[Any]:
    """Yield the same, with the text encoders, the transformer and the decoding in memory one after the other."""

    def refuse(*_args: Any, **_: Any) -> Any:
        raise _FirstCall

    with _in_place(pipe, transformers, dict.fromkeys(transformers, refuse)):
        for prompt in dict.fromkeys(one.prompt for one in wanted):
            with contextlib.suppress(_FirstCall):
                call(next(one for one in wanted if one.prompt == prompt))
    encoders.release()
    answers: list[list[Any]] = []
    for one in wanted:
        answers.append([])
        with _in_place(pipe, transformers, _listening(transformers, answers[-1])), _undecoded(pipe):
            call(one)
    for transformer in transformers.values():
        transformer.close()
    for one, kept in zip(wanted, answers, strict=True):
        with _in_place(pipe, transformers, dict.fromkeys(transformers, _repeating(kept))):
            yield call(one)


def _listening(transformers: Transformers, answers: list[Any]) -> dict[str, Callable[..., Any]]:
    """Return what calls each transformer, and keeps what it answers."""

    def listener(transformer: PipelineTransformer) -> Callable[..., Any]:
        def listen(*args: Any, **kwargs: Any) -> Any:
            answer = transformer(*args, **kwargs)
            answers.append(copy.deepcopy(answer))  # a pipeline may change it
            return answer

        return listen

    return {part: listener(transformer) for part, transformer in transformers.items()}


def _repeating(answers: Sequence[Any]) -> Callable[..., Any]:
    """Return what gives the answers again, one a call."""
    left = iter(answers)
    return lambda *_args, **_: next(left)


@contextlib.contextmanager
def _in_place(pipe: Any, transformers: Transformers, calls: dict[str, Callable[..., Any]]) -> Iterator[None]:
    for part, transformer in transformers.items():
        setattr(pipe, part, _InPlace(transformer, calls[part]))
    try:
        yield
    finally:
        for part, transformer in transformers.items():
            setattr(pipe, part, transformer)


@contextlib.contextmanager
def _undecoded(pipe: Any) -> Iterator[None]:
    """End a run of the pipeline where it would decode."""

    def stop(*_args: Any, **_: Any) -> Any:
        raise _Decoding

    pipe.vae.decode = stop
    try:
        with contextlib.suppress(_Decoding):
            yield
    finally:
        del pipe.vae.decode
