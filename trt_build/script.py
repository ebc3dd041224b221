"""A build script to carry to a machine that has the GPU and the tensorrt package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from textwrap import indent
from typing import Final

from fp4trt.errors import OutputExistsError
from fp4trt.file_output import made_folder, write_texts
from fp4trt.number_formats import FORMATS
from fp4trt.targets import Target
from trt_build.graph import Graph
from trt_build.profiles import Profile

__all__ = ["script_of", "script_path", "write_script"]

_TEMPLATE: Final = Template('''\
# Written by fp4trt: replaced by the next build only while it is unchanged.
"""Build $engine_name for $gpu ($capability) with the tensorrt package; run it on a machine that has this GPU.

    pip install tensorrt polygraphy
    python $script_name [MODEL.onnx] [OUTPUT.engine]

Tested: this script, with TensorRT for RTX 1.7 in place of the tensorrt package. Not tested: any version of the
tensorrt package, and this GPU. The graph needs a version whose parser knows the operator TRT_FP4DynamicQuantize; one
that does not know it says so. Take the model together with the weight files that it points to, in one directory.
"""

import json
import os
${imports}import sys
from pathlib import Path

import tensorrt as trt

HERE = Path(__file__).resolve().parent
ONNX = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / $onnx
ENGINE = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / $engine
PROMISED = {  # the type of both operands, as TensorRT's layer information has it: linears
$promised
}
PROMISED_ATTENTIONS = $attentions  # name: the two products that one kernel is to compute in FP8
$profiles


class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.layers = ""

    def log(self, severity, message):
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            print(message, file=sys.stderr)
        elif message.startswith(("Layers:", "Engine Layer Information:")):
            self.layers = message


${functions}def main():
    log = Log()
    builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(ONNX)):
        sys.exit("error: " + "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if $weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
$add_profiles
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("error: TensorRT " + trt.__version__ + " did not build the engine")
    partial = ENGINE.with_name(ENGINE.name + ".partial")
    partial.write_bytes(plan)
    os.replace(partial, ENGINE)
    kernels = [line for line in log.layers.splitlines() if line.startswith("Name: ")]
${counting}    result = {"engine": str(ENGINE), "engine_bytes": ENGINE.stat().st_size, "tensorrt": trt.__version__}
    if not kernels:
        sys.exit(json.dumps(result) + " warning: no layer information, so FP4 coverage is unknown")
$fusing
    print(json.dumps({**result, **counts, "lost": lost, "lost_attentions": apart}))
    if lost:
        sys.exit(f"error: {len(lost)} of {sum(map(len, PROMISED.values()))} linears run in 16 bit")
    if apart:
        sys.exit(f"error: {len(apart)} of {len(PROMISED_ATTENTIONS)} attentions do not run as one kernel in FP8")


main()
''')

_ADD_PROFILE: Final = """\
    profile = builder.create_optimization_profile()
    for name, shapes in PROFILE.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
"""

_COUNTING: Final = """\
    counts, lost = {}, []
    for kind, names in PROMISED.items():
        read = [k for k in kernels if kind in k.partition("Inputs: [")[2].partition("], Constants:")[0]]
        gemms = [k for k in read if kind in k.partition("Constants: [")[2].partition("], Outputs:")[0]]
        counts[kind.lower() + "_gemms"] = len(gemms)
        lost += [name for name in names if not any(f"[ONNX Layer: {name}/MatMul]" in k for k in gemms)]
"""

_FUSING: Final = """\
    fp8 = [k for k in kernels if "FP8" in k.partition("Inputs: [")[2].partition("], Constants:")[0]]
    apart = [
        name
        for name, products in PROMISED_ATTENTIONS.items()
        if not any(all(f"[ONNX Layer: {product}]" in k for product in products) for k in fp8)
    ]
