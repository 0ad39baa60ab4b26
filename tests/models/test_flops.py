"""The closed form against torch's own counter, and against published sizes."""

from dataclasses import replace

import pytest
import torch
from helpers.small_model import arguments, small2
from torch.utils.flop_counter import FlopCounterMode

from flux_trainer.models.configs import Flux1Config
from flux_trainer.models.flops import forward_flops_per_sample, train_flops_per_sample
from flux_trainer.models.registry import FLAVORS, model_class

SMALL = Flux1Config(12, 20, 10, 14, 24, 4.0, 2, 2, 3, (4, 4, 4), 10_000, True, True)
VARIANTS = {
    "small": SMALL,
    "no guidance": replace(SMALL, guidance_embed=False),
    "no single blocks, odd MLP": replace(SMALL, depth_single_blocks=0, mlp_ratio=2.3),
    "no double blocks": replace(SMALL, depth=0, num_heads=1, axes_dim=(8, 8, 8)),
    "flux2": small2(depth_single_blocks=3),
    "flux2, no guidance": small2(use_guidance_embed=False),
    "flux2, one double block, odd MLP": small2(depth=1, mlp_ratio=2.3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_against_torch(name):
    """On the meta device attention runs as two plain products, which the counter sees one by one."""
    config, batch, image_tokens, text_tokens = VARIANTS[name], 3, 16, 5
    with torch.device("meta"):
        model = model_class(config)(config)
    given = arguments(config, batch, image=image_tokens, text=text_tokens, dtype=torch.float32)
    given = {name: x.to("meta") for name, x in given.items()}
    with FlopCounterMode(display=False) as counter:
        out = model(**given)
    assert counter.get_total_flops() == batch * forward_flops_per_sample(config, image_tokens, text_tokens)
    with FlopCounterMode(display=False) as counter:
        model(**given).backward(torch.empty_like(out))
    assert counter.get_total_flops() == batch * train_flops_per_sample(config, image_tokens, text_tokens)


@pytest.mark.parametrize(
    ("flavor", "side", "text_tokens", "tflop"),
    [
        ("flux-dev", 256, 256, 20.4),
        ("flux-dev", 512, 512, 64.5),
        ("flux-dev", 1024, 512, 223),
        ("flux2-dev", 1024, 512, 848),
    ],
)
def test_at_real_sizes(flavor, side, text_tokens, tflop):
    flops = train_flops_per_sample(FLAVORS[flavor], (side // 16) ** 2, text_tokens)
    assert flops / 1e12 == pytest.approx(tflop, rel=2e-3)
