"""A call's products and attentions are those that torch counts in diffusers' own models."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fp4trt.families import family_of
from fp4trt.single_files.config import published_config
from generation.planning.call import Call, Model, call_of
from tests.frame.diffusers_models import MODELS

PICTURES, ROWS, TEXT = 2, 8, 32  # Z-Image's own forward pads tokens of both kinds to a multiple of 32

MORE = {
    "qwen-image-edit-2511": (0.02, 0.0),  # its modulations are computed for two times
    "krea2": (0.0, 0.25),  # attentions in the text's fusion, which stays in 16 bit, and is small in a published model
}
"""How much of linears and attentions diffusers computes beyond what is planned, at most."""


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_diffusers_model(name: str) -> None:
    model = MODELS[name].make(torch.float32)
    config = {**MODELS[name].config, **dict(model.config), "_class_name": MODELS[name].class_name}  # type: ignore[call-overload]
    family = family_of(config)
    given = MODELS[name].call(config, (PICTURES, ROWS, TEXT))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*given.args, **given.kwargs)
    counts = counter.get_flop_counts()
    paths = {key.partition(".")[2]: sum(found.values()) for key, found in counts.items()}
    linears = {path: paths[path] for path in family.quantized(config)}
    attentions = sum(count for operator, count in counts["Global"].items() if "bmm" in str(operator))

    sizes = {**family.sizes(PICTURES, 4 * ROWS, TEXT)}
    if "A" in sizes:
        sizes["A"] = ROWS + 1
    call = Call(Model(family, config), sizes, 0, 0, 1)
    planned = {
        path: 2 * product.rows * product.columns * rows
        for product in call.products()
        for path, rows in product.linears.items()
    }
    more_linears, more_attentions = MORE.get(name, (0.0, 0.0))
    assert list(planned) == list(linears)
    assert sum(planned.values()) <= sum(linears.values()) <= (1 + more_linears) * sum(planned.values())
    found = sum(attention.flops for attention in call.attentions())
    assert found <= attentions <= (1 + more_attentions) * found


def test_a_published_count_of_flux_is_met() -> None:
    """diffusers' own benchmarks give FLUX.1-dev 59,523 GFLOP a call at 1024 pixels, without its attentions."""
    config = published_config("FLUX.1")
    assert config is not None
    call = call_of(Model(family_of(config), config), {})
    linears = sum(2 * each.rows * each.columns * sum(each.linears.values()) for each in call.products())
    assert linears / 1e9 == pytest.approx(59_523.04, rel=0.002)
    assert sum(each.flops for each in call.attentions()) == 57 * 4 * 4608**2 * 3072