"""

_BY_PROFILE: Final = f"""\
def by_profile(kernels):
    # From the second profile on names are marked: not all of them, but some of each subgraph's, _mylNUMBER_.
    subgraphs = [(re.search(r"_myl(\\d+)_\\d+, LayerType", k) or [k, k])[1] for k in kernels]
    marks = [re.search(r"\\[profile (\\d+)\\]", k) for k in kernels]
    marked = {{subgraph: int(mark[1]) for subgraph, mark in zip(subgraphs, marks) if mark}}
    numbers = [marked.get(subgraph, 0) for subgraph in subgraphs]
    own = [[k for number, k in zip(numbers, kernels) if number == i] for i in range(len(PROFILES))]
    return own if all(own) else []


def measure(kernels):
{_COUNTING}{_FUSING}    return counts, lost, apart


"""

_ALL_PROFILES: Final = """\
    found = [measure(kernels) for kernels in profiles]
    counts = {**found[0][0], "profiles": [counts for counts, _, _ in found]}
    lost = list(dict.fromkeys(name for _, names, _ in found for name in names))  # in any profile
    apart = list(dict.fromkeys(name for _, _, names in found for name in names))
"""


def script_path(engine: Path) -> Path:
    """Return the path of the script that stands in for an engine: b200.engine -> b200.build.py."""
    return engine.with_suffix(".build.py")


def script_of(
    engine: Path,
    graph: Graph,
    target: Target,
    profiles: Sequence[Profile],
    weight_streaming: bool,
) -> str:
    """Return the build script of a requested engine.

    It refers to the model relative to itself, and to nothing else of this machine.
    """
    path = script_path(engine)
    found = graph.attentions
    attentions = {
        name: [found[name].scores.name, found[name].output.name] if name in found else [f"{name}/Attention"]
        for name in graph.promised_attentions
    }
    promised = {FORMATS[kind].gemm: paths for kind, paths in graph.promised.items()}
    return _TEMPLATE.substitute(
        engine_name=engine.name,
        script_name=path.name,
        gpu=target.name,
        capability=target.compute_capability,
        onnx=repr(_relative(graph.path, path.parent)),
        engine=repr(engine.name),
        promised="\n".join(f"    {kind!r}: {list(names)!r}," for kind, names in promised.items()),
        attentions=repr(attentions),
        weight_streaming=weight_streaming,
        **(_of_one(profiles[0]) if len(profiles) == 1 else _of_several(profiles)),
    )


def _of_one(profile: Profile) -> dict[str, str]:
    """Return the parts of a script that builds one profile."""
    rows = _rows(profile)
    return {
        "imports": "",
        "profiles": f"PROFILE = {{  # input: minimum, optimum and maximum shape\n{rows}\n}}",
        "functions": "",
        "add_profiles": _ADD_PROFILE.rstrip(),
        "counting": _COUNTING,
        "fusing": _FUSING.rstrip(),
    }


def _of_several(profiles: Sequence[Profile]) -> dict[str, str]:
    """Return the parts of a script that builds several: what any of them loses is lost."""
    rows = "\n".join(f"    {{\n{indent(_rows(profile), '    ')}\n    }}," for profile in profiles)
    return {
        "imports": "import re\n",
        "profiles": f"PROFILES = [  # of each, input: minimum, optimum and maximum shape\n{rows}\n]",
        "functions": _BY_PROFILE,
        "add_profiles": f"    for shapes_of in PROFILES:\n{indent(_ADD_PROFILE, '    ')}".rstrip().replace(
            "PROFILE.", "shapes_of."
        ),
        "counting": "    profiles = kernels = by_profile(kernels)\n",
        "fusing": _ALL_PROFILES.rstrip(),
    }


def _rows(profile: Profile) -> str:
    return "\n".join(f"    {name!r}: {shapes!r}," for name, shapes in profile.inputs.items())


def write_script(path: Path, content: str, force: bool) -> Path:
    """Write a build script and return its path.

    Raises:
        OutputExistsError: something else is there, such as a script that was edited, and `force` is not given.
    """
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; name another engine file")
    if path.exists() and not force and path.read_bytes() != content.encode():
        raise OutputExistsError(
            f"{path} exists with other content (edited, or for another request); keep it and name another engine file, "
            "or replace it with --force"
        )
    with made_folder(path.parent):
        write_texts({path: content})
    return path


def _relative(path: Path, directory: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), directory.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return path.name
