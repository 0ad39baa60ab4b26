"""FLUX as a training problem: what a batch becomes, and what its loss is.

    x_t = (1 - t) x_0 + t noise,    target velocity = noise - x_0    (rectified flow, Liu et al. 2022)

with x_0 the autoencoder's latents. Noise, time and posterior sample are functions of the sample's draw.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_trainer.checkpoint.identity import CONTENTS
from flux_trainer.config.pictures import Prompt, Request, read_prompts, reference_side
from flux_trainer.config.schema import JobConfig
from flux_trainer.data.loader import TrainLoader, ValidationLoader
from flux_trainer.data.sampler import open_mixture
from flux_trainer.data.samples import Batch, TrainSamples, ValidationSamples
from flux_trainer.encoders.bundle import Encoded, Encoders
from flux_trainer.encoders.choose import kind_of
from flux_trainer.flow import rng
from flux_trainer.flow.latents import SPACES, References
from flux_trainer.flow.loss import flow_loss
from flux_trainer.flow.path import interpolate, velocity
from flux_trainer.flow.rng import Purpose
from flux_trainer.flow.timesteps import loss_weight, sample_timesteps, training_mu
from flux_trainer.metrics.console import validation_line
from flux_trainer.metrics.pictures import grid
from flux_trainer.models import registry
from flux_trainer.models.flops import train_flops_per_sample
from flux_trainer.models.init import Distribution
from flux_trainer.models.model import Arguments, FluxModel
from flux_trainer.parallel.arithmetic import has_references, reference_room, reference_tokens, tokens
from flux_trainer.parallel.compile import compile_loss
from flux_trainer.parallel.mesh import DATA, SHARED, data_group
from flux_trainer.runtime.dist import all_gather_ragged, all_gather_rows
from flux_trainer.runtime.log import logger
from flux_trainer.sample import (
    draw,
    encode_prompts,
    encode_references,
    reference_encoder,
    sampler_mu,
    share_out,
)
from flux_trainer.trainer import Trainer
from flux_trainer.validate import validation_loss
from flux_trainer.velocity import Velocity, check_features, shared_encoder


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, and what its output is compared with."""

    x_t: Tensor
    """[B, C, h, w]: noisy latents."""
    t: Tensor
    """[B], in [0, 1]."""
    txt: Tensor
    """[B, T, D]: the caption's tokens."""
    vec: Tensor | None
    """[B, D']: the pooled caption; FLUX.2 has none."""
    references: References | None
    """Images that the samples refer to."""
    target: Tensor
    """[B, C, h, w]: velocity."""
    weight: Tensor | None
    """[B]: weight of each sample's loss; None: 1."""


