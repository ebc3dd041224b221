"""What a package is to consist of, known and checked before anything is written, and the command that then runs it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fp4trt.errors import UnfitArtifact
from trt_build.packages.contracts import TITLES, Program
from trt_build.packages.placing import Content

__all__ = ["PROMPT", "TOKEN", "Asked", "Plan", "require_plain", "shell_line"]

PROMPT: Final = "a lighthouse in the fog"
"""What the commands draw."""

TOKEN: Final = '"$HF_TOKEN"'
"""The user's access token, as a shell reads it."""

_PLAIN: Final = re.compile(r"[\w@%+=:,./\\~-]*")


@dataclass(frozen=True)
class Asked:
    """What the user says besides artifact and program; each of some programs.

    Attributes:
        variant: which FLUX.1 it is.
        graph: the graph of an engine, where it does not lie beside it.
        base_model: hub name of what was quantized.
        license: its license, as the hub calls it.
        license_name: where that is ``other``, what it is called.
    """

    variant: str | None = None
    graph: Path | None = None
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None


@dataclass(frozen=True)
class Plan:
    """A package that has passed its checks.

    Attributes:
        contents: name below the folder to content; none where the artifact is used in its place.
        command: the command line that runs it.
        where: the folder to run it in, for people.
        model: what the program calls the model; None for one that takes any.
        precision: ``fp4``, ``fp8`` or ``bf16``; None likewise.
        notes: for the user, one line each.
    """

    contents: Mapping[str, Content]
    command: str
    where: str
    model: str | None = None
    precision: str | None = None
    notes: Sequence[str] = field(default=())


def require_plain(path: Path, program: Program, besides: str = "") -> str:
    """Return a path that a program puts into a command line as it is, in a shell.

    Args:
        path: absolute.
        program: the program.
        besides: characters that it takes for something else.

    Raises:
        UnfitArtifact: the path has a space, or another character that a shell reads in its own way.
    """
    text = str(path)
    odd = next((letter for letter in text if not _PLAIN.fullmatch(letter) or letter in besides), None)
    if odd is not None:
        raise UnfitArtifact(
            f"{text} has {odd!r} in its path, which {TITLES[program]} cannot read; choose a path of letters, digits, "
            "'-', '_' and '.'"
        )
    return text


def shell_line(*words: str, **environment: str) -> str:
    """Return a command line for a POSIX shell.

    Args:
        words: of the command; :data:`TOKEN` stays as it is.
        environment: variables that are set for it.
    """
    given = (f"{name}={shlex.quote(value)}" for name, value in environment.items())
    return " ".join([*given, *(word if word == TOKEN else shlex.quote(word) for word in words)])
