"""What each program expects, held against tables and formulas taken from the program's own source."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from fp4trt.errors import BadModelError, BadOption, UnfitArtifact
from fp4trt.families.flux import FLUX
from trt_build.packages.contracts import CONTRACTS, contracts_of
from trt_build.packages.fit import fitting, picture_of, precision_of
from trt_build.signature import Port, Signature

# TensorRT-RTX: demo/utils/model_registry.py, MODELS["flux_transformer"]["fp4"], and so for fp8 and bf16
REGISTRY = {
    "hidden_states": ("BFLOAT16", ("B", "latent_dim", 64)),
    "encoder_hidden_states": ("BFLOAT16", ("B", 512, 4096)),
    "pooled_projections": ("BFLOAT16", ("B", 768)),
    "timestep": ("BFLOAT16", ("B",)),
    "img_ids": ("FLOAT", ("latent_dim", 3)),
    "txt_ids": ("FLOAT", (512, 3)),
    "guidance": ("FLOAT", ("B",)),
}
REGISTRY_OUTPUTS = {"latent": ("B", "latent_dim", 64)}

# black-forest-labs/flux, src/flux/util.py and cli_kontext.py; TensorRT's flux_pipeline.py has the same
KONTEXT = [(672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104)]
KONTEXT += [(1024, 1024), *((high, low) for low, high in KONTEXT)]


def tokens(height: int, width: int) -> int:
    """As src/flux/trt/trt_config/transformer_trt_config.py counts them: a latent is 8 pixels, a token 2 latents."""
    return ceil(height / 16) * ceil(width / 16)


def test_the_demo_of_tensorrt_rtx_is_as_its_registry_has_it() -> None:
    (contract,) = contracts_of("rtx-demo")
    numbers = {"B": "B", "L": "latent_dim", "T": 512}
    ours = {t.name: (t.dtype, tuple(numbers.get(dim, dim) for dim in t.dims)) for t in contract.inputs}
    assert list(ours.items()) == list(REGISTRY.items())
    assert {t.name: tuple(numbers.get(dim, dim) for dim in t.dims) for t in contract.outputs} == REGISTRY_OUTPUTS
    # demo/flux1.dev/models/flux_params.py: 1 to 4 pictures of 256 to 1024 pixels, 512 text tokens
    assert contract.sizes["B"][::2] == (1, 4)
    assert contract.sizes["L"][::2] == ((256 // 8 // 2) ** 2, (1024 // 8 // 2) ** 2)
    assert set(contract.sizes["T"]) == {512}


@pytest.mark.parametrize(
    ("program", "batch", "smallest", "largest"),
    [
        ("demo-diffusion", 4, 256, 1360),  # demo_diffusion/model/base_model.py; MAX_BATCH_SIZE of flux_pipeline.py
        ("bfl", 2, 768, 1360),  # TransformerConfig.from_args; max_batch of trt_manager.py
    ],
)
def test_profiles_are_those_that_demo_diffusion_and_black_forest_labs_build(
    program: str, batch: int, smallest: int, largest: int
) -> None:
    areas = sorted((width * height, tokens(height, width)) for width, height in KONTEXT)
    for contract in contracts_of(program):
        low, _, high = contract.sizes["L"]
        if contract.variant != "kontext":
            assert (low, high) == (tokens(smallest, smallest), tokens(largest, largest))
        else:
            own = (1008, 1040) if program == "bfl" else (smallest, largest)
            assert low == tokens(own[0], own[0]) + areas[0][1]
            assert high == tokens(own[1], own[1]) + areas[-1][1]
        assert contract.sizes["B"] == (1, 1, batch)
        assert set(contract.sizes["T"]) == {256 if contract.variant == "schnell" else 512}
        shapes = {tensor.name: tensor.dims for tensor in contract.inputs}
        assert shapes["hidden_states"][2] == (128 if contract.variant in ("canny", "depth") else 64)
        assert ("guidance" in shapes) == (contract.variant != "schnell")


def symbols() -> dict[str, dict[str, object]]:
    return {name: dim.as_dict() for name, dim in FLUX.dims.items()}


def signature(variant: str = "dev", program: str = "demo-diffusion") -> Signature:
    """A graph's that is just what a program expects."""
    contract = next(c for c in CONTRACTS if (c.program, c.variant) == (program, variant))
    inputs, outputs = (
        [Port(t.name, t.dtype, t.dims) for t in tensors] for tensors in (contract.inputs, contract.outputs)
    )
    return Signature(tuple(inputs), tuple(outputs))


@pytest.mark.parametrize("program", ["demo-diffusion", "bfl"])
@pytest.mark.parametrize(
    ("inputs", "asked", "taken"),
    [
        ("dev", None, "dev"),
        ("schnell", None, "schnell"),
        ("dev", "kontext", "kontext"),
        ("canny", "depth", "depth"),
        ("depth", "canny", "canny"),
    ],
)
def test_the_inputs_and_the_user_tell_which_model_it_is(
    program: str, inputs: str, asked: str | None, taken: str
) -> None:
    assert fitting(program, "m.onnx", signature(inputs), symbols(), asked).variant == taken


