"""The verb: check an artifact against what a program expects, lay it out as the program reads it, say how to run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, get_args

from fp4trt.errors import BadOption, OutputExists
from fp4trt.options import file_name, one_of, takes, word
from fp4trt.progress import Progress
from fp4trt.publish import replacing
from fp4trt.verb import Result, verb
from trt_build.packages.artifacts import is_engine
from trt_build.packages.bfl import plan_for_bfl
from trt_build.packages.contracts import Program, Variant
from trt_build.packages.demo_diffusion import plan_for_demo_diffusion
from trt_build.packages.ep_context import plan_for_onnxruntime
from trt_build.packages.hub import plan_for_hub
from trt_build.packages.placing import Content, Linked, Placed, place
from trt_build.packages.plan import Asked, Plan
from trt_build.packages.rtx_demo import plan_for_rtx_demo

__all__ = ["Packaged", "package"]


@dataclass(frozen=True, eq=False)
class Packaged(Result):
    """A package for a program.

    Attributes:
        program: the program.
        model: what it calls the model; None for one that takes any.
        precision: ``fp4``, ``fp8`` or ``bf16``, likewise.
        folder: absolute path of the package; None where the artifact is used in its place.
        files: name, bytes, and whether it is ``linked``, ``copied`` or ``written``.
        command: the command line, of a POSIX shell, that then runs it.
        where: in which folder.
        notes: for the user, besides.
    """

    program: Program
    model: str | None
    precision: str | None
    folder: str | None
    files: Sequence[Mapping[str, Any]]
    command: str
    where: str
    notes: Sequence[str]


_OPTIONS: Final[Mapping[Program, frozenset[str]]] = {
    "rtx-demo": frozenset({"variant", "graph"}),
    "demo-diffusion": frozenset({"variant", "graph"}),
    "bfl": frozenset({"variant"}),
    "onnxruntime": frozenset({"graph"}),
    "hub": frozenset({"base_model", "license", "license_name"}),
}
"""Which options each program has, besides those of all."""

_PLANS: Final[Mapping[Program, Callable[[Path, Path, Asked], Plan]]] = {
    "rtx-demo": plan_for_rtx_demo,
    "bfl": plan_for_bfl,
    "onnxruntime": plan_for_onnxruntime,
    "hub": plan_for_hub,
}
"""Those that a package is a folder for in any case."""


@verb
@takes(
    artifact=file_name,
    output=file_name,
    program=one_of(*_OPTIONS),
    variant=one_of(*get_args(Variant)),
    graph=file_name,
    base_model=word("black-forest-labs/FLUX.1-dev"),
    license=word("apache-2.0"),
    license_name=word("flux-1-dev-non-commercial-license"),
)
def package(
    artifact: str | Path,
    output: str | Path | None = None,
    *,
    program: Program,
    variant: Variant | None = None,
    graph: str | Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    link: bool = False,
    force: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Packaged:
    """Lay an artifact out for another program, having checked that it is what the program takes.

    Args:
        artifact: a graph or the folder with it, an engine with its JSON, or a quantized checkpoint.
        output: the folder to write; ``demo-diffusion`` needs none.
        program: ``rtx-demo``, ``demo-diffusion``, ``bfl``, ``onnxruntime`` or ``hub``.
        variant: which FLUX.1 it is, where its inputs do not tell: ``kontext``, ``canny`` or ``depth``.
        graph: the graph of an engine, where it does not lie beside it.
        base_model, license, license_name: what the hub's model card says: the hub name of what was quantized, and the
            hub's identifier of its license, or ``other`` and what it is called.
        link: give the weights and the engine a second name, a hard link, in place of a copy, where that is possible.
        force: replace a package that is there.
        progress: called with each step.

    Raises:
        BadOption: an option is missing, or is not the program's.
        UnfitArtifact: the artifact is not what the program takes; the first difference.
        BadModelError, BadProfileError, LintError: the graph cannot be used.
        OutputExists, TooLittleSpace, OSError: naming what is wrong with the output.
    """
    source = Path(artifact).absolute()
    folder = None if output is None else Path(output).absolute()
    asked = Asked(variant, None if graph is None else Path(graph).absolute(), base_model, license, license_name)
    _require_options(program, source, asked)
    plan = _plan(program, source, folder, asked)
    placed: list[Placed] = []
    if folder is not None:
        _require_apart(source, folder)
        with replacing(folder, force, ours=plan.contents.keys()) as partial:
            placed = place(partial, plan.contents, link=link)
    return Packaged(
        program=program,
        model=plan.model,
        precision=plan.precision,
        folder=None if folder is None else str(folder),
        files=[dict(file) for file in placed],
        command=plan.command,
        where=plan.where,
        notes=[*plan.notes, *_of_links(plan.contents, placed)],
    )


def _require_options(program: Program, source: Path, asked: Asked) -> None:
    for field in fields(asked):
        if getattr(asked, field.name) is not None and field.name not in _OPTIONS[program]:
            raise BadOption(f"{field.name} is not for {program}; leave it out")
    if asked.graph is not None and not is_engine(source):
        raise BadOption(f"graph is that of an engine, and {source} is no engine with its JSON; leave it out")


def _plan(program: Program, source: Path, folder: Path | None, asked: Asked) -> Plan:
    if program == "demo-diffusion":
        return plan_for_demo_diffusion(source, folder, asked)
    if folder is None:
        raise BadOption(f"a package for {program} is a folder; name it with --output")
    return _PLANS[program](source, folder, asked)


def _of_links(contents: Mapping[str, Content], placed: Sequence[Placed]) -> Iterator[str]:
    """Yield the note on external data that have two names."""
    linked = {file.name for file in placed if file.how == "linked"}
    if any(isinstance(content, Linked) and content.is_data and name in linked for name, content in contents.items()):
        yield (
            "linked weights are the artifact's own bytes under a second name, which onnx.checker and onnx.load refuse, "
            "here and there: leave out --link for copies"
        )


def _require_apart(source: Path, folder: Path) -> None:
    """Refuse to replace the artifact itself, or the folder that it lies in.

    Raises:
        OutputExists
    """
    if folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise OutputExists(f"{folder} is where {source.name} lies; choose another --output")
