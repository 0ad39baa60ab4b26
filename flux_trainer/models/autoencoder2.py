"""The FLUX.2 image autoencoder: images in [-1, 1] to latents of 128 channels at 1/16 of the size, and back.

The convolutional part is FLUX.1's (`autoencoder.py`) with 32 channels and a 1x1 convolution at each side of
the bottleneck. Squares of 2 x 2 become channels here, in the autoencoder, and no longer in front of the
transformer; each of the 128 channels is then normalised by statistics of BFL's training set:

    p = 2 x 2 squares of z as channels (c, row, column),    latents = (p - mean) / sqrt(var + 1e-4)

Names and layout are Black Forest Labs' (black-forest-labs/flux2, `autoencoder.py`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_trainer.models.autoencoder import AutoEncoderSizes, Decoder, Encoder

PATCH = 2
"""Side of the squares of z that become one latent."""


@dataclass(frozen=True)
class AutoEncoder2Config(AutoEncoderSizes):
    """Of FLUX.2's autoencoder; the defaults are the published one's."""

    z_channels: int = 32

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side (16 for FLUX.2)."""
        return PATCH * super().downsampling

    @property
    def latent_channels(self) -> int:
        """Channels of the latents (128 for FLUX.2)."""
        return PATCH**2 * self.z_channels


class Encoder2(Encoder):
    """FLUX.1's encoder, then a 1x1 convolution of the moments."""

    def __init__(self, config: AutoEncoder2Config) -> None:
        super().__init__(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.quant_conv(super().forward(image))
        return out


class Decoder2(Decoder):
    """A 1x1 convolution of z, then FLUX.1's decoder."""

    def __init__(self, config: AutoEncoder2Config) -> None:
        super().__init__(config)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, kernel_size=1)

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(self.post_quant_conv(z))


class LatentNorm(nn.Module):
    """BatchNorm without weights that only ever uses its stored statistics.

    nn.BatchNorm2d would replace them by those of the batch after any `.train()` of a module above it.
    """

    EPS = 1e-4

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # in BFL's file, without meaning here

    def forward(self, p: Tensor) -> Tensor:
        """[B, C, H, W] to mean 0 and variance 1, were it of the training set."""
        mean, scale = self._statistics()
        return (p - mean) / scale

    def inverse(self, latents: Tensor) -> Tensor:
        """Undo `forward`."""
        mean, scale = self._statistics()
        return latents * scale + mean

    def _statistics(self) -> tuple[Tensor, Tensor]:
        scale = torch.sqrt(self.running_var + self.EPS)
        return self.running_mean[:, None, None], scale[:, None, None]  # [C, 1, 1]


class AutoEncoder2(nn.Module):
    """FLUX.2's autoencoder, with the interface of `AutoEncoder`."""

    def __init__(self, config: AutoEncoder2Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder2(config)
        self.decoder = Decoder2(config)
        self.bn = LatentNorm(config.latent_channels)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior of the 2 x 2 squares of z, before the normalisation.

        Args:
            image: [B, in_channels, H, W] in [-1, 1]; H and W multiples of `config.downsampling`.

        Returns:
            Two tensors [B, 4*z_channels, H/16, W/16] (16 for FLUX.2: `config.downsampling`), channels ordered
            (c, row in square, column). The log-variance is clamped to [-30, 20], as diffusers does.

        Raises:
            ValueError: the image's height or width is not a multiple of `config.downsampling`.
        """
        self.config.check_sides(image)
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        # [B, C, H/8, W/8] -> [B, 4C, H/16, W/16]
        return F.pixel_unshuffle(mean, PATCH), F.pixel_unshuffle(logvar, PATCH).clamp(-30.0, 20.0)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents [B, 4*z_channels, H/16, W/16] of an image [B, in_channels, H, W] in [-1, 1].

        FLUX.2 was trained on the posterior's mean. With `noise` (standard normal, of the latents' shape) the
        posterior is sampled, as for FLUX.1.
        """
        mean, logvar = self.moments(image)
        out: Tensor = self.bn(mean if noise is None else mean + torch.exp(0.5 * logvar) * noise)
        return out

    def decode(self, latents: Tensor) -> Tensor:
        """Image [B, out_ch, H, W] (about [-1, 1], not clamped) of latents [B, 4*z_channels, H/16, W/16]."""
        z = F.pixel_shuffle(self.bn.inverse(latents), PATCH)  # [B, 4C, H/16, W/16] -> [B, C, H/8, W/8]
        out: Tensor = self.decoder(z)
        return out
