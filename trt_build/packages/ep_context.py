"""An EPContext file: what ONNX Runtime's execution provider for TensorRT-RTX reads in place of a graph, with an engine.

Attributes and metadata are those that the provider itself writes (onnxruntime-ep-nv-tensorrt-rtx 0.5.0, measured; its
src/onnx_ctx_model_helper.cc). It needs exactly one node, with ``embed_mode`` and ``ep_cache_context``; a path in the
latter has to be relative, and to lie beside the file or below. An engine inside the file would end at 2 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, helper

from fp4trt.errors import UnfitArtifact
from trt_build.manifest import manifest_path
from trt_build.packages.artifacts import Engine, is_engine, open_engine
from trt_build.packages.contracts import TITLES
from trt_build.packages.placing import Content, Copied, Linked, Written
from trt_build.packages.plan import Asked, Plan, shell_line
from trt_build.signature import Port, Signature

__all__ = ["plan_for_onnxruntime"]

_PROGRAM: Final = "onnxruntime"
_PROVIDER: Final = "NvTensorRTRTXExecutionProvider"
_DOMAIN: Final = "com.microsoft"
_HEADER: Final = 64
"""Bytes at the beginning of an engine by which the provider says whether a GPU can run it."""

_RUN: Final = (
    "import onnxruntime as ort, onnxruntime_ep_nv_tensorrt_rtx as ep; "
    "ort.register_execution_provider_library(ep.get_ep_name(), ep.get_library_path()); "
    "options = ort.SessionOptions(); "
    "options.add_provider_for_devices([d for d in ort.get_ep_devices() if d.ep_name == ep.get_ep_name()], {}); "
    "print([i.name for i in ort.InferenceSession(%r, options).get_inputs()])"
)


def plan_for_onnxruntime(artifact: Path, folder: Path, asked: Asked) -> Plan:
    """Return the plan of an EPContext file and its engine.

    Args:
        artifact: an engine of TensorRT for RTX.
        folder: where, absolute.
        asked: the ``graph`` of an engine whose JSON does not tell its inputs.

    Raises:
        UnfitArtifact: it is no such engine, or nothing tells its inputs and outputs.
    """
    if not is_engine(artifact):
        raise UnfitArtifact(
            f"{artifact} is no engine with its JSON, which {TITLES[_PROGRAM]} takes; build one with fp4trt build"
        )
    engine = open_engine(artifact)
    if engine.backend != "tensorrt_rtx":
        raise UnfitArtifact(
            f"{artifact} is an engine of {engine.backend}, and {_PROVIDER} runs those of TensorRT for RTX: build one "
            "with --gpu rtx5090"
        )
    name = f"{artifact.stem}_ctx.onnx"
    contents: dict[str, Content] = {
        name: Written(_wrapped(engine, engine.signature(asked.graph)).SerializeToString(deterministic=True)),
        artifact.name: Linked(artifact),
        manifest_path(artifact).name: Copied(manifest_path(artifact)),
    }
    command = shell_line("python", "-c", _RUN % str(folder / name))
    return Plan(contents, command, "anywhere, with onnxruntime-ep-nv-tensorrt-rtx installed", notes=_notes(engine))


def _wrapped(engine: Engine, signature: Signature) -> onnx.ModelProto:
    """Return the file: one node in place of the graph that the engine was built from."""
    name = f"fp4trt_{engine.manifest['engine_sha256'][:8]}"
    node = helper.make_node(
        "EPContext",
        [port.name for port in signature.inputs],
        [port.name for port in signature.outputs],
        name=name,
        domain=_DOMAIN,
        embed_mode=0,
        ep_cache_context=engine.path.name,
        ep_context_op_domain=_DOMAIN,
        ep_sdk_version="1.0",
        hardware_architecture="80+",  # what the provider writes for every GPU; it reads the engine's own header
        main_context=0,
        max_size=0,
        onnx_model_filename="model.onnx",
        partition_name=name,
        source=_PROVIDER,
    )
    inputs, outputs = (list(map(_value, ports)) for ports in (signature.inputs, signature.outputs))
    graph = helper.make_graph([node], name, inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11, producer_name="fp4trt")
    with engine.path.open("rb") as file:
        header = file.read(_HEADER)
    helper.set_model_props(
        model, {f"ep_compatibility_info.{_PROVIDER}": header.hex(), "external_dependencies": "ep_context_binary"}
    )
    return model


def _value(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, TensorProto.DataType.Value(port.dtype), list(port.dims))


def _notes(engine: Engine) -> Sequence[str]:
    capabilities = ", ".join(engine.manifest["request"]["compute_capabilities"])
    return (
        f"unproven: that {_PROVIDER} loads an engine of fp4trt build has not been seen, for that needs a card",
        f"the provider has to bring TensorRT-RTX {engine.version}, which built it, and the GPU to be {capabilities}",
    )
