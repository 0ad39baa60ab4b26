"""The FLUX.1 image autoencoder: images in [-1, 1] to latents and back.

The layout and the parameter names are Black Forest Labs' (`encoder.down.0.block.0.norm1.weight`, ...), so
that the published `ae.safetensors` loads as is. A convolutional KL autoencoder: `len(ch_mult) - 1` halvings
of the resolution, residual blocks with GroupNorm and SiLU, one self-attention at the lowest resolution.

FLUX trains on normalised latents: with z the posterior's mean or a sample of it,

    latents = scale_factor * (z - shift_factor)

FLUX.2's, in `autoencoder2.py`, is built of the same parts. Reading the weights from a file is in
`hub/autoencoder.py`.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoEncoderSizes:
    """What FLUX.1's and FLUX.2's autoencoders have in common; field names of BFL's `AutoEncoderParams`."""

    resolution: int = 256
    in_channels: int = 3
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))  # a list when the config was read from JSON
        sizes = (self.in_channels, self.ch, self.out_ch, self.num_res_blocks, self.z_channels, *self.ch_mult)
        if not self.ch_mult or min(sizes) < 1:
            raise ValueError(f"{self}: each of these sizes must be at least 1, and ch_mult have one.")
        if self.ch % 32:
            raise ValueError(
                f"{type(self).__name__}.ch is {self.ch}, but GroupNorm has 32 groups: use a multiple of 32."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side (8 for FLUX.1)."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (16 for FLUX.1)."""
        return self.z_channels

    def check_sides(self, image: Tensor) -> None:
        """Raise ValueError unless the sides of an image [..., H, W] are multiples of `downsampling`."""
        height, width = image.shape[-2:]
        f = self.downsampling
        if height % f or width % f:
            raise ValueError(
                f"An image of {height}x{width} cannot be encoded: use multiples of {f} for both sides."
            )


@dataclass(frozen=True)
class AutoEncoderConfig(AutoEncoderSizes):
    """Of FLUX.1's autoencoder; the defaults are the published one's."""

    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6, affine=True)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions as projections."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # [B, C, H, W] -> [B, 1, H*W, C]: one head as wide as the channels
        q, k, v = (proj(h).flatten(2).transpose(1, 2).unsqueeze(1) for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # [B, 1, H*W, C] -> [B, C, H, W]
        out: Tensor = x + self.proj_out(h)
        return out


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = None if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        out: Tensor = shortcut + h
        return out


class Downsample(nn.Module):
    """Half the resolution by a strided 3x3 convolution, padded on the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution (`block`), then the step to the next one, absent at the last.

    BFL's levels also hold an empty list `attn`: FLUX.1 attends in the middle only.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        if self.downsample is not None:
            h = self.downsample(h)
        if self.upsample is not None:
            h = self.upsample(h)
        return h


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(h)))
        return out


class Encoder(nn.Module):
    """Image [B, in_channels, H, W] to moments [B, 2*z_channels, H/f, W/f]; `down.0` is full resolution."""

    def __init__(self, config: AutoEncoderSizes) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.ch, *widths[:-1]], widths, strict=True)):
            step = Downsample(width) if i < len(widths) - 1 else None
            self.down.append(Level(before, width, config.num_res_blocks, downsample=step))
        self.mid = Middle(widths[-1])
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Decoder(nn.Module):
    """z [B, z_channels, h, w] to image [B, out_ch, h*f, w*f]; `up.0` is full resolution and comes last."""

    def __init__(self, config: AutoEncoderSizes) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            step = Upsample(width) if i > 0 else None
            self.up.append(Level(before, width, config.num_res_blocks + 1, upsample=step))
        self.norm_out = _group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class AutoEncoder(nn.Module):
    """FLUX.1's autoencoder (black-forest-labs/flux, `modules/autoencoder.py`)."""

    def __init__(self, config: AutoEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior q(z | image), before shift and scale.

        Args:
            image: [B, in_channels, H, W] in [-1, 1]; H and W multiples of `config.downsampling`.

        Returns:
            Two tensors [B, z_channels, H/8, W/8] (8 for FLUX.1: `config.downsampling`). The log-variance is
            clamped to [-30, 20], as diffusers does, so that its exponential stays finite.

        Raises:
            ValueError: the image's height or width is not a multiple of `config.downsampling`.
        """
        self.config.check_sides(image)
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents [B, z_channels, H/8, W/8] of an image [B, in_channels, H, W] in [-1, 1].

        With `noise` (standard normal, of the latents' shape) the posterior is sampled,
        z = mean + exp(logvar / 2) * noise; without it z is the mean.
        """
        mean, logvar = self.moments(image)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Image [B, out_ch, H, W] (about [-1, 1], not clamped) of latents [B, z_channels, H/8, W/8]."""
        out: Tensor = self.decoder(latents / self.config.scale_factor + self.config.shift_factor)
        return out
