"""The front door: the `fp4trt` command, a table of sub-commands that load their room only when called.

A room's `cli.py` holds plain `click.Command` objects whose callbacks print human lines and return a JSON-able
dict. What is the same for all of them happens here, once: `--json`, one-line errors and the exit status
(0 done, 1 a check failed, 2 bad input; 141 when nobody reads the output any more, as `| head` does).
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import importlib
import io
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from fp4trt.progress import on_terminal
from fp4trt.verb import Result
from fp4trt.version import __version__

__all__ = ["COMMANDS", "EXTRAS", "Entry", "main", "run"]


@dataclass(frozen=True)
class Entry:
    """Where a sub-command lives (`module:attribute`) and its line in `fp4trt --help`."""

    target: str
    summary: str


COMMANDS: dict[str, Entry] = {
    "plan": Entry("generation.planning.cli:plan", "Say what a model needs on a GPU, and whether it fits."),
    "calibrate": Entry("calibration.cli:calibrate", "Measure activation ranges over the denoising schedule."),
    "recipes": Entry("calibration.cli:recipes", "List the ways to quantize, or show one."),
    "search": Entry("calibration.layer_choice.cli:search", "Find the linears that FP8 or BF16 is best spent on."),
    "quantize": Entry("calibration.cli:quantize", "Turn a 16-bit checkpoint into a quantized one, as a recipe says."),
    "convert": Entry("calibration.cli:convert", "Write a quantized checkpoint in another program's layout."),
    "export": Entry("exporter.cli:export", "Turn a quantized checkpoint into an ONNX graph for TensorRT."),
    "validate": Entry("onnx_functions.cli:validate", "Check the numerics of a graph against its checkpoint."),
    "lint": Entry("onnx_functions.cli:lint", "Find what TensorRT would accept wrongly or degrade in silence."),
    "lora": Entry("calibration.cli:lora", "Turn LoRA files into inputs of an engine that has slots for them."),
    "build": Entry("trt_build.cli:build_command", "Compile a graph into a TensorRT engine; no GPU needed."),
    "package": Entry(
        "trt_build.packages.cli:package_command", "Lay a graph or engine out as another program reads it."
    ),
    "compare": Entry(
        "generation.comparison.cli:compare", "Draw the same images with several checkpoints, and measure."
    ),
    "bench": Entry("generation.bench.cli:bench", "Time an engine, or its graph on a CPU, beside the model in torch."),
    "generate": Entry("generation.generate.cli:generate", "Draw pictures with a checkpoint, a graph or an engine."),
    "teacache": Entry("generation.step_caching.cli:teacache", "Find which denoising steps a model may leave out."),
    "inspect": Entry("onnx_functions.cli:inspect", "Say what an artifact is: formats, sizes, FP4 coverage."),
    "demo": Entry("generation.demo.cli:demo", "Walk the whole road on the built-in model."),
}

# Which extra brings a package that a room imports; everything else that fails to import is a bug.
EXTRAS: dict[str, str] = {
    "torch": "quantize",
    "diffusers": "quantize",
    "accelerate": "quantize",
    "huggingface_hub": "quantize",
    "modelopt": "quantize",
    "PIL": "quantize",
    "pydantic": "quantize",
    "yaml": "quantize",
    "safetensors": "quantize",
    "onnxscript": "quantize",
    "onnx_ir": "quantize",
    "scipy": "quantize",
    "gguf": "gguf",
    "transformers": "prompts",
    "torchmetrics": "metrics",
    "tensorrt_rtx": "rtx",
    "polygraphy": "rtx",
    "tensorrt": "tensorrt",
    "matplotlib": "report",
    "ray": "ray",
}


_PIPE_CLOSED: Final = 141
"""What a shell reports of a program that wrote into a closed pipe: 128 and the number of SIGPIPE."""

_BAD_INPUT: Final = 2

_WITHOUT_MODELS: Final = ("recipes", "demo")
"""Commands that read no model of the user's."""

_SOON_S: Final = 0.05


