"""The closed form against torch's own counter, and against published sizes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux_trainer.models.configs import Flux1Config
from flux_trainer.models.flops import forward_flops_per_sample, train_flops_per_sample
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.models.registry import FLAVORS

SMALL = Flux1Config(12, 20, 10, 14, 24, 4.0, 2, 2, 3, (4, 4, 4), 10_000, True, True)
VARIANTS = {
    "small": SMALL,
    "no guidance": replace(SMALL, guidance_embed=False),
    "no single blocks, odd MLP": replace(SMALL, depth_single_blocks=0, mlp_ratio=2.3),
    "no double blocks": replace(SMALL, depth=0, num_heads=1, axes_dim=(8, 8, 8)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_against_torch(name):
    """On the meta device attention runs as two plain products, which the counter sees one by one."""
    config, batch, image_tokens, text_tokens = VARIANTS[name], 3, 16, 5
    with torch.device("meta"):
        model = Flux1Model(config)
        arguments = {
            "img": torch.empty(batch, image_tokens, config.in_channels),
            "img_ids": torch.empty(batch, image_tokens, 3),
            "txt": torch.empty(batch, text_tokens, config.context_in_dim),
            "txt_ids": torch.empty(batch, text_tokens, 3),
            "timesteps": torch.empty(batch),
            "y": torch.empty(batch, config.vec_in_dim),
            "guidance": torch.empty(batch),
        }
    with FlopCounterMode(display=False) as counter:
        out = model(**arguments)
    assert counter.get_total_flops() == batch * forward_flops_per_sample(config, image_tokens, text_tokens)
    with FlopCounterMode(display=False) as counter:
        model(**arguments).backward(torch.empty_like(out))
    assert counter.get_total_flops() == batch * train_flops_per_sample(config, image_tokens, text_tokens)


@pytest.mark.parametrize(
    ("side", "text_tokens", "tflop"), [(256, 256, 20.4), (512, 512, 64.5), (1024, 512, 223)]
)
def test_flux_dev_at_real_sizes(side, text_tokens, tflop):
    flops = train_flops_per_sample(FLAVORS["flux-dev"], (side // 16) ** 2, text_tokens)
    assert flops / 1e12 == pytest.approx(tflop, rel=2e-3)
