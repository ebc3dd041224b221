"""Z-Image driven as its pipeline drives it: batches of unlike captions, which its graph does not take, are captured."""

from __future__ import annotations

import torch

from calibration.adapters.z_image import ZImage
from calibration.inputs.captured import capturing
from fp4trt.families import family_of
from tests.frame.diffusers_models import MODELS


def test_a_guided_step_of_unlike_captions_is_a_call_for_each_as_diffusers_computes_it() -> None:
    model = MODELS["z-image"]
    stock, adapter = model.make(torch.float32), ZImage(**model.config)
    adapter.load_state_dict(stock.state_dict())
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, 1, 8, 8, generator=generator)] * 2
    captions = [torch.randn(count, 32, generator=generator) for count in (40, 7)]
    config = {"_class_name": model.class_name, **model.config}
    with capturing(adapter, family_of(config), config) as calls, torch.no_grad():
        adapter(latents, torch.tensor([0.25, 0.25]), captions)
        wanted = stock(latents, torch.tensor([0.25, 0.25]), captions, return_dict=False)[0]
        found = [adapter(**call, return_dict=False)[0] for call in calls[:2]]
    assert [call["encoder_hidden_states"].shape for call in calls[:2]] == [(1, 64, 32), (1, 32, 32)]
    for one, other in zip(found, wanted, strict=True):
        tokens = other.view(4, 1, 4, 2, 4, 2).permute(1, 2, 4, 3, 5, 0).reshape(1, 16, 16)
        torch.testing.assert_close(one[:, :16], tokens, rtol=1e-4, atol=1e-5)