class _Failure(Exception):
    """What the user is told, in one line, and the exit status that follows."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Rooms(click.Group):
    """A group that imports a room only when one of its commands is called, not to list them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].target.partition(":")
        with _foreseen_errors():
            command: click.Command = getattr(importlib.import_module(module), attribute)
        return _with_json(command, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(
    cls=_Rooms,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each command has its own --help with an example, and takes --json.",
)
@click.version_option(__version__, prog_name="fp4trt")
def _cli() -> None:
    """Take a diffusion transformer from a 16-bit checkpoint to a validated FP4 TensorRT engine.

    \b
    Example:
      fp4trt demo -o build/demo        the whole road, on a small built-in model, without a GPU
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 a check failed, 2 bad input.

    `arguments` defaults to the process's own. Only a bug raises.
    """
    return _run(arguments)[0]


def _run(arguments: Sequence[str] | None) -> tuple[int, bool]:
    """Return the exit status, and whether Ctrl-C, or nobody reading on, ended the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console may lack a character: never fail over it
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    context: click.Context | None = None
    try:
        with _foreseen_errors(), _cli.make_context("fp4trt", words) as context:
            return int(_cli.invoke(context) or 0), False
    except click.exceptions.Exit as request:
        return request.exit_code, False
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code, False
    except BrokenPipeError:
        _forget_stdout()
        return _PIPE_CLOSED, True
    except _Failure as failure:
        command = (context.invoked_subcommand if context else None) or ""
        message = " ".join(str(failure).split())
        click.echo(f"{f'fp4trt {command}'.strip()}: error: {message}", err=True)
        return failure.status, isinstance(failure.__cause__, KeyboardInterrupt)


def main() -> NoReturn:
    """Entry point of the `fp4trt` script and of `python -m fp4trt`."""
    sys.unraisablehook = _hear_interrupt
    try:
        status, abruptly = _run(None)
        with contextlib.suppress(ValueError):  # not the main thread, which alone hears of signals
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said: only the interpreter is still to end
    except KeyboardInterrupt:  # after the command, before that
        click.echo("fp4trt: error: interrupted", err=True)
        status, abruptly = _BAD_INPUT, True
    if abruptly:
        # Python ends a process by the signal itself, whatever was done about it, when the interrupt went through
        # code that a library had passed to exec(), as torch does. Everything of ours is closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _hear_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Let Ctrl-C be heard that came while some object was being deleted: Python would show it, and continue."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(_SOON_S, _thread.interrupt_main).start()  # raised in here, it would be lost again
    else:
        sys.__unraisablehook__(unraisable)


def _forget_stdout() -> None:
    """Let what is still to be written to stdout, which nobody reads any more, vanish."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _with_json(command: click.Command, name: str) -> click.Command:
    """Return a copy of a room's command that also takes `--json` and `--module`, and returns an exit status."""
    wrapped = copy.copy(command)
    option = click.Option(
        ["--json", "as_json"],
        is_flag=True,
        help="Print the result as one JSON object on stdout; human lines go to stderr.",
    )
    wrapped.name = name
    own = [] if name in _WITHOUT_MODELS else [_module_option()]
    wrapped.params = [*map(_named, command.params), *own, option]
    wrapped.callback = _with_status(command.callback)
    return wrapped


def _module_option() -> click.Option:
    def use(_: click.Context, __: click.Parameter, value: str | None) -> None:
        if value is not None:
            from fp4trt.families.custom import use_module

            use_module(value)

    return click.Option(
        ["--module"],
        metavar="FILE:FUNCTION",
        expose_value=False,
        callback=use,
        help="A model of your own, as a function of package.file describes it (docs/adding-a-model.md).",
    )


class _Named(click.Path):
    """A path that has to have a name: an empty one would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; expected the name of a file or folder", param, ctx)
        return super().convert(value, param, ctx)


def _named(parameter: click.Parameter) -> click.Parameter:
    """Return a parameter that, where it is a path, refuses an empty one."""
    if not isinstance(parameter.type, click.Path):
        return parameter
    changed = copy.copy(parameter)
    changed.type = copy.copy(parameter.type)
    changed.type.__class__ = _Named
    return changed


def _with_status(callback: Callable[..., Any] | None) -> Callable[..., int]:
    """Wrap a room's callback: hold its result, print it under `--json`, and turn it into an exit status."""

    def run(values: Mapping[str, Any]) -> Any:
        assert callback is not None
        with on_terminal():
            return callback(**values)

    def call(*, as_json: bool, **values: Any) -> int:
        if os.environ.get("RANK", "0") != "0":  # of several processes of `accelerate launch` the first one speaks
            with contextlib.redirect_stdout(io.StringIO()):
                result = run(values)
        elif as_json:
            with _stdout_to_stderr():
                result = run(values)
            shown = result.as_dict() if isinstance(result, Result) else result or {}
            click.echo(json.dumps(_finite(shown), allow_nan=False, default=os.fspath))
        else:
            result = run(values)
        return 1 if isinstance(result, Mapping) and result.get("passed") is False else 0

    return call


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what this process, its native libraries and its children write to stdout to stderr instead."""
    stdout = sys.stdout
    stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # no such descriptor (a window without a console): only Python's stream is left
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        stdout.flush()  # what was written by those who kept the stream object must not follow the switch back
        sys.stderr.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _foreseen_errors() -> Iterator[None]:
    """Turn what a user can cause into a one-line failure; let everything else through as the bug it is."""
    try:
        yield
    except (_Failure, click.exceptions.Exit, click.exceptions.NoArgsIsHelpError, BrokenPipeError):
        raise
    except (KeyboardInterrupt, EOFError, click.Abort) as error:
        raise _Failure("interrupted", _BAD_INPUT) from error
    except click.ClickException as error:
        said = error.format_message().replace("is not a valid integer range", "is not a whole number")
        raise _Failure(said, error.exit_code) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        advice = f'pip install "fp4trt[{EXTRAS[package]}]"'
        raise _Failure(f"the package {package} is needed and not installed; try: {advice}", 2) from error
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # compiled code makes a SystemError of it
            raise _Failure("interrupted", 2) from error.__cause__
        status = getattr(error, "exit_code", 2 if isinstance(error, OSError) else None)
        if not isinstance(status, int):
            raise
        raise _Failure(_sentence(error), status) from error


def _sentence(error: Exception) -> str:
    """Say an error in words; an operating system's own error as `PATH: what is wrong`."""
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        blocking = next((at for at in (path, *path.parents) if at.exists() and not at.is_dir()), None)
        if blocking is not None:
            return f"{blocking} is not a folder; expected a folder there: choose another path"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _finite(value: Any) -> Any:
    """Return `value` with each infinite or NaN float, which JSON cannot hold, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