def test_what_inputs_do_not_tell_has_to_be_said() -> None:
    with pytest.raises(BadOption, match=r"^m\.onnx may be canny or depth, .* say which with --variant$"):
        fitting("bfl", "m.onnx", signature("canny"), symbols(), None)
    with pytest.raises(BadOption, match="demo has no model 'kontext'; expected one of: dev"):
        fitting("rtx-demo", "m.onnx", signature(), symbols(), "kontext")


def _other(index: int, **changes: object) -> Signature:
    whole = signature()
    ports = list(whole.inputs)
    ports[index] = replace(ports[index], **changes)  # type: ignore[arg-type]
    return Signature(tuple(ports), whole.outputs)


def _flux2() -> Signature:
    """The inputs of FLUX.2 klein, as fp4trt exports them."""
    named = signature("canny")
    kept = [replace(port, dims=("L", 4)) if port.name == "img_ids" else port for port in named.inputs]
    return Signature(tuple(port for port in kept if port.name not in ("pooled_projections", "guidance")), named.outputs)


REFUSED = {
    "a missing input": (_flux2(), "it has no input pooled_projections, expected hidden_states, "),
    "another name": (_other(3, name="sigma"), "it has no input timestep, expected hidden_states, "),
    "another type": (_other(0, dtype="FLOAT16"), "its input hidden_states is FLOAT16, expected BFLOAT16"),
    "another rank": (_other(4, dims=("B", "L", 3)), "its input img_ids has the shape [B, L, 3], expected [L, 3]"),
    "other channels": (_other(0, dims=("B", "L", 16)), "its input hidden_states takes 16 on axis 2, expected 64"),
    "a text of another length": (_other(5, dims=(77, 3)), "its input txt_ids takes 77 on axis 0, expected 512"),
    "one picture size": (_other(4, dims=(4096, 3)), "its input img_ids takes 4096 on axis 0, expected 256 to 4096"),
    "one picture at a time": (_other(3, dims=(1,)), "its input timestep takes 1 on axis 0, expected 1 to 4"),
    "another order": (
        Signature(signature().inputs[::-1], signature().outputs),
        "its inputs are in the order guidance, txt_ids, ",
    ),
    "an input too many": (
        Signature((*signature().inputs, Port("mask", "FLOAT", ("B",))), signature().outputs),
        "it has the input mask, expected hidden_states, ",
    ),
    "another output": (
        Signature(signature().inputs, (Port("sample", "BFLOAT16", ("B", "L", 64)),)),
        "it has no output latent, expected latent",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_first_difference_is_named(what: str) -> None:
    found, words = REFUSED[what]
    with pytest.raises(UnfitArtifact) as refused:
        fitting("rtx-demo", "m.onnx", found, symbols(), None)
    line = f"m.onnx is not what TensorRT-RTX's demo takes as flux_transformer: {words}"
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_declared_ranges_count() -> None:
    narrow = symbols()
    narrow["T"] |= {"default": 256, "max": 256}
    with pytest.raises(UnfitArtifact, match="encoder_hidden_states takes 1 to 256 on axis 1, expected 512"):
        fitting("rtx-demo", "m.onnx", _other(1, dims=("B", "T", 4096)), narrow, None)
    narrow["T"]["max"] = -1
    with pytest.raises(BadModelError, match="symbol 'T' declares 1, 256, -1"):
        fitting("rtx-demo", "m.onnx", signature(), narrow, None)


@pytest.mark.parametrize(
    ("count", "sides", "picture"),
    [
        (4096, (256, 1024), (1024, 1024)),
        (4080, (256, 1360), (960, 1088)),
        (1536, (256, 1024), (512, 768)),
        (4080, (256, 1024), None),
        (257, (256, 1024), None),
    ],
)
def test_a_picture_of_so_many_tokens(count: int, sides: tuple[int, int], picture: tuple[int, int] | None) -> None:
    assert picture_of(count, sides) == picture


@pytest.mark.parametrize(
    ("promised", "precision"),
    [
        ({"nvfp4": ["a"], "fp8": ["b"]}, "fp4"),
        ({"nvfp4": [], "fp8": ["b"], "mxfp8": ["c"]}, "fp8"),
        ({"nvfp4": [], "fp8": []}, "bf16"),
    ],
)
def test_a_precision_is_that_of_the_smallest_format(promised: dict[str, list[str]], precision: str) -> None:
    assert precision_of("m.onnx", promised, "bfl") == precision


def test_a_format_that_the_programs_do_not_name_is_refused() -> None:
    with pytest.raises(UnfitArtifact, match=r"^m\.onnx is in MXFP8, and demoDiffusion has fp4, fp8 and bf16; quantize"):
        precision_of("m.onnx", {"nvfp4": [], "mxfp8": ["a"]}, "demo-diffusion")
