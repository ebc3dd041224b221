"""What a user of this room can get wrong: one exception type per kind of mistake.

Every message is one line that says what was found, what was expected and what to do; the command line prints
it and exits with ``exit_code``.
"""

from __future__ import annotations

__all__ = ["BadEnvironment", "BadGraph", "BadReference", "BadSelection", "LintError", "OutputExists", "UnknownArtifact"]


class BadEnvironment(OSError):
    """The machine, and not the graph, keeps a check from being run: memory, a disk, rights, a package."""

    exit_code = 2


class BadGraph(ValueError):
    """An ONNX file is missing, damaged, or not a graph that this project exports."""

    exit_code = 2


class BadReference(ValueError):
    """The reference of a validation is missing or does not belong to the graph."""

    exit_code = 2


class BadSelection(ValueError):
    """The blocks or the sizes that a validation is asked for do not exist."""

    exit_code = 2


class LintError(ValueError):
    """A graph that TensorRT would accept wrongly, degrade in silence or refuse."""

    exit_code = 1


class OutputExists(ValueError):
    """A result would replace something that fp4trt did not write."""

    exit_code = 2


class UnknownArtifact(ValueError):
    """A file or folder that is nothing this project writes."""

    exit_code = 2
