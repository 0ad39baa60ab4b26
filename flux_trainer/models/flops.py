"""Exact size and cost of a FLUX.1 transformer, from its shape alone.

Counted are the multiplications and additions of matrix products: linears and the two products of
attention. Backward costs twice forward (a product each for the gradients of input and weight), except that
nobody needs the gradient of the model's inputs. Recomputation, by activation checkpointing or inside a fused
attention kernel, is no useful work and not counted: this is the numerator of MFU.
"""

from typing import NamedTuple

from flux_trainer.models.configs import TIME_DIM, Flux1Config


class Macs(NamedTuple):
    """Multiply-adds of one sample's forward pass, part by part."""

    inputs: int
    """The linears that read the model's inputs."""
    embedders: int
    """What comes before the blocks, but for `inputs`."""
    blocks: list[int]
    head: int


def forward_flops_per_sample(config: Flux1Config, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one sample's forward pass. Image tokens are packed ones: (height / 16)(width / 16)."""
    inputs, embedders, blocks, head = macs(config, image_tokens, text_tokens)
    return 2 * (inputs + embedders + sum(blocks) + head)


def train_flops_per_sample(config: Flux1Config, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one sample's forward and backward pass."""
    inputs, embedders, blocks, head = macs(config, image_tokens, text_tokens)
    return 4 * inputs + 6 * (embedders + sum(blocks) + head)


def num_params(config: Flux1Config) -> int:
    """Number of parameters."""
    import torch  # only here: settings are checked with the rest before torch is imported

    from flux_trainer.models.flux1 import Flux1Model

    with torch.device("meta"):
        return sum(p.numel() for p in Flux1Model(config).parameters())


def macs(config: Flux1Config, image_tokens: int, text_tokens: int) -> Macs:
    """What each part costs; blocks in forward order."""
    h, mlp = config.hidden_size, config.mlp_hidden
    tokens = image_tokens + text_tokens
    sinusoids = TIME_DIM * (2 if config.guidance_embed else 1)
    channels = (
        sinusoids
        + config.vec_in_dim
        + image_tokens * config.in_channels
        + text_tokens * config.context_in_dim
    )
    embedders = (3 if config.guidance_embed else 2) * h * h
    attention = 2 * tokens * tokens * h  # q k^T and its product with v
    # Double: modulations of two streams (6 h each), then qkv, proj and the MLP for every token.
    double = 12 * h * h + tokens * (4 * h * h + 2 * h * mlp) + attention
    # Single: modulation (3 h), then linear1 (3 h + mlp rows) and linear2 (h + mlp columns).
    single = 3 * h * h + tokens * (4 * h * h + 2 * h * mlp) + attention
    head = 2 * h * h + image_tokens * h * config.out_channels
    blocks = [double] * config.depth + [single] * config.depth_single_blocks
    return Macs(channels * h, embedders, blocks, head)
