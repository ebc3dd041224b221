"""What can go wrong in a build; each message is one line: what was found, what was expected, what to do."""

from __future__ import annotations


class BuildError(ValueError):
    """Base of this room's errors; `exit_code` is the exit status of the command."""

    exit_code = 2


class UnknownGpuError(BuildError):
    """No target has this name, or the named targets cannot share one engine."""


class UnsupportedFormatError(BuildError):
    """The graph holds a number format that the GPU does not compute."""


class BadProfileError(BuildError):
    """A resolution, batch or text length is malformed or outside the range that the model declares."""


class BadModelError(BuildError):
    """The ONNX file, or external data that it points to, cannot be used."""


class OutputExistsError(BuildError):
    """The output path holds something that this build must not replace."""


class BackendMissingError(BuildError):
    """The target needs the tensorrt package and its GPU; a build script was written instead."""


class BuilderFailedError(BuildError):
    """The parser or the builder refused the graph, or its process died."""


class EngineWriteError(OSError):
    """The engine could not be written in full (a full disk, for example)."""

    exit_code = 2


class CoverageError(BuildError):
    """Linears that the graph promises in FP4 did not get an FP4 GEMM."""

    exit_code = 1
