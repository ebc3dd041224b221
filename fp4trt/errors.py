"""What a user can get wrong, and checks that fail: one exception type per kind.

Every message is one line that says what was found, what was expected and what to do; the command line prints it and
exits with ``exit_code``: 2 for a mistake of the user's, 1 for a check that failed.
"""

from __future__ import annotations

__all__ = [
    "BackendMissingError",
    "BadAmax",
    "BadCall",
    "BadCheckpoint",
    "BadEngine",
    "BadEnvironment",
    "BadGraph",
    "BadInputs",
    "BadLora",
    "BadModelError",
    "BadOption",
    "BadProfileError",
    "BadRecipe",
    "BadReference",
    "BadSelection",
    "BadStepCache",
    "BuildError",
    "BuilderFailedError",
    "CannotRun",
    "CoverageError",
    "EngineWriteError",
    "LintError",
    "NoEffect",
    "NoPlaceholders",
    "NotReproduced",
    "OutputExists",
    "OutputExistsError",
    "QuantizedAlready",
    "StageFailed",
    "TooLittleSpace",
    "UnfitArtifact",
    "UnknownArtifact",
    "UnknownFamily",
    "UnknownGpuError",
    "UnsupportedFormatError",
    "UnsupportedLinear",
    "UnsupportedModel",
    "Untrusted",
    "WrongPrecision",
]

# Options of all verbs


class BadOption(ValueError):
    """An option of a verb has a value that it does not take."""

    exit_code = 2


# Checkpoints, recipes and calibration data


class UnknownArtifact(ValueError):
    """A file or folder is nothing that this project writes."""

    exit_code = 2


class BadCheckpoint(UnknownArtifact):
    """A checkpoint is missing, damaged, or not what its config says."""

    exit_code = 2


class QuantizedAlready(BadCheckpoint):
    """A checkpoint is quantized where one in 16 bit is expected."""


class UnknownFamily(ValueError):
    """No model family of ours fits the config."""

    exit_code = 2


class BadModule(ValueError):
    """A model of the user's own file that cannot be loaded, or does not fit its description."""

    exit_code = 2


class UnsupportedModel(ValueError):
    """A model whose blocks cannot be run one at a time."""

    exit_code = 2


class BadAmax(ValueError):
    """A calibrated amax is missing, zero, NaN or infinite."""

    exit_code = 2


class BadLora(ValueError):
    """A LoRA file is damaged, of a kind that is not fused, or of another model."""

    exit_code = 2


class BadInputs(ValueError):
    """A file of captured transformer inputs or prompts cannot be used."""

    exit_code = 2


class BadStepCache(ValueError):
    """The settings of step caching are damaged, or for another model."""

    exit_code = 2


class BadRecipe(ValueError):
    """A recipe is unknown, damaged, or not for this model."""

    exit_code = 2


class UnsupportedLinear(ValueError):
    """A linear that the recipe names cannot be stored in the format."""

    exit_code = 2


class Untrusted(ValueError):
    """A pickle was given without the user's word that it may be run."""

    exit_code = 2


class NoEffect(ValueError):
    """A method was to change a model's weights, and has not."""

    exit_code = 2


class NotReproduced(ValueError):
    """A result does not compute what the model computes that it was made from: a check that failed."""

    exit_code = 1


# Graphs and their validation


class BadGraph(ValueError):
    """An ONNX file is missing, damaged, or does not have what a step needs."""

    exit_code = 2


class WrongPrecision(ValueError):
    """A plain checkpoint was given where a quantized one is expected, or the other way round."""

    exit_code = 2


class NoPlaceholders(ValueError):
    """A third-party graph marks no weight for FP4."""

    exit_code = 2


class BadReference(ValueError):
    """The reference of a validation is missing or does not belong to the graph."""

    exit_code = 2


class BadSelection(ValueError):
    """The blocks or the sizes that a validation is asked for do not exist."""

    exit_code = 2


class CannotRun(ValueError):
    """This machine cannot run a graph or an engine, which says nothing of either."""

    exit_code = 2


class BadCall(ValueError):
    """The arrays of a call are not what a graph or an engine takes."""

    exit_code = 2


class LintError(ValueError):
    """A graph that TensorRT would accept wrongly, degrade in silence or refuse."""

    exit_code = 1


# Results and the machine


class OutputExists(ValueError):
    """The result would replace something that is already there."""

    exit_code = 2


class TooLittleSpace(ValueError):
    """The result does not fit on its disk."""

    exit_code = 2


class BadEnvironment(OSError):
    """The machine, and not the artifact, keeps a step from being run: memory, a disk, rights, a package."""

    exit_code = 2


class StageFailed(RuntimeError):
    """A stage of the demo ended with an error that it has printed itself; ``exit_code`` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# Builds


class BuildError(ValueError):
    """Base of the errors of a build."""

    exit_code = 2


class UnknownGpuError(BuildError):
    """No target has this name, or the named targets cannot share one engine."""


class UnsupportedFormatError(BuildError):
    """The graph holds a number format that the GPU does not compute."""


class BadProfileError(BuildError):
    """A resolution, batch or text length is malformed or outside the range that the model declares."""


class BadModelError(BuildError):
    """The ONNX file, or external data that it points to, cannot be used."""


class BadEngine(BuildError):
    """An engine that is damaged, or that this version, GPU or memory does not run."""


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


# Packages for other programs


class UnfitArtifact(ValueError):
    """A graph, an engine or a checkpoint is not what the program takes that it is to be handed to."""

    exit_code = 2
