"""diffusers' half of the comparison: transformer, autoencoder and pipeline of a FLUX, called as ours are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from flux_trainer.config.pictures import Request
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow.latents import SPACES, LatentSpace
from flux_trainer.hub.convert import convert
from flux_trainer.hub.weights import open_weights

Features = dict[str, TextFeatures]


class Counterpart(ABC):
    """What is the same for all families."""

    space: LatentSpace
    transformer_class: Any
    vae_class: Any
    pipeline_class: Any
    encoders: tuple[str, ...]
    """Parts of the pipeline that are left away: it is given text features."""

    def __init__(
        self,
        weights: Path,
        autoencoder: Path,
        scratch: Path,
        device: torch.device,
        dtype: torch.dtype,
        ema: bool,
    ) -> None:
        """Convert the weights into `scratch`, and let diffusers open them.

        Args:
            dtype: of the transformer; the autoencoder is in float32.
            ema: take the moving average of a run's weights.

        Raises:
            AssertionError: diffusers misses a key, or finds one that it does not know.
        """
        self.device, self.dtype = device, dtype
        parts = {}
        for name, path, reader, wide in (
            ("transformer", weights, self.transformer_class, dtype),
            ("vae", autoencoder, self.vae_class, torch.float32),
        ):
            source = open_weights(path, name, ema=ema and name == "transformer", ahead=True)
            convert(source, scratch / name, "diffusers")
            part, info = reader.from_pretrained(scratch / name, torch_dtype=wide, output_loading_info=True)
            assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), info
            parts[name] = part.to(device).eval().requires_grad_(False)
        self.transformer, self.vae = parts["transformer"], parts["vae"]

    def velocity(
        self, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """With the arguments and the result of `Velocity`."""
        height, width = x.shape[2:]
        pooled = {} if vec is None else {"pooled_projections": vec.to(self.dtype)}
        tokens = self.transformer(
            hidden_states=self.space.pack(x).to(self.dtype),
            timestep=t,
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            encoder_hidden_states=txt.to(self.dtype),
            txt_ids=self.space.text_ids(1, txt.shape[1], self.device)[0],
            img_ids=self.space.image_ids(1, height, width, self.device)[0],
            return_dict=False,
            **pooled,
        )[0]
        return self.space.unpack(tokens, height, width)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]."""
        return self.normalised(self.vae.encode(pixels).latent_dist.mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of normalised latents."""
        return self.vae.decode(self.denormalised(latents)).sample

    def draw(self, requests: Sequence[Request], features: Features, noise: Tensor, shifted: bool) -> Tensor:
        """Final latents [B, C, h, w] of requests that differ in prompt and seed alone, from such noise.

        shifted: whether times depend on the size, as all but FLUX.1-schnell's do.
        """
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=shifted,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        )
        absent = dict.fromkeys(self.encoders)
        pipe = self.pipeline_class(transformer=self.transformer, vae=self.vae, scheduler=scheduler, **absent)
        pipe.set_progress_bar_config(disable=True)
        first, last = requests[0], {}

        def keep(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last.update(tensors)
            return {}

        pipe(
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            output_type="latent",  # which klein's pipeline understands otherwise than the others
            callback_on_step_end=keep,
            **self.words(requests, features, noise.to(self.dtype)),
        )
        return self.space.unpack(last["latents"], *noise.shape[2:]).float()

    def stack(self, features: Features, texts: list[str], what: str) -> Tensor:
        return torch.stack([getattr(features[text], what) for text in texts]).to(self.dtype)

    @abstractmethod
    def normalised(self, z: Tensor) -> Tensor:
        """Latents of the autoencoder's own."""

    @abstractmethod
    def denormalised(self, latents: Tensor) -> Tensor:
        """The inverse of `normalised`."""

    @abstractmethod
    def words(self, requests: Sequence[Request], features: Features, noise: Tensor) -> dict[str, Any]:
        """Noise, text and guidance, as the pipeline calls them."""


class Flux1(Counterpart):
    space = SPACES["flux1"]
    transformer_class = diffusers.FluxTransformer2DModel
    vae_class = diffusers.AutoencoderKL
    pipeline_class = diffusers.FluxPipeline
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def normalised(self, z: Tensor) -> Tensor:
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def denormalised(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def words(self, requests: Sequence[Request], features: Features, noise: Tensor) -> dict[str, Any]:
        prompts, negatives = [r.prompt for r in requests], [r.negative_prompt for r in requests]
        return {
            "latents": self.space.pack(noise),
            "prompt_embeds": self.stack(features, prompts, "txt"),
            "pooled_prompt_embeds": self.stack(features, prompts, "vec"),
            "negative_prompt_embeds": self.stack(features, negatives, "txt"),
            "negative_pooled_prompt_embeds": self.stack(features, negatives, "vec"),
            "true_cfg_scale": requests[0].cfg_scale,
            "guidance_scale": requests[0].guidance or 0.0,
        }


class Flux2(Counterpart):
    space = SPACES["flux2"]
    transformer_class = diffusers.Flux2Transformer2DModel
    vae_class = diffusers.AutoencoderKLFlux2
    encoders = ("text_encoder", "tokenizer")

    @property
    def pipeline_class(self) -> Any:
        """dev takes guidance; klein's has classifier-free guidance instead."""
        dev = self.transformer.config.guidance_embeds
        return diffusers.Flux2Pipeline if dev else diffusers.Flux2KleinPipeline

    def normalised(self, z: Tensor) -> Tensor:
        return self.vae.bn(diffusers.Flux2Pipeline._patchify_latents(z))

    def denormalised(self, latents: Tensor) -> Tensor:
        mean, var = (
            x[:, None, None] for x in (self.vae.bn.running_mean, self.vae.bn.running_var)
        )  # [C, 1, 1]
        squares = latents * torch.sqrt(var + self.vae.config.batch_norm_eps) + mean
        return diffusers.Flux2Pipeline._unpatchify_latents(squares)

    def words(self, requests: Sequence[Request], features: Features, noise: Tensor) -> dict[str, Any]:
        words: dict[str, Any] = {
            "latents": noise,
            "prompt_embeds": self.stack(features, [r.prompt for r in requests], "txt"),
        }
        if self.transformer.config.guidance_embeds:
            assert requests[0].cfg_scale == 1, "Flux2Pipeline has no classifier-free guidance"
            return {**words, "guidance_scale": requests[0].guidance}
        negatives = self.stack(features, [r.negative_prompt for r in requests], "txt")
        return {**words, "negative_prompt_embeds": negatives, "guidance_scale": requests[0].cfg_scale}


COUNTERPARTS = {"flux1": Flux1, "flux2": Flux2}
"""By family."""
