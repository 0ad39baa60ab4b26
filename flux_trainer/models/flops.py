"""Exact size and cost of a FLUX transformer, from its shape alone.

Counted are the multiplications and additions of matrix products: linears and the two products of
attention. Backward costs twice forward (a product each for the gradients of input and weight), except that
nobody needs the gradient of the model's inputs. Recomputation, by activation checkpointing or inside a fused
attention kernel, is no useful work and not counted: this is the numerator of MFU.
"""

from typing import NamedTuple

from flux_trainer.models.configs import TIME_DIM, ModelConfig
from flux_trainer.models.registry import model_class


class Macs(NamedTuple):
    """Multiply-adds of one sample's forward pass, part by part."""

    inputs: int
    """The linears that read the model's inputs."""
    embedders: int
    """What comes before the blocks, but for `inputs`; with the modulations that blocks share."""
    blocks: list[int]
    head: int


def forward_flops_per_sample(config: ModelConfig, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one sample's forward pass. Image tokens are packed ones: (height / 16)(width / 16)."""
    inputs, embedders, blocks, head = macs(config, image_tokens, text_tokens)
    return 2 * (inputs + embedders + sum(blocks) + head)


def train_flops_per_sample(config: ModelConfig, image_tokens: int, text_tokens: int) -> int:
    """FLOPs of one sample's forward and backward pass."""
    inputs, embedders, blocks, head = macs(config, image_tokens, text_tokens)
    return 4 * inputs + 6 * (embedders + sum(blocks) + head)


def num_params(config: ModelConfig) -> int:
    """Number of parameters."""
    import torch  # only here: settings are checked with the rest before torch is imported

    with torch.device("meta"):
        return sum(p.numel() for p in model_class(config)(config).parameters())


def macs(config: ModelConfig, image_tokens: int, text_tokens: int) -> Macs:
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
    embedders = (1 + config.guidance_embed + (config.vec_in_dim > 0)) * h * h
    # In a double block qkv, proj and the MLP, in a single one linear1 and linear2, then q k^T and its product
    # with v. A gated MLP reads its input twice.
    double = single = tokens * (4 * h * h + (3 if config.gated else 2) * h * mlp) + 2 * tokens * tokens * h
    if config.shared_modulation:
        embedders += 15 * h * h
    else:
        double += 12 * h * h  # of two streams, 6 h each
        single += 3 * h * h
    head = 2 * h * h + image_tokens * h * config.out_channels
    blocks = [double] * config.depth + [single] * config.depth_single_blocks
    return Macs(channels * h, embedders, blocks, head)
