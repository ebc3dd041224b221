"""ModelOpt's road from a FLUX.1 transformer to an NVFP4 ONNX graph: TorchScript, then its NVFP4QuantExporter.

Run as it stands it needs CUDA and a package that nothing else here needs, and TorchScript does not know one operator.
So, on the CPU, with these patches, none of which costs it time:

1. our NVFP4 arithmetic stands in for its CUDA kernel while the model runs, once, to be traced;
2. a symbolic for `aten::rms_norm`, written as the operators that it stands for;
3. `torch_onnx.get_onnx_bytes_and_metadata` is not called, for it imports onnxconverter_common; what it does for NVFP4
   is done here in the same order (torch.onnx.export, onnx.load, shape inference, NVFP4QuantExporter, onnx.save),
   without the graph optimizer that it runs in between;
4. inputs of norms are not quantized: TensorRT refuses that.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.onnx import register_custom_op_symbolic, symbolic_helper

from calibration.checkpoints.plain import load_source
from calibration.formats import nvfp4
from calibration.formats.modelopt_backend import mtq
from fp4trt.families import family_of

OPSET = 20
TOKENS = {"batch": 1, "image_tokens": 64, "text_tokens": 16}


def export(checkpoint: Path, target: Path) -> dict[str, Any]:
    """Write target/model.onnx; return what the export alone cost, and nodes and bytes of its result.

    The model is held in BF16, as its road asks for, and quantized and calibrated in memory.
    """
    torch.set_grad_enabled(False)
    logging.disable()
    warnings.simplefilter("ignore")
    model, inputs = _quantized(checkpoint)
    started, cores = time.perf_counter(), time.process_time()
    traced, packed = target / "traced", target / "model.onnx"
    traced.mkdir(parents=True)
    _trace(model, inputs, traced / "model.onnx")
    graph = _pack(traced / "model.onnx")
    onnx.save(graph, packed, save_as_external_data=True, location="model.data")
    return {
        "seconds": time.perf_counter() - started,
        "core_seconds": time.process_time() - cores,
        "nodes": len(graph.graph.node),
        "bytes": sum(path.stat().st_size for path in target.iterdir() if path.is_file()),
    }


class _Positional(nn.Module):
    """Takes the inputs in the graph's order and gives the latent alone."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]
        return result


def _quantized(checkpoint: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from modelopt.torch.quantization import tensor_quant

    tensor_quant.dynamic_block_quantize_op = _fake_quantize
    model = load_source(checkpoint, torch.bfloat16).eval()
    config = dict(model.config)
    inputs = family_of(config).example_inputs(config, tuple(TOKENS.values()), seed=0, dtype=torch.bfloat16)
    settings = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    settings["quant_cfg"].append({"quantizer_name": "*norm*", "enable": False})
    return mtq.quantize(model, settings, lambda net: net(**inputs, return_dict=False)), inputs


def _fake_quantize(x: torch.Tensor, _block_size: int, amax: torch.Tensor, *_: object) -> torch.Tensor:
    return nvfp4.fake_quantize(x, nvfp4.global_scale(amax.float()))


def _trace(model: nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> None:
    from modelopt.torch.quantization.export_onnx import configure_linear_module_onnx_quantizers

    register_custom_op_symbolic("aten::rms_norm", _rms_norm, OPSET)
    with configure_linear_module_onnx_quantizers(model):
        torch.onnx.export(
            _Positional(model, list(inputs)),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["latent"],
            opset_version=OPSET,
            dynamo=False,
            dynamic_axes={"hidden_states": {0: "B", 1: "L"}},
        )


def _rms_norm(g: Any, x: Any, _shape: Any, weight: Any, eps: Any) -> Any:
    wide = g.op("Cast", x, to_i=onnx.TensorProto.FLOAT)
    last = g.op("Constant", value_t=torch.tensor([-1]))
    mean = g.op("ReduceMean", g.op("Mul", wide, wide), last, keepdims_i=1)
    least = g.op("Constant", value_t=torch.tensor(float(symbolic_helper._maybe_get_const(eps, "f"))))
    normed = g.op("Cast", g.op("Div", wide, g.op("Sqrt", g.op("Add", mean, least))), to_i=onnx.TensorProto.BFLOAT16)
    return normed if symbolic_helper._is_none(weight) else g.op("Mul", normed, weight)


def _pack(traced: Path) -> onnx.ModelProto:
    from modelopt.onnx.export import NVFP4QuantExporter
    from modelopt.onnx.utils import infer_shapes

    return NVFP4QuantExporter.process_model(infer_shapes(onnx.load(traced)))