class FluxTrainer(Trainer):
    """Trains a FLUX transformer on images and captions; autoencoder and text encoders stay frozen."""

    def __init__(self, config: JobConfig) -> None:
        self.model_config = registry.FLAVORS[config.model.flavor]
        self.space = SPACES[self.model_config.family]
        self.latent_shape = self.space.shape(config.training.img_size, config.training.img_size)
        self.mixture = open_mixture(config.data.sources, config.debug.seed)
        self.refers = has_references(config)
        super().__init__(config)
        self.wide = torch.promote_types(self.compute_dtype, torch.float32)  # of noise, latents and targets
        self.flow_loss = compile_loss(flow_loss, config.compile)
        self.encoders = Encoders(
            config.encoder,
            self.device,
            config.debug.seed,
            shared_encoder(self.mesh),
            kind_of(self.model_config),
            self.model_config.context_in_dim,
        )
        check_features(config, self.encoders.text, self.model_config)
        self.velocity = Velocity(self.parallel, self.model_config, self.device)
        self.group = data_group(self.mesh, self.world)
        self.prompts = self.read_prompts()
        side = reference_side(config.data, config.training.img_size)
        encode, most = self.encoders.encode_images, config.data.max_pixels
        self.encode_reference = reference_encoder(encode, lambda _: side, most)  # of the prompts
        self.held_out = self.build_validation_loader()

    def build_model(self) -> tuple[FluxModel, Mapping[str, Distribution]]:
        model = registry.build(self.config.model.name, self.config.model.flavor)
        return model, model.init_distributions()

    def build_loader(self, start_draw: int) -> TrainLoader:
        config = self.config
        samples = TrainSamples(
            config.data,
            self.mixture,
            image_size=config.training.img_size,
            seed=config.debug.seed,
            dropout_prob=config.training.classifier_free_guidance_prob,
            joint_dropout=config.training.classifier_free_guidance_joint,
        )
        return TrainLoader(
            config.data,
            samples,
            tokenize=self.encoders.text.tokenizers.tokenize,
            start_draw=start_draw,
            global_batch_size=self.global_batch_size,
            rank=self.mesh.rank(*DATA),
            world_size=self.mesh.size(*DATA),
            shared_rank=self.mesh.rank(*SHARED),
            shared_size=self.mesh.size(*SHARED),
            pin_memory=self.device.type == "cuda",
        )

    def work(self, micro_batch: MicroBatch) -> tuple[int, int]:
        image, text = self.tokens_per_sample()
        references = micro_batch.references
        counts = references.counts if references else [0] * len(micro_batch.t)
        flops = (train_flops_per_sample(self.model_config, image + n, text) for n in counts)
        return sum(counts) + len(counts) * (image + text), sum(flops)

    def tokens_per_sample(self) -> tuple[int, int]:
        return tokens(self.config)

    def encode(self, batch: Batch, batch_size: int, sample: bool = False) -> tuple[Tensor, Tensor, Encoded]:
        """Encode this rank's rows, `batch_size` at a time, and exchange them with the ranks that share them.

        Returns:
            draws int64 [n], valid bool [n] and the n encoded samples, the same on all ranks of a group that
            works on the same samples, in their order. `sample`: latents from the posterior, not its mean.
        """
        draws = batch.draws.to(self.device, non_blocking=True)
        parts, references = [], batch.references(self.device)
        for start in range(0, len(draws), batch_size):
            part = slice(start, start + batch_size)
            noise = None
            if sample:
                seed, shape = self.config.debug.seed, self.latent_shape
                noise = rng.normal(seed, Purpose.LATENT, draws[part], shape, self.encoders.dtype)
            parts.append(
                self.encoders.encode(
                    batch.images[part],
                    {name: ids[part] for name, ids in batch.tokens.items()},
                    batch.drop_t5[part],
                    batch.drop_clip[part],
                    noise,
                    references[part],
                )
            )
        share = partial(all_gather_rows, group=self.mesh.shared)
        valid = batch.valid.to(self.device, non_blocking=True)
        encoded = Encoded.cat(parts)
        shown = encoded.references
        if self.refers:
            shown = all_gather_ragged(shown, encoded.latents, self.mesh.shared)
        return share(draws), share(valid), encoded.map(share, shown)

    def micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """Encode the samples of this rank's group, and cut them, with noise, into local batches."""
        size = self.config.training.local_batch_size
        draws, _, encoded = self.encode(batch, size, self.config.encoder.autoencoder_sample)
        count = self.global_batch_size // self.mesh.size(*DATA)  # what follows only fills up
        parts = (slice(start, start + size) for start in range(0, count, size))
        length = 0
        if self.parallel.pipeline:  # whose micro-batches have one shape
            longest = max(map(self.space.reference_tokens, encoded.references), default=0)
            length = reference_room(longest, reference_tokens(self.config))
        return [self.prepare(draws[part], encoded.rows(part), length) for part in parts]

    def prepare(self, draws: Tensor, encoded: Encoded, length: int = 0) -> MicroBatch:
        """Noise for B encoded samples with the given draws [B], padded to `length` tokens of references."""
        seed, flow = self.config.debug.seed, self.config.flow
        x_0 = encoded.latents.to(self.wide)  # [B, C, h, w]
        noise = rng.normal(seed, Purpose.NOISE, draws, self.latent_shape, self.wide)
        t = sample_timesteps(
            seed,
            draws,
            sampling=flow.timestep_sampling,
            logit_mean=flow.logit_mean,
            logit_std=flow.logit_std,
            mu=training_mu(flow.shift, self.model_config.family, self.tokens_per_sample()[0]),
        )
        weight = None if flow.weighting == "none" else loss_weight(t, flow.weighting)
        return MicroBatch(
            x_t=interpolate(x_0, noise, t),
            t=t,
            txt=encoded.txt,
            vec=encoded.vec,
            references=self.space.references(encoded.references, x_0, length),
            target=velocity(x_0, noise),
            weight=weight,
        )

    def inputs(self, micro_batch: MicroBatch) -> Arguments:
        b = micro_batch
        return self.velocity.arguments(b.x_t, b.t, b.txt, b.vec, self.guidance(b.t), b.references)

    def guidance(self, t: Tensor) -> Tensor:
        """Distilled guidance [B] for B samples at t."""
        return torch.full_like(t, self.config.flow.guidance)

    def loss(self, output: Tensor, micro_batch: MicroBatch) -> Tensor:
        target = self.space.pack(micro_batch.target)  # [B, L, C]
        elements = target[0].numel()
        if self.parallel.context:
            (target,) = self.parallel.context.split(target)
        output = self.velocity.of_image(output, *micro_batch.target.shape[2:])
        return self.flow_loss(output, target, micro_batch.weight, self.global_batch_size, elements)

    def predict(self, x_t: Tensor, t: Tensor, encoded: Encoded) -> Tensor:
        """The model's velocity [B, C, h, w] at x_t and t [B] for encoded samples, without gradients."""
        references = self.space.references(encoded.references, x_t)
        return self.velocity(x_t, t, encoded.txt, encoded.vec, self.guidance(t), references)

    def identity(self) -> dict[str, Any]:
        contents = [source.fingerprint.as_dict() for source in self.mixture.sources]
        return {**super().identity(), CONTENTS: contents}

    # Validation.

    def read_prompts(self) -> list[Prompt]:
        """The prompts to draw, from the list or from the file; none when validation is off."""
        section = self.config.validation
        if not section.enable:
            return []
        if section.prompts_path:
            return read_prompts(section.prompts_path)
        return [Prompt(text) for text in section.prompts]

    def build_validation_loader(self) -> ValidationLoader | None:
        config = self.config
        if not (config.validation.enable and config.validation.sources):
            return None
        samples = ValidationSamples(
            config.validation.sources,
            count=config.validation.samples,
            image_size=config.training.img_size,
            data=config.data,
        )
        return ValidationLoader(
            config.data,
            samples,
            tokenize=self.encoders.text.tokenizers.tokenize,
            batch_size=config.validation.local_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def validate(self) -> None:
        """The held-out loss and the pictures of the weights and, if there is one, of their average."""
        start = time.perf_counter()
        figures = self.measure("")
        if self.ema and self.step:  # before the first step they are the same
            with self.averaged_weights():
                figures |= self.measure("ema_")
        self.reshard()
        self.writers.scalars(self.step, {"step": self.step, **figures})
        losses = {name: value for name, value in figures.items() if name.endswith("loss")}
        if losses:
            seconds = time.perf_counter() - start
            logger.info(validation_line(self.step, self.config.training.steps, losses, seconds, self.color))

    def measure(self, prefix: str) -> dict[str, float]:
        """Figures of the present weights by name; their pictures go to disk and to the trackers."""
        figures: dict[str, float] = {}
        if self.held_out:
            losses = self.losses(self.held_out)
            figures[f"{prefix}validation_loss"] = sum(losses) / len(losses)
            for i, loss in enumerate(losses):
                t = (i + 0.5) / len(losses)
                figures[f"{prefix}validation_loss_at/t{t:.3f}"] = loss
        if self.prompts:
            pictures = self.draw(self.prompts)
            if self.world.rank == 0:
                texts = [prompt.text for prompt in self.prompts]
                sheet = grid(pictures, texts)
                folder = self.dump_folder / self.config.validation.save_img_folder
                folder.mkdir(parents=True, exist_ok=True)
                sheet.save(folder / f"{prefix}step-{self.step:0{len(str(self.config.training.steps))}}.png")
                self.writers.images(self.step, f"{prefix}pictures", sheet, texts)
        return figures

    def losses(self, batches: Iterable[Batch]) -> list[float]:
        """The loss at each of the validation's timesteps on the samples of all ranks' `batches`."""
        section = self.config.validation
        return validation_loss(
            batches,
            partial(self.encode, batch_size=section.local_batch_size),
            self.predict,
            batch_size=section.local_batch_size,
            timesteps=section.timesteps,
            seed=self.config.debug.seed,
            group=self.group,
            dtype=self.wide,
            bad_samples=self.bad_samples,
        )

    def draw(self, prompts: Sequence[Prompt]) -> Tensor:
        """Pictures uint8 [len(prompts), 3, H, W], with the validation's settings; the same on every rank."""
        section, side = self.config.validation, self.config.training.img_size
        guided = section.enable_classifier_free_guidance
        requests = [
            Request(
                prompt.text,
                width=side,
                height=side,
                steps=section.denoising_steps,
                guidance=self.config.flow.guidance,
                cfg_scale=section.classifier_free_guidance_scale if guided else 1.0,
                seed=self.config.debug.seed,
                draw=number,
                references=prompt.references,
            )
            for number, prompt in enumerate(prompts)
        ]
        batches = share_out(requests, self.group.count, section.local_batch_size)
        text = encode_prompts(requests, batches, self.encoders.text, self.group)
        pictures = draw(
            requests,
            batches,
            text,
            self.velocity,
            self.encoders.decode,
            space=self.space,
            mu=sampler_mu(self.config.model.flavor),
            group=self.group,
            dtype=self.wide,
            shown=encode_references(requests, batches, self.encode_reference, self.group),
        )
        return torch.stack([picture for _, picture in sorted(pictures, key=lambda pair: pair[0])])

    def outputs(self) -> dict[str, Path]:
        outputs = super().outputs()
        if self.prompts:
            outputs = {"pictures": self.dump_folder / self.config.validation.save_img_folder, **outputs}
        return outputs
